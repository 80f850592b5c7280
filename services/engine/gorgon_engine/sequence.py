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
    WAITING = "waiting"  # for a slot
    PREFILL = "prefill"  # in a slot, its prompt not yet run to the end
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class SpeculationParams:
    """How one request speculates. `max_nodes` counts every row of the verification pass: 1 is plain decoding."""

    enabled: bool = True
    max_nodes: int | None = None  # None: the engine's own limit
    acceptance: AcceptanceRule = AcceptanceRule.LOSSLESS

    @property
    def may_draft(self) -> bool:
        return self.enabled and self.max_nodes != 1


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked for, already in tokens."""

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    speculation: SpeculationParams = field(default_factory=SpeculationParams)
    trace: bool = False  # report every step's tree
    generated: tuple[int, ...] = ()  # the beginning of the answer, said before: it goes on behind them
    client: str = ""  # whose request it is: waiting ones are served client by client
    timeout_seconds: float | None = None  # of waiting for a slot


@dataclass(slots=True, eq=False)
class Sequence:
    """The engine's side of a request. Only the scheduler changes its status."""

    request: Request
    detokenizer: IncrementalDetokenizer
    stop_token_ids: frozenset[int] = frozenset()  # the request's, and the model's end of sequence unless ignored
    status: Status = Status.WAITING
    slot: int = -1
    num_prefilled: int = 0  # of `prefix`
    drafters_epoch: int = 0  # that of the drafters which have seen it from its first position on
    position: int | None = None  # in the queue, as last told
    output: list[int] = field(init=False)  # the answer so far, what was generated before included
    path_probs: list[float] = field(default_factory=list)  # of the drafted next tree, descending
    metrics: MetricsAccumulator = field(default_factory=MetricsAccumulator)
    arrived_at: float = field(default_factory=time.perf_counter)
    admitted_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    plain_tokens: float | None = 0.0  # that plain decoding would have given since the first; None: not known

    def __post_init__(self) -> None:
        self.output = list(self.request.generated)
        if self.output:
            # Their text is with the client; what of it is held back is told with the tokens to come.
            self.detokenizer.push(self.output)

    @property
    def prefix(self) -> tuple[int, ...]:
        """What a prefill runs: the prompt, and the part of the answer that was said before."""
        return self.request.prompt + self.request.generated

    @property
    def num_left(self) -> int:
        """Positions that are still to be prefilled."""
        return len(self.request.prompt) + len(self.request.generated) - self.num_prefilled

    @property
    def committed_length(self) -> int:
        """KV positions in use: prompt and output, without the last token, which is the next root."""
        if self.status is not Status.RUNNING:
            return self.num_prefilled
        return len(self.request.prompt) + len(self.output) - 1

    @property
    def num_new(self) -> int:
        """Tokens that were generated here."""
        return len(self.output) - len(self.request.generated)

    @property
    def queue_seconds(self) -> float:
        """Spent waiting for a slot, up to now while it waits."""
        return (time.perf_counter() if self.admitted_at is None else self.admitted_at) - self.arrived_at

    @property
    def ttft_seconds(self) -> float | None:
        """Arrival to the first token."""
        return None if self.first_token_at is None else self.first_token_at - self.arrived_at

    @property
    def prefill_seconds(self) -> float | None:
        """The slot to the first token."""
        if self.first_token_at is None or self.admitted_at is None:
            return None
        return self.first_token_at - self.admitted_at

    @property
    def decode_seconds(self) -> float | None:
        """The first token to the last; None until there are two."""
        if self.first_token_at is None or self.last_token_at is None or self.num_new < 2:
            return None
        return self.last_token_at - self.first_token_at

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed from the first token to the last; None until there are two."""
        seconds = self.decode_seconds
        return (self.num_new - 1) / seconds if seconds else None

    @property
    def plain_tokens_per_second(self) -> float | None:
        """What plain decoding would have reached, at the batch sizes that there were; None where it is not known."""
        seconds = self.decode_seconds
        return self.plain_tokens / seconds if seconds and self.plain_tokens else None
