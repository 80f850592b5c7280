"""Tokens a second of several streams at once, with and without speculation, in one process and in turns.

python benchmarks/engine/concurrency.py --streams 1,4,8,16 --rounds 3

As many requests as streams are kept in flight: one that ends is followed by the next question of MT-bench, so that
prefill is part of the figures and no stream runs alone at the end. Tokens count until no question is left. The same
questions with and without speculation, hence the same tokens; every round runs both, in the other order than the last.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from contest import read_questions

from gorgon_engine.engine import Engine, EngineConfig
from gorgon_engine.events import FinishedEvent, TokenEvent
from gorgon_engine.kernels.cpu import set_num_threads
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.sequence import Request, SpeculationParams


@dataclass(frozen=True, slots=True)
class Run:
    num_tokens: int
    seconds: float
    num_steps: int  # of sequences
    answers: tuple[tuple[int, ...], ...]  # in the order of the questions

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


def run(engine: Engine, requests: Sequence[Request], num_streams: int) -> Run:
    """Keep `num_streams` requests in flight."""
    waiting, tokens = list(requests), {request.id: [] for request in requests}
    counted, num_steps, ended = 0, 0, 0.0
    began = time.perf_counter()
    for request in waiting[:num_streams]:
        engine.submit(request)
    del waiting[:num_streams]
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, TokenEvent):
                tokens[event.request_id] += event.token_ids
                counted += len(event.token_ids) if not ended else 0
            elif isinstance(event, FinishedEvent):
                num_steps += event.metrics.num_spec_steps
                if waiting:
                    engine.submit(waiting.pop(0))
                elif not ended:
                    ended = time.perf_counter()
    return Run(counted, ended - began, num_steps, tuple(tuple(said) for said in tokens.values()))


def measure(engine: Engine, arguments: argparse.Namespace) -> dict[int, dict[bool, list[Run]]]:
    """Runs by number of streams and by whether they speculate."""
    questions = read_questions(80)
    runs: dict[int, dict[bool, list[Run]]] = {n: {False: [], True: []} for n in arguments.streams}
    for number in range(-1, arguments.rounds):  # the first warms up
        for num_streams in arguments.streams:
            count = max(arguments.answers * num_streams, 4)
            chosen = list(islice(cycle(questions), 7 * max(number, 0), 7 * max(number, 0) + count))
            for speculate in (True, False) if number % 2 else (False, True):
                requests = [
                    engine.request(
                        [{"role": "user", "content": question}],
                        SamplingParams(
                            max_tokens=arguments.tokens if number >= 0 else 8,
                            temperature=arguments.temperature,
                            seed=place,
                        ),
                        SpeculationParams(enabled=speculate),
                    )
                    for place, question in enumerate(chosen)
                ]
                result = run(engine, requests, num_streams)
                if number >= 0:
                    runs[num_streams][speculate].append(result)
    return runs


def table(runs: dict[int, dict[bool, list[Run]]]) -> str:
    rows = [
        f"{'streams':>7} {'off':>8} {'on':>8} {'on/off':>7} {'scaling off':>12} {'scaling on':>11} {'tokens/step':>12}"
    ]
    first = runs[min(runs)]
    for num_streams, both in runs.items():
        off, on = (rate(both[speculate]) for speculate in (False, True))
        ratio = statistics.median(
            one.tokens_per_second / other.tokens_per_second for one, other in zip(both[True], both[False], strict=True)
        )
        length = 1 + statistics.mean(
            (sum(map(len, one.answers)) - len(one.answers) - one.num_steps) / max(one.num_steps, 1)
            for one in both[True]
        )
        rows.append(
            f"{num_streams:7} {off:8.1f} {on:8.1f} {ratio:7.2f} {off / rate(first[False]):12.2f} "
            f"{on / rate(first[True]):11.2f} {length:12.2f}"
        )
    same = all(
        one.answers == other.answers for both in runs.values() for one, other in zip(*both.values(), strict=True)
    )
    return "\n".join([*rows, f"identical tokens with and without speculation: {'yes' if same else 'NO'}"])


def rate(runs: Sequence[Run]) -> float:
    return statistics.median(one.tokens_per_second for one in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--streams", type=lambda text: [int(part) for part in text.split(",")], default=[1, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answers", type=int, default=2, help="a stream and round")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer at most")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.threads is not None:
        set_num_threads(arguments.threads)
    began = time.perf_counter()
    engine = Engine.load(EngineConfig(model=arguments.model, num_slots=max(arguments.streams), context=2048))
    loaded = time.perf_counter() - began
    runs = measure(engine, arguments)
    if arguments.json:
        figures = {
            n: {
                ("on" if speculate else "off"): [one.tokens_per_second for one in several]
                for speculate, several in both.items()
            }
            for n, both in runs.items()
        }
        print(json.dumps({"temperature": arguments.temperature, "tokens_per_second": figures}))
        return
    print(
        f"{engine.backbone.kernels}, heads {engine.heads}, temperature {arguments.temperature}, "
        f"loaded in {loaded:.1f} s"
    )
    print(table(runs))


if __name__ == "__main__":
    main()
