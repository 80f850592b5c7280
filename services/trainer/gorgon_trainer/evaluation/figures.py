"""Measured figures: plain data that goes to JSON and comes back."""

from dataclasses import asdict, dataclass
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from gorgon_protocol.errors import DataError


@dataclass(frozen=True, slots=True)
class StepFigures:
    """The verification steps of some answers. An answer's first token comes from prefill and is in no step."""

    num_answers: int
    num_steps: int
    num_draft_tokens: int  # nodes verified, roots not counted
    acceptance_histogram: tuple[int, ...]  # [i] = steps that accepted i drafts

    @property
    def num_accepted(self) -> int:
        return sum(i * count for i, count in enumerate(self.acceptance_histogram))

    @property
    def mean_acceptance_length(self) -> float | None:
        """All tokens that steps gave over all steps, not a mean of answers' means; None where there was no step."""
        return 1.0 + self.num_accepted / self.num_steps if self.num_steps else None

    @property
    def acceptance_by_depth(self) -> tuple[float, ...]:
        """[d - 1] = share of the steps that accepted at least d drafts."""
        at_least, shares = self.num_steps, []
        for count in self.acceptance_histogram[:-1]:
            at_least -= count
            shares.append(at_least / self.num_steps)
        return tuple(shares)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "num_accepted": self.num_accepted,
            "mean_acceptance_length": self.mean_acceptance_length,
            "acceptance_by_depth": list(self.acceptance_by_depth),
        }


@dataclass(frozen=True, slots=True)
class SourceFigures:
    """The nodes of one drafter in all trees. A node that two drafters propose counts for the one that was surer."""

    num_drafted: int
    num_accepted: int


@dataclass(frozen=True, slots=True)
class SamplingResult:
    """Every prompt answered once with every seed."""

    temperature: float  # 0 = greedy
    seeds: tuple[int, ...]
    answers: StepFigures  # all of them
    non_looping: StepFigures  # those that do not end in a loop (`is_looping`)
    sources: dict[str, SourceFigures] | None = None  # by the drafter's name, where traces were asked for
    num_identical: int | None = None  # answers with the tokens of plain decoding, where that was asked for

    @property
    def name(self) -> str:
        return "greedy" if self.temperature == 0.0 else f"T={self.temperature:g}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "name": self.name,
            "answers": self.answers.as_json(),
            "non_looping": self.non_looping.as_json(),
        }


@dataclass(frozen=True, slots=True)
class Measurement:
    """One engine on one set of prompts."""

    max_nodes: int  # rows of a verification pass, root included
    adaptive: bool  # trees sized by the cost model instead of always the largest
    kernels: str
    num_prompts: int
    num_skipped: int  # prompts longer than `max_prompt_tokens`
    max_tokens: int
    num_tokens: int  # of all answers, first tokens included
    seconds: float  # prefill included; the plain runs of a comparison are not
    results: tuple[SamplingResult, ...]

    def result(self, *, greedy: bool) -> SamplingResult | None:
        """The greedy answers' result, or the sampled ones'; None where they were not asked for."""
        return next((result for result in self.results if (result.temperature == 0.0) is greedy), None)

    def as_json(self) -> dict[str, Any]:
        """What `json.dump` takes, derived figures included."""
        return asdict(self) | {"results": [result.as_json() for result in self.results]}

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """The inverse of `as_json`. Raises `DataError` for anything else."""
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise DataError(f"not a measurement: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
