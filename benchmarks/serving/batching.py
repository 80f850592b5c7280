"""Continuous batching on the real engine service: tokens/s of 1, 4, 8 and 16 streams, speculation off and on.

    PYTHONPATH=tests python benchmarks/serving/batching.py [--temperature 0.7] [--seconds 6] [--rounds 5] [--json FILE]

Starts `python -m gorgon_engine` and asks it over its own HTTP, as the gateway does. So many streams ask first turns of
MT-bench one after another, --tokens tokens in the mean (past the end of sequence), so that there are always as many;
answers are of different lengths, as else those without speculation would begin and end, and prefill, together. tokens/s
= what all of them get in a window of --seconds that begins once each has had its first token, prefill of the next
questions included. (Not a fixed amount of work: where some streams are faster than others, as with speculation, its end
would be spent with few of them.) Off and on take turns, and each pair asks the same questions; the table shows medians
over the rounds.

Predictions: 8 streams give at least twice the tokens/s of one; on is never below 0.98 of off.
"""

import argparse
import asyncio
import itertools
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import orjson
import uvloop
from streams import LineStream

from support.services import Service, engine_service

QUESTIONS = Path(__file__).parents[1] / "data" / "mt_bench.jsonl"
NUM_QUESTIONS = 16


@dataclass(frozen=True, slots=True)
class Row:
    """Medians over the rounds."""

    num_streams: int
    off: float  # tokens/s of all streams
    on: float
    ratio: float  # of pairs that were measured one after the other
    off_scaling: float  # over one stream
    on_scaling: float
    acceptance_length: float  # tokens a step, on


@dataclass(frozen=True, slots=True)
class Measurement:
    tokens_per_second: float
    acceptance_length: float


def read_questions() -> list[str]:
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()
    return [json.loads(lines[i * len(lines) // NUM_QUESTIONS])["turns"][0] for i in range(NUM_QUESTIONS)]


class Streams:
    """As many streams as asked for, each with one question after another, until they are closed."""

    def __init__(
        self, engine: Service, questions: list[str], num_tokens: int, temperature: float, *, speculate: bool
    ) -> None:
        self.num_tokens = 0  # that have come in all streams
        self.num_messages = 0
        self.error: bytes | None = None
        self._url = f"{engine.url}/generate"
        self._questions = questions
        self._num_tokens = num_tokens
        self._fields = {
            "temperature": temperature,
            "ignore_eos": True,
            "speculation": {"enabled": speculate},
            "seed": 0,
        }
        self._begun: set[int] = set()

    async def run(self, number: int) -> None:
        """One stream, until cancelled."""
        lengths = random.Random(number)  # the same with speculation and without
        for count in itertools.count():
            question = self._questions[(number + count) % len(self._questions)]
            body = {
                "messages": [{"role": "user", "content": question}],
                "request_id": f"{number}-{count}-{time.monotonic_ns()}",
                "max_tokens": round(self._num_tokens * lengths.uniform(0.5, 1.5)),
                **self._fields,
            }
            stream = await LineStream.open(self._url, orjson.dumps(body), partial(self._take, number))
            try:
                await stream.closed
            finally:
                stream.close()

    async def have_begun(self, num_streams: int) -> None:
        while len(self._begun) < num_streams and self.error is None:
            await asyncio.sleep(0.01)

    def _take(self, number: int, line: bytes) -> None:
        message = orjson.loads(line)
        if message["type"] == "token":
            self._begun.add(number)
            self.num_tokens += len(message["token_ids"])
            self.num_messages += 1
        elif message["type"] == "error" or "error" in message:
            self.error = line


async def measure(
    engine: Service, questions: list[str], num_streams: int, arguments: argparse.Namespace, *, speculate: bool
) -> Measurement:
    """Raises `RuntimeError` where a stream gets no answer."""
    streams = Streams(engine, questions, arguments.tokens, arguments.temperature, speculate=speculate)
    tasks = [asyncio.create_task(streams.run(number)) for number in range(num_streams)]
    await streams.have_begun(num_streams)
    began, tokens, messages = time.perf_counter(), streams.num_tokens, streams.num_messages
    await asyncio.sleep(arguments.seconds)
    tokens, messages = streams.num_tokens - tokens, streams.num_messages - messages
    elapsed = time.perf_counter() - began
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    if streams.error is not None or not messages:
        raise RuntimeError(f"no answer: {(streams.error or b'silence').decode(errors='replace')}")
    return Measurement(tokens / elapsed, tokens / messages)


async def compare(engine: Service, arguments: argparse.Namespace) -> list[Row]:
    questions, counts = read_questions(), arguments.streams
    await measure(engine, questions, counts[-1], arguments, speculate=True)  # warm
    measured: dict[tuple[int, bool], list[Measurement]] = {}
    for number in range(arguments.rounds):
        for count in counts:
            for speculate in (False, True) if number % 2 == 0 else (True, False):
                shifted = questions[number:] + questions[:number]
                one = await measure(engine, shifted, count, arguments, speculate=speculate)
                measured.setdefault((count, speculate), []).append(one)

    def median(count: int, speculate: bool) -> float:
        return statistics.median(one.tokens_per_second for one in measured[count, speculate])

    return [
        Row(
            num_streams=count,
            off=median(count, False),
            on=median(count, True),
            ratio=statistics.median(
                on.tokens_per_second / off.tokens_per_second
                for on, off in zip(measured[count, True], measured[count, False], strict=True)
            ),
            off_scaling=median(count, False) / median(counts[0], False),
            on_scaling=median(count, True) / median(counts[0], True),
            acceptance_length=statistics.median(one.acceptance_length for one in measured[count, True]),
        )
        for count in counts
    ]


def table(rows: list[Row]) -> str:
    lines = [f"{'streams':>7} {'off':>8} {'on':>8} {'on/off':>7} {'tokens/step':>12} {'off x 1':>8} {'on x 1':>8}"]
    for row in rows:
        lines.append(
            f"{row.num_streams:7} {row.off:8.1f} {row.on:8.1f} {row.ratio:7.2f} {row.acceptance_length:12.2f}"
            f" {row.off_scaling:8.2f} {row.on_scaling:8.2f}"
        )
    return "\n".join([*lines, "(off, on: tokens/s of all streams; x 1: over one stream)"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8, 16], help="the first one is compared with")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, in the mean")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    with engine_service(model=arguments.model, num_slots=max(arguments.streams), max_waiting=NUM_QUESTIONS) as engine:
        info = engine.get("/info")
        rows = uvloop.run(compare(engine, arguments))
    print(f"{info['model']}, {info['kernels']}, heads {info['heads']['current']}, temperature {arguments.temperature}")
    print(table(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
