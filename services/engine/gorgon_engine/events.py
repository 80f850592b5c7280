"""What a generation tells its client: tokens as they are accepted, then exactly one terminal event."""

from dataclasses import dataclass, field

from gorgon_engine.logprobs import TokenLogprobs
from gorgon_engine.sequence import FinishReason
from gorgon_engine.step import StepSeconds, TreeTrace
from gorgon_protocol.metrics import SpeculativeDecodingMetrics, Usage


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One step's tokens and the text that each of them released: none where a character or a possible stop string is
    not complete yet, more than its own where it completes one."""

    request_id: str
    token_ids: list[int]
    pieces: list[str]  # as long as token_ids
    num_accepted: int  # how many of the ids were drafts: the first ones
    step: int  # 0 = the token that prefill gave
    num_nodes: int  # rows verified, root included
    logprobs: list[TokenLogprobs] | None
    trace: TreeTrace | None
    seconds: StepSeconds

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """The end of a generation, with what was held back of its text."""

    request_id: str
    text: str
    finish_reason: FinishReason
    stop: str | int | None  # the stop string or token that ended it
    usage: Usage
    metrics: SpeculativeDecodingMetrics
    tokens_per_second: float | None
    ttft_seconds: float | None
    notices: list[str] = field(default_factory=list)


Event = TokenEvent | FinishedEvent
