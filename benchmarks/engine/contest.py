"""What the comparisons share: the same questions to every contestant in turn, so that a drifting machine favours none.

Speeds are decode speeds, from an answer's first token to its last, on the wall clock; every contestant answers with the
same number of tokens from the same prompt ids, greedily, past its end-of-sequence token.
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from gorgon_engine.engine import Engine
from gorgon_engine.events import TokenEvent
from gorgon_engine.kernels.cpu import set_num_threads
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.sequence import SpeculationParams

QUESTIONS = Path(__file__).parents[1] / "data" / "mt_bench.jsonl"


@dataclass(frozen=True, slots=True)
class Answer:
    token_ids: list[int]
    first_token_seconds: float  # from the call to the first token
    decode_seconds: float  # from the first token to the last

    @property
    def tokens_per_second(self) -> float:
        return (len(self.token_ids) - 1) / self.decode_seconds


class Contestant(Protocol):
    name: str

    def answer(self, prompt_ids: list[int], num_tokens: int) -> Answer: ...


class EngineContestant:
    """This engine, on the machine's threads: its own kernels' pool, or torch's where torch serves."""

    def __init__(self, name: str, engine: Engine, *, speculate: bool, num_threads: int) -> None:
        self.name = name
        self.mean_acceptance_lengths: list[float] = []
        self._engine = engine
        self._speculation = SpeculationParams(enabled=speculate)
        self._num_threads = num_threads

    def answer(self, prompt_ids: list[int], num_tokens: int) -> Answer:
        use_engine_threads(self._engine, self._num_threads)
        sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        token_ids: list[int] = []
        began = time.perf_counter()
        first = last = began
        for event in self._engine.generate(self._engine.request(prompt_ids, sampling, self._speculation)):
            if isinstance(event, TokenEvent):
                last = time.perf_counter()
                first = first if token_ids else last
                token_ids += event.token_ids
            else:
                self.mean_acceptance_lengths.append(event.metrics.mean_acceptance_length)
        return Answer(token_ids, first - began, last - first)


def use_engine_threads(engine: Engine, num_threads: int) -> None:
    """What `gorgon` sets: torch's waiting threads would take the cores of the native kernels' pool."""
    native = engine.backbone.kernels.startswith("native")
    torch.set_num_threads(1 if native else num_threads)
    if native:
        set_num_threads(num_threads)


def read_questions(count: int) -> list[str]:
    """First turns, spread evenly over MT-bench's eight categories."""
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()
    count = min(count, len(lines))
    return [json.loads(lines[number * len(lines) // count])["turns"][0] for number in range(count)]


def hold(contestants: Sequence[Contestant], prompts: Sequence[list[int]], num_tokens: int) -> dict[str, list[Answer]]:
    """Every prompt to every contestant, beginning with another one each time; a short unmeasured answer first."""
    for contestant in contestants:
        contestant.answer(prompts[0], min(num_tokens, 8))
    answers: dict[str, list[Answer]] = {contestant.name: [] for contestant in contestants}
    for number, prompt in enumerate(prompts):
        start = number % len(contestants)
        for contestant in [*contestants[start:], *contestants[:start]]:
            answers[contestant.name].append(contestant.answer(prompt, num_tokens))
    return answers


def speeds(answers: Sequence[Answer]) -> dict[str, Any]:
    rates = sorted(answer.tokens_per_second for answer in answers)
    return {
        "tokens_per_second": statistics.median(rates),
        "slowest": rates[0],
        "fastest": rates[-1],
        "first_token_seconds": statistics.median(answer.first_token_seconds for answer in answers),
    }


def ratio(answers: Sequence[Answer], others: Sequence[Answer]) -> float:
    """Median over the prompts of how much faster: each pair was measured one right after the other."""
    pairs = zip(answers, others, strict=True)
    return statistics.median(one.tokens_per_second / other.tokens_per_second for one, other in pairs)


def num_identical(answers: Sequence[Answer], others: Sequence[Answer]) -> int:
    return sum(one.token_ids == other.token_ids for one, other in zip(answers, others, strict=True))


def table(report: dict[str, Any], baselines: Sequence[str]) -> str:
    """`report["contestants"]` for people, with a column of ratios for each baseline."""
    width = max(len(name) for name in report["contestants"])
    head = f"{'':{width}} {'tokens/s':>9} {'slowest':>8} {'fastest':>8} {'first token':>12}"
    lines = [head + "".join(f"  {'x ' + name:>20}" for name in baselines)]
    for name, row in report["contestants"].items():
        numbers = f"{row['tokens_per_second']:9.1f} {row['slowest']:8.1f} {row['fastest']:8.1f}"
        first = f"{row['first_token_seconds'] * 1e3:9.0f} ms"
        ratios = "".join(f"  {row['ratios'][baseline]:20.2f}" for baseline in baselines)
        lines.append(f"{name:{width}} {numbers} {first:>12}{ratios}")
    return "\n".join(lines)
