"""The two kinds of completions: what differs in how a choice is written. Everything else is `router.py`'s.

A shape belongs to one choice of one answer and is told its messages in order.
"""

from typing import Any, ClassVar, Protocol

from gorgon_gateway.openai.logprobs import CompletionLogprobs, chat_logprobs


class Shape(Protocol):
    """How one choice is written, streamed or whole."""

    object_whole: ClassVar[str]
    object_chunk: ClassVar[str]
    id_prefix: ClassVar[str]

    def opening(self) -> dict[str, Any] | None:
        """The first chunk's choice, without index; None: there is none before the text."""

    def chunk(self, text: str, fields: dict[str, Any] | None) -> dict[str, Any]:
        """A chunk's choice, without index and finish_reason. fields: of a `TokenMessage` with log-probabilities."""

    def closing(self) -> dict[str, Any]:
        """The last chunk's choice, without index and finish_reason."""

    def whole(self, messages: list[dict[str, Any]], text: str) -> dict[str, Any]:
        """An answer's choice. messages: the `TokenMessage`s, for their log-probabilities; empty: not asked for."""


class ChatShape:
    object_whole: ClassVar[str] = "chat.completion"
    object_chunk: ClassVar[str] = "chat.completion.chunk"
    id_prefix: ClassVar[str] = "chatcmpl-"

    def opening(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def chunk(self, text: str, fields: dict[str, Any] | None) -> dict[str, Any]:
        return {"delta": {"content": text}, "logprobs": None if fields is None else self._logprobs([fields])}

    def closing(self) -> dict[str, Any]:
        return {"delta": {}, "logprobs": None}

    def whole(self, messages: list[dict[str, Any]], text: str) -> dict[str, Any]:
        return {
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(messages) if messages else None,
        }

    def _logprobs(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        content = [entry for fields in messages for entry in chat_logprobs(fields["logprobs"] or [])]
        return {"content": content, "refusal": None}


class CompletionShape:
    object_whole: ClassVar[str] = "text_completion"
    object_chunk: ClassVar[str] = "text_completion"
    id_prefix: ClassVar[str] = "cmpl-"

    def __init__(self, num_top_logprobs: int) -> None:
        self._logprobs = CompletionLogprobs(num_top_logprobs)

    def opening(self) -> dict[str, Any] | None:
        return None

    def chunk(self, text: str, fields: dict[str, Any] | None) -> dict[str, Any]:
        return {"text": text, "logprobs": None if fields is None else self._logprobs.take(fields)}

    def closing(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}

    def whole(self, messages: list[dict[str, Any]], text: str) -> dict[str, Any]:
        parts = [self._logprobs.take(fields) for fields in messages]
        if not parts:
            return {"text": text, "logprobs": None}
        joined = {
            name: None if parts[0][name] is None else [entry for part in parts for entry in part[name]]
            for name in parts[0]
        }
        return {"text": text, "logprobs": joined}
