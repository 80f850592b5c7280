"""Engine and gateway under mixed clients for a long time: flat memory, no stuck sequence, one end for every request.

    PYTHONPATH=tests python benchmarks/serving/soak.py [--seconds 600] [--clients 12] [--seed 0] [--json FILE]

Clients of every kind (`soak_clients.py`) ask, cancel, hang up in the middle, come back and go on, and talk nonsense,
each choosing anew when it is done. The exit status is 1 where

- something was promised and not kept: no terminal message, a second one, a resumed answer that differs from the
  undisturbed one, an error where there should be an answer;
- a sequence still runs or waits 5 s after the last client has gone;
- memory grew: the median of a process's resident memory in the last quarter is more than --max-growth MB above that of
  the second quarter (the first one warms up).

Prediction: none of these in 10 minutes; growth below 10 MB.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import aiohttp
import uvloop
from soak_clients import Client, Tally, live

from support.services import Service, engine_service, gateway_service

QUESTIONS = Path(__file__).parents[1] / "data" / "mt_bench.jsonl"
SAMPLE_SECONDS = 1.0
SETTLE_SECONDS = 5.0


@dataclass(slots=True)
class Report:
    seconds: float
    num_clients: int
    ends: dict[str, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    num_left: int = 0  # sequences that run or wait after everybody has gone
    megabytes: dict[str, list[float]] = field(default_factory=dict)  # process -> resident memory, one a second

    def growth(self, name: str) -> float:
        """Of the last quarter over the second, in MB."""
        samples = self.megabytes[name]
        quarter = max(len(samples) // 4, 1)
        return statistics.median(samples[-quarter:]) - statistics.median(samples[quarter : 2 * quarter])


async def soak(
    engine: Service, gateway: Service, seconds: float, num_clients: int, max_tokens: int, seed: int
) -> Report:
    questions = [json.loads(line)["turns"][0] for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    tally = Tally()
    over = asyncio.Event()
    report = Report(seconds, num_clients, megabytes={service.name: [] for service in (engine, gateway)})
    timeout = aiohttp.ClientTimeout(total=120.0)
    async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as group:
        for number in range(num_clients):
            client = Client(gateway.url, questions, max_tokens, session, tally, random.Random(f"{seed} {number}"))
            group.create_task(live(client, over))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            await asyncio.sleep(SAMPLE_SECONDS)
            for service in (engine, gateway):
                report.megabytes[service.name].append(service.rss_bytes / 1e6)
        over.set()
    report.num_left = await settle(engine)
    report.ends = dict(sorted(tally.ends.items()))
    report.broken = tally.broken
    return report


async def settle(engine: Service) -> int:
    """Sequences that are left when there was time enough for them to go."""
    end = time.monotonic() + SETTLE_SECONDS
    while True:
        info = await asyncio.to_thread(engine.get, "/info")
        left = int(info["num_running"] + info["num_waiting"])
        if not left or time.monotonic() > end:
            return left
        await asyncio.sleep(0.1)


def table(report: Report, max_growth: float) -> str:
    total = sum(report.ends.values())
    lines = [f"{total} requests by {report.num_clients} clients in {report.seconds:.0f} s"]
    lines += [f"  {count:6} {how}" for how, count in report.ends.items()]
    for name, samples in report.megabytes.items():
        growth = report.growth(name)
        verdict = "flat" if growth <= max_growth else "GROWS"
        lines.append(f"{name}: {samples[0]:.0f} MB at first, {samples[-1]:.0f} MB at last, {growth:+.1f} MB: {verdict}")
    lines.append(f"{report.num_left} sequences left, {len(report.broken)} promises broken")
    return "\n".join([*lines, *report.broken[:20]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--max-tokens", type=int, default=96, help="of an answer at most")
    parser.add_argument("--max-growth", type=float, default=20.0, help="MB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    with (
        engine_service(model=arguments.model, num_slots=8, max_waiting=4 * arguments.clients) as engine,
        gateway_service(engine) as gateway,
    ):
        report = uvloop.run(
            soak(engine, gateway, arguments.seconds, arguments.clients, arguments.max_tokens, arguments.seed)
        )
    print(table(report, arguments.max_growth))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(asdict(report), indent=1) + "\n")
    grows = any(report.growth(name) > arguments.max_growth for name in report.megabytes)
    sys.exit(1 if report.broken or report.num_left or grows else 0)


if __name__ == "__main__":
    main()
