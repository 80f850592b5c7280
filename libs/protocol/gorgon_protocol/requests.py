"""What is asked for: a generation, by a client of the gateway and by the gateway of an engine.

Both are the same fields. The gateway fills in what makes a generation repeatable and resumable (a seed, a request id,
the tokens that were already said) and passes it on.
"""

from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

MAX_STOPS: Final = 64
MAX_LOGPROBS: Final = 20
MAX_LOGIT_BIASES: Final = 1024
MAX_MESSAGES: Final = 2048

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
RequestId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]


class _Strict(BaseModel):
    """Unknown fields are refused, never ignored; numbers are not read out of strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class ChatMessage(_Strict):
    role: Literal["system", "user", "assistant", "tool"]
    content: str


class Speculation(_Strict):
    """How a request speculates. `lossless` gives the tokens of plain decoding, `rejection` its distribution, `typical`
    is faster and changes the output."""

    enabled: bool = True
    max_nodes: int | None = Field(
        default=None, ge=1, le=128, description="rows of a verification pass, root included; null: the engine's limit"
    )
    acceptance: Literal["lossless", "rejection", "typical"] = "lossless"


class Sampling(_Strict):
    """How tokens are drawn. The defaults switch everything off; temperature 0 is greedy."""

    max_tokens: int | None = Field(
        default=None, ge=1, le=2**31 - 1, description="of the answer; null: up to the context's end"
    )
    temperature: float = Field(default=0.0, ge=0.0, le=100.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0, le=2**31 - 1, description="0 = all")
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=100.0, description="over prompt and answer")
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0, description="over the answer, as OpenAI defines it")
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0, description="over the answer, as OpenAI defines it")
    logit_bias: dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]] = Field(
        default_factory=dict, max_length=MAX_LOGIT_BIASES, description="token id -> what is added to its logit"
    )
    seed: int | None = Field(
        default=None, ge=0, le=2**63 - 1, description="same seed, same tokens; null: drawn by the gateway"
    )
    stop: list[Annotated[str, StringConstraints(min_length=1, max_length=1024)]] = Field(
        default_factory=list, max_length=MAX_STOPS, description="the answer ends before any of them"
    )
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=MAX_STOPS)
    ignore_eos: bool = False
    logprobs: int | None = Field(
        default=None, ge=0, le=MAX_LOGPROBS, description="report log-probabilities, with so many alternatives"
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, value: dict[str, float]) -> dict[str, float]:
        for token in value:
            if not (token.isascii() and token.isdigit() and len(token) <= 10):
                raise ValueError(f"logit_bias is keyed by token ids: got {token[:40]!r}")
        return value


class GenerateRequest(Sampling):
    """A generation: the payload of WebSocket `/generate_stream` and of `POST /generate`.

    Exactly one of `prompt` (a text to continue), `messages` (a chat) and `prompt_token_ids`.
    """

    type: Literal["generate"] = "generate"
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    prompt_token_ids: list[TokenId] | None = Field(default=None, min_length=1)
    generated_token_ids: list[TokenId] = Field(
        default_factory=list,
        description="tokens of the answer that were already received: it goes on behind them, as if never interrupted "
        "(penalties, stops, limits and random numbers count them); text is sent from there on. Needs `seed`, except "
        "at temperature 0.",
    )
    model: str | None = Field(default=None, max_length=200, description="name or alias; null: what is served")
    speculation: Speculation = Field(default_factory=Speculation)
    tree_debug: bool = Field(default=False, description="send the tree of every step")
    request_id: RequestId | None = Field(default=None, description="null: made by the gateway")

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        given = [name for name in ("prompt", "messages", "prompt_token_ids") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of prompt, messages and prompt_token_ids: got {given or 'none'}")
        if self.prompt == "":
            raise ValueError("prompt is empty: give at least one character")
        if self.generated_token_ids and self.seed is None and self.temperature > 0.0:
            raise ValueError("generated_token_ids need the seed that they were drawn with")
        return self


class CancelRequest(_Strict):
    """On a WebSocket: end the running generation; it finishes with reason `cancelled`."""

    type: Literal["cancel"]


class EngineRequest(GenerateRequest):
    """Gateway to engine, `POST /generate`: everything decided."""

    request_id: RequestId
    seed: int = Field(ge=0, le=2**63 - 1)
    client: str = Field(
        default="", max_length=128, description="whose request it is: waiting requests are served client by client"
    )
    timeout_seconds: float | None = Field(
        default=None, gt=0.0, description="of waiting for a slot; then it ends with error `timeout`"
    )


class TokenizeRequest(_Strict):
    """`POST /tokenize`: a text, or a chat as the model's template writes it."""

    text: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.text is None) == (self.messages is None):
            raise ValueError("give exactly one of text and messages")
        return self


class DetokenizeRequest(_Strict):
    token_ids: list[TokenId]


class ReloadHeadsRequest(_Strict):
    """`POST /heads/reload`: take up a published version; null: what `latest` names."""

    version: (
        Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}@[A-Za-z0-9._-]{1,64}$")] | None
    ) = Field(default=None, description="name@version")
