"""What comes back: one stream of messages a generation, the same from engine to gateway and from gateway to client.

    status*  token*  (finished | error)

Between processes a message is one line of JSON; on a WebSocket one text frame. `seconds` are durations.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from gorgon_protocol.metrics import SpeculativeDecodingMetrics, Usage


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StepSeconds(_Message):
    """Wall-clock time of a step's verbs; on a GPU the start-up calibration's, as measuring would mean waiting."""

    draft: float
    verify: float
    accept: float
    commit: float


class TreeDebug(_Message):
    """The verified tree of one step, the root left out: lists of one entry a node, parents first."""

    candidates: list[str] = Field(description="each node's token as text")
    token_ids: list[int]
    accepted: list[bool]
    parents: list[int] = Field(description="index into the lists, -1 = child of the root")
    depths: list[int]
    probabilities: list[float] = Field(description="of the whole path, by the drafters' estimate")
    ranks: list[int] = Field(description="of the node among the drafter's guesses at its place, 0 the best")
    sources: list[str] = Field(description='who drafted it: "head" or "lookup"')
    num_nodes: int = Field(description="rows verified, root included")
    speedup: float | None = Field(
        description="this request's decode speed so far over the engine's own plain decoding at the same batch size"
    )
    tokens_per_second: float | None = Field(description="of this request, from its first token to here")
    plain_tokens_per_second: float | None = Field(description="a stream's plain decoding at this batch size, measured")
    step: int
    step_seconds: StepSeconds
    batch_size: int = Field(description="sequences in the step")


class TopLogprob(_Message):
    token_id: int
    token: str
    bytes: list[int] | None = Field(
        default=None, description="the token's, where it is parts of characters, which `token` has as U+FFFD"
    )
    logprob: float


class TokenLogprob(TopLogprob):
    """Natural logarithms, from the backbone's own distribution before any sampling parameter."""

    top: list[TopLogprob]


class StatusMessage(_Message):
    """Before the first token; none may come at all."""

    type: Literal["status"] = "status"
    state: Literal["loading", "queued", "prefill", "resuming"]
    position: int | None = Field(default=None, description="queued: requests in front of this one")
    progress: float | None = Field(default=None, description="loading, prefill: share done")
    request_id: str | None = None
    seed: int | None = Field(default=None, description="that the tokens are drawn with: what a client needs to go on")


class TokenMessage(_Message):
    """One step's tokens. The first message carries the token that prefill gave, and an empty tree."""

    type: Literal["token"] = "token"
    text: str = Field(description="that became certain; it may lag behind the tokens (UTF-8, held-back stop strings)")
    token_ids: list[int] = Field(description="the accepted drafts in path order, then the bonus token")
    pieces: list[str] = Field(description="text that each token released; joined they are `text`")
    num_accepted: int = Field(description="how many of the tokens were drafts: the first ones")
    num_nodes: int = Field(description="rows verified, root included")
    logprobs: list[TokenLogprob] | None = None
    tree_debug: TreeDebug | None = None


class GenerationMetrics(_Message):
    """What one generation cost."""

    speculative_decoding: SpeculativeDecodingMetrics
    tokens_per_second: float | None = Field(description="decode speed, first token to last")
    speedup: float | None = Field(description="tokens_per_second over the engine's own plain decoding, same batch size")
    queue_seconds: float
    prefill_seconds: float | None
    ttft_seconds: float | None = Field(description="arrival at the engine to the first token")
    decode_seconds: float | None
    heads: str | None = Field(default=None, description="name@version that drafted last")
    num_resumptions: int = Field(default=0, description="times that the gateway went on with another engine")


class FinishedMessage(_Message):
    type: Literal["finished"] = "finished"
    finish_reason: Literal["stop", "length", "cancelled"]
    text: str = Field(default="", description="what was held back; nothing after a stop string")
    stop: str | int | None = Field(default=None, description="the stop string or token that ended it")
    usage: Usage
    metrics: GenerationMetrics
    request_id: str | None = None
    seed: int | None = None


class ErrorMessage(_Message):
    """`code` is of `gorgon_protocol.errors`; `message` names the thing and the remedy."""

    type: Literal["error"] = "error"
    code: str
    message: str
    retry_after_seconds: float | None = None
    request_id: str | None = None


Message = Annotated[
    StatusMessage | TokenMessage | FinishedMessage | ErrorMessage,
    Field(discriminator="type"),
]
MESSAGE: TypeAdapter[Message] = TypeAdapter(Message)


class HeadsInfo(_Message):
    """The heads that an engine drafts with, and how the last attempt to change them ended."""

    current: str | None = Field(description="name@version; null: none")
    family: str | None = None
    num_heads: int | None = None
    loaded_at: float | None = Field(default=None, description="Unix time")
    num_swaps: int = 0
    last_error: str | None = Field(default=None, description="why the latest `latest` was refused; null: it was not")
    refused: str | None = Field(default=None, description="name@version that was refused")


class PlainSpeed(_Message):
    """Plain decoding, measured at start-up."""

    batch_size: int
    tokens_per_second: float = Field(description="of each stream")


class EngineInfo(_Message):
    """`GET /info`."""

    engine_id: str
    version: str
    model: str
    backbone: str = Field(description="identity: hash of config, original weights and tokenizer")
    kernels: str
    device: str
    context: int = Field(description="positions, prompt and answer")
    vocab_size: int
    num_slots: int
    max_nodes: int
    max_waiting: int
    heads: HeadsInfo
    plain: list[PlainSpeed]
    state: Literal["loading", "ready", "draining", "failed"]
    num_running: int
    num_waiting: int
    kv_cache_usage: float = Field(ge=0.0, le=1.0)
    notices: list[str] = Field(default_factory=list)


class Tokenized(_Message):
    token_ids: list[int]
    tokens: list[str] = Field(description="each token as text")
    num_tokens: int


class Detokenized(_Message):
    text: str
