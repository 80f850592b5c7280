"""Records: the prompts that the backbone answers, one JSON object a line.

    {"id": "<32 hex digits>", "kind": "chat", "messages": [{"role": "user", "content": "..."}, ...], "source": "..."}
    {"id": "<32 hex digits>", "kind": "text", "text": "...", "source": "..."}

A chat is asked through the backbone's chat template, turn by turn; a text is continued as it is. The id is the start of
the SHA-256 over the content, without the source: equal prompts have equal ids wherever they come from.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from gorgon_protocol.errors import DataError

Role = Literal["system", "user", "assistant"]

_WORD = re.compile(r"\w+")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Message(_Strict):
    role: Role
    content: str = Field(min_length=1)


class ChatRecord(_Strict):
    id: str
    kind: Literal["chat"] = "chat"
    messages: Annotated[tuple[Message, ...], Field(min_length=1, strict=False)]
    source: str

    @classmethod
    def of(cls, messages: Sequence[Message], source: str) -> Self:
        return cls(id=_chat_id(messages), messages=tuple(messages), source=source)

    @property
    def prompt(self) -> str:
        """The first human turn."""
        return next(message.content for message in self.messages if message.role == "user")

    @property
    def human_turns(self) -> tuple[str, ...]:
        return tuple(message.content for message in self.messages if message.role == "user")

    @property
    def passages(self) -> tuple[str, ...]:
        """All that is said in it, turn by turn."""
        return tuple(message.content for message in self.messages)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not any(message.role == "user" for message in self.messages):
            raise ValueError("no human turn")
        if self.id != _chat_id(self.messages):
            raise ValueError("the id is of other content")
        return self


class TextRecord(_Strict):
    id: str
    kind: Literal["text"] = "text"
    text: str = Field(min_length=1)
    source: str

    @classmethod
    def of(cls, text: str, source: str) -> Self:
        return cls(id=_text_id(text), text=text, source=source)

    @property
    def prompt(self) -> str:
        return self.text

    @property
    def passages(self) -> tuple[str, ...]:
        return (self.text,)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.id != _text_id(self.text):
            raise ValueError("the id is of other content")
        return self


Record = ChatRecord | TextRecord

_ADAPTER: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="kind")])


def normalized(text: str) -> str:
    """The words of a text in one plain spelling, a space between two: what duplicates and splits are told by."""
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file that `gorgon train data` wrote. Raises `DataError` naming file and line."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield _ADAPTER.validate_json(line)
                except ValidationError as error:
                    first = error.errors(include_url=False)[0]
                    where = ".".join(map(str, first["loc"]))
                    what = first["msg"].removeprefix("Value error, ")
                    raise DataError(f"{path}:{number}: {f'{where}: ' if where else ''}{what}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def to_line(record: Record) -> bytes:
    return record.model_dump_json().encode() + b"\n"


def _chat_id(messages: Sequence[Message]) -> str:
    return _digest([[message.role, message.content] for message in messages])


def _text_id(text: str) -> str:
    return _digest(text)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
