"""A request, and the token stream that answers it."""

import time
from dataclasses import dataclass, field
from enum import StrEnum

from gorgon_engine.acceptance import AcceptanceRule
from gorgon_engine.detokenizer import IncrementalDetokenizer
from gorgon_engine.sampling import SamplingParams
from gorgon_protocol.metrics import MetricsAccumulator


class FinishReason(StrEnum):
    STOP = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_tokens or the end of the context
    CANCELLED = "cancelled"


class Status(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class SpeculationParams:
    """How one request speculates. `max_nodes` counts every row of the verification pass: 1 is plain decoding."""

    enabled: bool = True
    max_nodes: int | None = None  # None: the engine's own limit
    acceptance: AcceptanceRule = AcceptanceRule.LOSSLESS


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked for, already in tokens."""

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    speculation: SpeculationParams = field(default_factory=SpeculationParams)
    trace: bool = False  # report every step's tree


@dataclass(slots=True)
class Sequence:
    """The engine's side of a request. Only the scheduler changes it."""

    request: Request
    detokenizer: IncrementalDetokenizer
    status: Status = Status.WAITING
    slot: int = -1
    output: list[int] = field(default_factory=list)
    path_probs: list[float] = field(default_factory=list)  # of the drafted next tree, descending
    metrics: MetricsAccumulator = field(default_factory=MetricsAccumulator)
    arrived_at: float = field(default_factory=time.perf_counter)
    first_token_at: float | None = None
    last_token_at: float | None = None

    @property
    def committed_length(self) -> int:
        """KV positions in use: prompt and output, without the last token, which is the next root."""
        return len(self.request.prompt) + len(self.output) - 1

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed from the first token to the last; None until there are two."""
        if self.first_token_at is None or self.last_token_at is None or len(self.output) < 2:
            return None
        seconds = self.last_token_at - self.first_token_at
        return (len(self.output) - 1) / seconds if seconds > 0 else None
