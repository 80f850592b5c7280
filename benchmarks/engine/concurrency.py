"""Tokens a second of several streams at once, with and without speculation, in one process and in turns.

python benchmarks/engine/concurrency.py --streams 1,4,8,16 --rounds 3

Every contestant (a number of streams, with speculation or without) is an engine of its own over the same weights. It
keeps as many requests in flight as it has streams: one that ends is followed by the next question of MT-bench, so that
prefill is part of the figures and no stream runs alone at the end. With and without speculation the questions are the
same, hence the tokens. The engines take turns step by step, the one that is furthest behind first, and only the time
of a contestant's own steps counts: whatever slows the machine down slows all of them.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice

import torch
from contest import read_questions

from gorgon_engine.engine import Engine, EngineConfig, LoadedParts, load_parts
from gorgon_engine.events import FinishedEvent, TokenEvent
from gorgon_engine.kernels.cpu import set_num_threads
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.sequence import Request, SpeculationParams

_CONTEXT = 2048


@dataclass(slots=True)
class Contestant:
    """An engine that keeps `num_streams` requests in flight."""

    num_streams: int
    speculate: bool
    engine: Engine
    rounds: list["Round"] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        return [one.num_tokens / one.seconds for one in self.rounds]

    @property
    def tokens_per_step(self) -> float:
        """Of a sequence, tokens that prefill gave not counted."""
        decoded = sum(len(said) - 1 for one in self.rounds for said in one.answers.values())
        return decoded / max(sum(one.num_steps for one in self.rounds), 1)


@dataclass(slots=True)
class Round:
    """What a contestant has done of its questions."""

    waiting: list[Request]
    in_flight: int = 0
    num_tokens: int = 0  # while as many as it has streams were in flight
    seconds: float = 0.0
    num_steps: int = 0  # of sequences
    answers: dict[str, list[int]] = field(default_factory=dict)
    num_answers: int = 0
    is_over: bool = False

    def step(self, contestant: Contestant) -> None:
        """One step of the engine."""
        engine = contestant.engine
        began = time.perf_counter()
        while self.waiting and self.in_flight < contestant.num_streams:
            request = self.waiting.pop(0)
            self.answers[request.id] = []
            self.in_flight += 1
            engine.submit(request)
        events = engine.step()
        self.seconds += time.perf_counter() - began
        for event in events:
            if isinstance(event, TokenEvent):
                self.answers[event.request_id] += event.token_ids
                self.num_tokens += len(event.token_ids)
            elif isinstance(event, FinishedEvent):
                self.in_flight -= 1
                self.num_answers += 1
                self.num_steps += event.metrics.num_spec_steps
        self.is_over = not self.waiting and self.in_flight < contestant.num_streams

    def finish(self, engine: Engine) -> None:
        """The answers that are left, off the clock."""
        while engine.has_work:
            for event in engine.step():
                if isinstance(event, TokenEvent):
                    self.answers[event.request_id] += event.token_ids
                elif isinstance(event, FinishedEvent):
                    self.num_steps += event.metrics.num_spec_steps


def requests_of(contestant: Contestant, questions: Sequence[str], arguments: argparse.Namespace) -> list[Request]:
    return [
        contestant.engine.request(
            [{"role": "user", "content": question}],
            SamplingParams(max_tokens=arguments.tokens, temperature=arguments.temperature, seed=place),
            SpeculationParams(enabled=contestant.speculate),
        )
        for place, question in enumerate(questions)
    ]


def hold(contestants: Sequence[Contestant], number: int, arguments: argparse.Namespace) -> None:
    """One round: questions of its own."""
    questions = read_questions(80)
    totals, running = [], []
    for contestant in contestants:
        count = contestant.num_streams * arguments.answers + arguments.extra
        first = number * 17
        contestant.rounds.append(
            Round(requests_of(contestant, list(islice(cycle(questions), first, first + count)), arguments))
        )
        totals.append(count * arguments.tokens)
        running.append(contestant)
    while running:
        contestant = min(running, key=lambda one: one.rounds[-1].num_tokens / totals[contestants.index(one)])
        contestant.rounds[-1].step(contestant)
        if contestant.rounds[-1].is_over:
            running.remove(contestant)
    for contestant in contestants:
        contestant.rounds[-1].finish(contestant.engine)


def report(contestants: Sequence[Contestant]) -> list[dict[str, float | bool]]:
    pairs = [(off, on) for off in contestants for on in contestants
             if off.num_streams == on.num_streams and on.speculate and not off.speculate]  # fmt: skip
    first = pairs[0]
    rows = []
    for off, on in pairs:
        ratios = [one / other for one, other in zip(on.rates, off.rates, strict=True)]
        scaling = [one / other for one, other in zip(on.rates, first[1].rates, strict=True)]
        plain_scaling = [one / other for one, other in zip(off.rates, first[0].rates, strict=True)]
        rows.append(
            {
                "streams": off.num_streams,
                "off": statistics.median(off.rates),
                "on": statistics.median(on.rates),
                "ratio": statistics.median(ratios),
                "scaling_off": statistics.median(plain_scaling),
                "scaling_on": statistics.median(scaling),
                "tokens_per_step": on.tokens_per_step,
                "identical": all(
                    list(one.answers.values()) == list(other.answers.values())
                    for one, other in zip(on.rounds, off.rounds, strict=True)
                ),
            }
        )
    return rows


def table(rows: Sequence[dict[str, float | bool]]) -> str:
    lines = [
        f"{'streams':>7} {'off':>8} {'on':>8} {'on/off':>7} {'scaling off':>12} {'scaling on':>11} {'tokens/step':>12}"
    ]
    for row in rows:
        lines.append(
            f"{row['streams']:7} {row['off']:8.1f} {row['on']:8.1f} {row['ratio']:7.3f} {row['scaling_off']:12.2f} "
            f"{row['scaling_on']:11.2f} {row['tokens_per_step']:12.2f}"
        )
    same = all(row["identical"] for row in rows)
    return "\n".join([*lines, f"identical tokens with and without speculation: {'yes' if same else 'NO'}"])


def make(parts: LoadedParts, num_streams: int, speculate: bool) -> Contestant:
    config = EngineConfig(num_slots=num_streams, context=_CONTEXT)
    return Contestant(num_streams, speculate, Engine.of_parts(parts, config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--streams", type=lambda text: [int(part) for part in text.split(",")], default=[1, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answers", type=int, default=2, help="a stream and round,")
    parser.add_argument("--extra", type=int, default=4, help="and more a round")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer at most")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.threads is not None:
        set_num_threads(arguments.threads)
    parts = load_parts(EngineConfig(model=arguments.model))
    contestants = [make(parts, n, speculate) for n in arguments.streams for speculate in (False, True)]
    for number in range(arguments.rounds):
        hold(contestants, number, arguments)
    rows = report(contestants)
    if arguments.json:
        print(json.dumps({"kernels": parts.backbone.kernels, "temperature": arguments.temperature, "rows": rows}))
        return
    print(f"{parts.backbone.kernels}, {parts.heads}, temperature {arguments.temperature}: tokens a second, medians")
    print(table(rows))


if __name__ == "__main__":
    main()
