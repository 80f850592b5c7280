"""What OpenAI's clients may ask for.

Every field is one of three kinds: it does what OpenAI says; it is harmless and accepted (`user`, `metadata`,
`"store": false`, `"tools": []`); or the request is refused with 400 and the field's name. Nothing is ignored that would
change the answer. Beyond OpenAI's fields there are this server's: `top_k`, `min_p`, `repetition_penalty`,
`stop_token_ids`, `ignore_eos`, `speculation`.
"""

from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator
from pydantic_core import PydanticCustomError

from gorgon_gateway.openai.errors import INCONSISTENT, UNSUPPORTED
from gorgon_protocol.requests import (
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_STOPS,
    Speculation,
    TokenId,
)

MAX_PROMPTS: Final = 128
DEFAULT_COMPLETION_TOKENS: Final = 16  # OpenAI's, of /v1/completions
_NOTHING: Final[tuple[Any, ...]] = (None, [], {}, False)

Text = Annotated[str, StringConstraints(max_length=200)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
CacheOptions = Annotated[dict[str, Text], Field(max_length=16)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]


def _inconsistent(param: str, message: str) -> PydanticCustomError:
    """The field is at odds with another one."""
    return PydanticCustomError(INCONSISTENT, message, {"param": param})


class _Strict(BaseModel):
    """Fields of `refused` may be there with a value that asks for nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {}  # field -> values that ask for nothing

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, harmless in cls.refused.items():
            # `in` alone would take 0 for False and 1.0 for 1.
            if name in data and not any(data[name] == value and type(data[name]) is type(value) for value in harmless):
                raise PydanticCustomError(UNSUPPORTED, "not supported by this server", {"param": name})
        return {name: value for name, value in data.items() if name not in cls.refused}


class TextPart(_Strict):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: CacheOptions | None = Field(default=None, description="accepted, changes nothing")


class ChatRequestMessage(_Strict):
    """`content` in parts is joined by line ends. `developer` is `system`."""

    refused = dict.fromkeys(
        ("name", "tool_calls", "tool_call_id", "function_call", "audio", "refusal", "annotations"), _NOTHING
    )

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class StreamOptions(_Strict):
    refused = {"include_obfuscation": (None, False)}

    include_usage: bool = False


class _Sampling(_Strict):
    """What both kinds of completions share. null = the default."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    max_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    temperature: float | None = Field(default=None, ge=0.0, le=2.0, description="null: 1")
    top_p: float | None = Field(default=None, ge=0.0, le=1.0, description="null: 1")
    n: int | None = Field(default=None, ge=1, le=128, description="answers to each prompt; null: 1")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = Field(
        default=None, description="the answer ends before it; more than OpenAI's four are taken"
    )
    seed: int | None = Field(
        default=None,
        ge=-(2**63),
        le=2**63 - 1,
        description="same seed, same answer; the first of n answers has it, the others have seeds derived from it",
    )
    presence_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]], Field(max_length=MAX_LOGIT_BIASES)] | None
    ) = Field(default=None, description="token id -> what is added to its logit")

    top_k: int | None = Field(default=None, ge=0, le=2**31 - 1, description="extension; 0 = all")
    min_p: float | None = Field(default=None, ge=0.0, le=1.0, description="extension")
    repetition_penalty: float | None = Field(default=None, gt=0.0, le=100.0, description="extension")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None = Field(
        default=None, description="extension"
    )
    ignore_eos: bool | None = Field(default=None, description="extension")
    speculation: Speculation | None = Field(default=None, description="extension: how to speculate")

    user: Text | None = Field(default=None, description="accepted, changes nothing")

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for token in value or ():
            if not (token.isascii() and token.isdigit() and len(token) <= 10):
                raise ValueError(f"is keyed by token ids: got {token[:40]!r}")
        return value

    @model_validator(mode="after")
    def _streamed(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise _inconsistent("stream_options", "needs stream: true")
        return self

    def sampling(self) -> dict[str, Any]:
        """Those of `gorgon_protocol.requests.Sampling` that are given, under its names; OpenAI's defaults for the
        others."""
        fields: dict[str, Any] = {
            # 0 keeps the likeliest token alone, and so does the smallest share that is one.
            "top_p": max(1e-9, 1.0 if self.top_p is None else self.top_p),
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "stop": [self.stop] if isinstance(self.stop, str) else self.stop,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self.logit_bias,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "stop_token_ids": self.stop_token_ids,
            "ignore_eos": self.ignore_eos,
            "speculation": self.speculation,
        }
        return {name: value for name, value in fields.items() if value is not None}


class ChatCompletionRequest(_Sampling):
    """`POST /v1/chat/completions`."""

    refused = {
        "tools": (None, []),
        "tool_choice": (None, "none", "auto"),
        "parallel_tool_calls": (None, True, False),
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
        "modalities": (None, ["text"]),
        "audio": (None,),
        "prediction": (None,),
        "reasoning_effort": (None, "none"),
        "verbosity": (None, "medium"),
        "web_search_options": (None,),
        "moderation": (None,),
        "response_format": (None, {"type": "text"}),
        "store": (None, False),
        "service_tier": (None, "auto", "default"),
    }

    messages: list[ChatRequestMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(
        default=None, ge=1, le=2**31 - 1, description="the newer name of max_tokens; null: up to the context's end"
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS, description="needs logprobs")

    metadata: Annotated[dict[str, str], Field(max_length=64)] | None = Field(
        default=None, description="accepted, changes nothing"
    )
    safety_identifier: Text | None = Field(default=None, description="accepted, changes nothing")
    prompt_cache_key: Text | None = Field(default=None, description="accepted, changes nothing")
    prompt_cache_options: CacheOptions | None = Field(default=None, description="accepted, changes nothing")
    prompt_cache_retention: Text | None = Field(default=None, description="accepted, changes nothing")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise _inconsistent("top_logprobs", "needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise _inconsistent("max_tokens", "differs from max_completion_tokens: give one of them")
        return self

    def sampling(self) -> dict[str, Any]:
        fields = super().sampling()
        max_tokens = self.max_completion_tokens or self.max_tokens
        if max_tokens is not None:
            fields["max_tokens"] = max_tokens
        if self.logprobs:
            fields["logprobs"] = self.top_logprobs or 0
        return fields


class CompletionRequest(_Sampling):
    """`POST /v1/completions`."""

    refused = {"echo": (None, False), "suffix": (None, ""), "best_of": (None, 1)}

    prompt: (
        Annotated[str, StringConstraints(min_length=1)]
        | TokenIds
        | Annotated[list[Annotated[str, StringConstraints(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS, description="with so many alternatives")

    @property
    def prompts(self) -> list[str | list[int]]:
        """One an answer (n answers, where n is given)."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]

    def sampling(self) -> dict[str, Any]:
        fields = super().sampling()
        fields["max_tokens"] = self.max_tokens or DEFAULT_COMPLETION_TOKENS
        if self.logprobs is not None:
            fields["logprobs"] = self.logprobs
        return fields
