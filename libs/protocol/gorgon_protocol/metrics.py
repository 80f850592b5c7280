"""What a finished generation reports about itself.

Field names are vLLM's, which AIPerf parses. Identities: sum(acceptance_histogram) = num_spec_steps,
sum(i * acceptance_histogram[i]) = num_accepted_draft_tokens, mean_acceptance_length = 1 + accepted / steps.
"""

from pydantic import BaseModel, ConfigDict, Field


class Usage(BaseModel):
    """Tokens of a request, as OpenAI counts them; the end-of-sequence token is a completion token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)
    total_tokens: int = Field(ge=0)


class SpeculativeDecodingMetrics(BaseModel):
    """A request's verification steps. The first token comes from prefill and is in none of them, so completion tokens =
    1 + num_spec_steps + num_accepted_draft_tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean_acceptance_length: float = Field(ge=0.0, description="tokens emitted per verification step")
    draft_acceptance_rate: float = Field(ge=0.0, le=1.0, description="accepted / drafted nodes")
    acceptance_histogram: list[int] = Field(description="[i] = steps that accepted i drafts")
    num_spec_steps: int = Field(ge=0, description="verification steps, plain ones (one node) included")
    num_accepted_draft_tokens: int = Field(ge=0)
    num_draft_tokens: int = Field(ge=0, description="nodes verified, roots not counted")
    num_spec_tokens: int = Field(ge=0, description="most drafts verified in one step")


class MetricsAccumulator:
    """Counts verification steps one by one."""

    def __init__(self) -> None:
        self._histogram: list[int] = []
        self._num_drafted = 0
        self._max_drafted = 0

    @property
    def num_steps(self) -> int:
        return sum(self._histogram)

    def record(self, *, num_accepted: int, num_drafted: int) -> None:
        """One step that verified `num_drafted` nodes (root not counted) and kept `num_accepted` of them."""
        assert 0 <= num_accepted <= num_drafted, (num_accepted, num_drafted)
        self._histogram += [0] * (num_accepted + 1 - len(self._histogram))
        self._histogram[num_accepted] += 1
        self._num_drafted += num_drafted
        self._max_drafted = max(self._max_drafted, num_drafted)

    def summary(self) -> SpeculativeDecodingMetrics:
        steps = self.num_steps
        accepted = sum(i * count for i, count in enumerate(self._histogram))
        return SpeculativeDecodingMetrics(
            mean_acceptance_length=1.0 + accepted / steps if steps else 0.0,
            draft_acceptance_rate=accepted / self._num_drafted if self._num_drafted else 0.0,
            acceptance_histogram=list(self._histogram),
            num_spec_steps=steps,
            num_accepted_draft_tokens=accepted,
            num_draft_tokens=self._num_drafted,
            num_spec_tokens=self._max_drafted,
        )
