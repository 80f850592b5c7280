"""What a generation tells its client: where it stands, tokens as they are accepted, then exactly one terminal event.

status*  token*  (finished | failed)
"""

from dataclasses import dataclass, field
from typing import Literal

from gorgon_engine.logprobs import TokenLogprobs
from gorgon_engine.outcome import StepSeconds, TreeTrace
from gorgon_engine.sequence import FinishReason
from gorgon_protocol.errors import GorgonError
from gorgon_protocol.metrics import SpeculativeDecodingMetrics, Usage


@dataclass(frozen=True, slots=True)
class StatusEvent:
    """Before the first token, where that takes more than a step."""

    request_id: str
    state: Literal["queued", "prefill"]
    position: int | None = None  # queued: requests that will be admitted before this one, as it looks now
    progress: float | None = None  # prefill: share done


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
    batch_size: int = 1  # sequences that were decoding in the engine's step

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
    usage: Usage  # tokens of the answer that were generated before count as completion tokens
    metrics: SpeculativeDecodingMetrics  # of the steps here
    tokens_per_second: float | None  # first token to last
    ttft_seconds: float | None  # arrival to the first token
    notices: list[str] = field(default_factory=list)
    queue_seconds: float | None = None  # waiting for a slot
    prefill_seconds: float | None = None  # the slot to the first token
    decode_seconds: float | None = None  # the first token to the last
    plain_tokens_per_second: float | None = None  # of plain decoding at the batch sizes that there were, as calibrated


@dataclass(frozen=True, slots=True)
class FailedEvent:
    """The end of a generation that could not go on. `error.__cause__` is what broke, where something of ours did."""

    request_id: str
    error: GorgonError


Event = StatusEvent | TokenEvent | FinishedEvent | FailedEvent
