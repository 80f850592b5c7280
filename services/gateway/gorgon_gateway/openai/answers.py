"""What OpenAI's clients get: whole answers, as models. Streamed chunks have the same fields (`chat.py`,
`completions.py`)."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gorgon_protocol.messages import GenerationMetrics
from gorgon_protocol.metrics import Usage

FinishReason = Literal["stop", "length"]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ChoiceDetails(_Answer):
    """This server's own words on one generation."""

    index: int
    seed: int
    stop: str | int | None = Field(description="the stop string or token that ended it")
    metrics: GenerationMetrics


class GorgonFields(_Answer):
    """Extension. `seed`, `stop` and `metrics` are those of the answer; of several answers they are in `choices`."""

    request_id: str
    seed: int | None = None
    stop: str | int | None = None
    metrics: GenerationMetrics | None = None
    choices: list[ChoiceDetails] | None = None


class ChatTopLogprob(_Answer):
    token: str
    logprob: float
    bytes: list[int] | None = Field(description="null where the token is a part of a character")


class ChatTokenLogprob(ChatTopLogprob):
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(_Answer):
    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatAnswer(_Answer):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(_Answer):
    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class CompletionLogprobs(_Answer):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(_Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class _Completion(_Answer):
    id: str
    created: int
    model: str
    system_fingerprint: str = Field(description="of the backbone and the draft heads")
    usage: Usage
    gorgon: GorgonFields


class ChatCompletion(_Completion):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class Completion(_Completion):
    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class Model(_Answer):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["gorgon"] = "gorgon"
    gorgon: dict[str, Any] = Field(description="extension: backbone identity, context, draft heads")


class ModelList(_Answer):
    object: Literal["list"] = "list"
    data: list[Model]
