"""Reading prompts out of the files that people have: ShareGPT exports, JSON lines of many shapes, plain text.

Each reader streams, in bounded memory, and yields a record or says what is wrong with that piece of the file. Nothing
inside a file is fatal: exports are cut off, glued together and edited by hand.
"""

import bz2
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from gorgon_protocol.errors import DataError
from gorgon_trainer.data.records import ChatRecord, Message, Record, Role, TextRecord

SourceKind = Literal["sharegpt", "jsonl", "text"]

_CHUNK = 1 << 20  # characters
_MAX_CHARS = 1 << 24  # of one conversation, line or paragraph: more is no prompt, and must not fill the memory
_SPEAKERS: Mapping[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_OPENERS: Mapping[str, Callable[..., TextIO]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@dataclass(frozen=True, slots=True)
class Malformed:
    """A piece of a file that gave no record."""

    where: str  # "chats.json: conversation 12", "lines.jsonl:7"
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Source:
    """One file to take prompts from."""

    kind: SourceKind
    path: Path
    title: str | None = None  # what its records call it, the file's name unless given

    @property
    def name(self) -> str:
        return self.title or self.path.name

    def read(self) -> Iterator[Record | Malformed]:
        """Records in the file's order, answers included. Raises `DataError` where the file cannot be read."""
        reader = {"sharegpt": _read_sharegpt, "jsonl": _read_jsonl, "text": _read_text}[self.kind]
        try:
            with _open_text(self.path) as file:
                yield from reader(file, self)
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            yield Malformed(self.name, f"the compressed file is damaged or cut off: {error}")
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror or error}") from error


def parse_record(value: Any, source: str) -> Record:
    """A record out of one JSON value of any known shape; which, is told by its keys.

        {"conversations": [{"from": "human", "value": ...}, ...]}     {"messages": [{"role": "user", "content": ...}]}
        {"turns": ["...", ...]}     {"prompt": ..., "response"?: ...}     {"text": ...}

    What the assistant says before the first human turn is left out. Raises `ValueError` saying what does not fit.
    """
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    for key in ("conversations", "conversation", "messages"):
        if key in value:
            return _chat(_spoken(value[key], key), source)
    if "turns" in value:
        turns = value["turns"]
        if not isinstance(turns, list) or not turns:
            raise ValueError("turns is not a list of texts")
        return _chat([Message(role="user", content=_text(turn, "a turn")) for turn in turns], source)
    if "prompt" in value:
        if isinstance(value["prompt"], list):
            return _chat(_spoken(value["prompt"], "prompt"), source)
        messages = [Message(role="user", content=_text(value["prompt"], "prompt"))]
        if value.get("response") is not None:
            messages.append(Message(role="assistant", content=_text(value["response"], "response")))
        return _chat(messages, source)
    if "text" in value:
        return TextRecord.of(_text(value["text"], "text"), source)
    raise ValueError("none of the keys conversations, messages, turns, prompt, text")


def _spoken(turns: Any, key: str) -> list[Message]:
    if not isinstance(turns, list):
        raise ValueError(f"{key} is not a list")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError("a turn is not a JSON object")
        speaker = turn.get("from", turn.get("role"))
        if not isinstance(speaker, str) or speaker.casefold() not in _SPEAKERS:
            raise ValueError(f"a turn of unknown speaker {str(speaker)[:40]!r}")
        content = turn.get("value", turn.get("content"))
        if content == "":
            break  # what follows would answer something else
        messages.append(Message(role=_SPEAKERS[speaker.casefold()], content=_text(content, "a turn")))
    return messages


def _chat(messages: list[Message], source: str) -> ChatRecord:
    first = next((number for number, message in enumerate(messages) if message.role == "user"), None)
    if first is None:
        raise ValueError("no human turn")
    lead = [message for message in messages[:first] if message.role == "system"][:1]
    rest = messages[first:]
    if any(message.role == "system" for message in rest):
        raise ValueError("a system turn in the middle")
    return ChatRecord.of([*lead, *rest], source)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is not a text")
    if not value or value.isspace():
        raise ValueError(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds a lone surrogate") from error
    return value


def _read_jsonl(file: TextIO, source: Source) -> Iterator[Record | Malformed]:
    number = 0
    while line := file.readline(_MAX_CHARS):
        number += 1
        where = f"{source.name}:{number}"
        if len(line) == _MAX_CHARS and not line.endswith("\n"):
            while (more := file.readline(_MAX_CHARS)) and not more.endswith("\n"):
                continue
            yield Malformed(where, f"longer than {_MAX_CHARS} characters: one JSON array is for --sharegpt")
        elif not line.isspace():
            try:
                yield parse_record(json.loads(line.strip(), strict=False), source.name)
            except json.JSONDecodeError as error:
                yield Malformed(where, f"not valid JSON: {error.msg} at column {error.colno}")
            except (ValueError, RecursionError) as error:
                yield Malformed(where, str(error))


def _read_sharegpt(file: TextIO, source: Source) -> Iterator[Record | Malformed]:
    for number, value in enumerate(_json_values(file), 1):
        where = f"{source.name}: conversation {number}"
        if isinstance(value, _Broken):
            yield Malformed(where, value.reason)
            continue
        try:
            yield parse_record(value, source.name)
        except ValueError as error:
            yield Malformed(where, str(error))


def _read_text(file: TextIO, source: Source) -> Iterator[Record | Malformed]:
    """A document is a paragraph: what stands between blank lines."""
    lines: list[str] = []
    size = 0
    for line in iter(lambda: file.readline(_CHUNK), ""):
        if line.isspace():
            size = _MAX_CHARS
        else:
            lines.append(line)
            size += len(line)
        if size >= _MAX_CHARS:
            if lines:
                yield TextRecord.of("".join(lines).strip(), source.name)
            lines, size = [], 0
    if lines:
        yield TextRecord.of("".join(lines).strip(), source.name)


@dataclass(frozen=True, slots=True)
class _Broken:
    reason: str


_DECODER = json.JSONDecoder(strict=False)  # exports hold raw control characters
_BETWEEN = re.compile(r"[\s,\[\]]*")
# Where the next conversation begins, behind a broken one. Inside a JSON string the quotes would be escaped.
_BEGINNING = re.compile(r'(?<=\n)\{|\{\s*"(?:id|conversations?|messages|turns|prompt|text)"\s*:')
_NEAR_END = 64  # characters: longer than any number, literal or escape that the end of a chunk can cut in two


def _json_values(file: TextIO) -> Iterator[Any]:
    """The JSON values of a file one by one: the elements of arrays, lines, or values just put one after another.

    A value that is not JSON is given as `_Broken`, and reading goes on where the next one seems to begin.
    """
    buffer, position, is_end = "", 0, False
    lost = False  # looking for a beginning
    while True:
        if lost:
            found = _BEGINNING.search(buffer, position)
            # Without one, keep what may be the first half of it.
            position = found.start() if found else max(position, len(buffer) - _NEAR_END)
            lost = found is None and not is_end
            if found is None and is_end:
                return
        if not lost:
            position = _end_of(_BETWEEN, buffer, position)
            if position < len(buffer):
                try:
                    value, end = _DECODER.raw_decode(buffer, position)
                    if isinstance(value, str):
                        # The end of a text that the file begins in, up to the quotes of the next key: what lies between
                        # may hold the beginning of a conversation.
                        problem: str | None = "a text, not a JSON object"
                    else:
                        yield value
                        position = end
                        continue
                except (json.JSONDecodeError, RecursionError) as error:
                    problem = _problem(error, len(buffer), len(buffer) - position, is_end)
                if problem is not None:
                    yield _Broken(problem)
                    position, lost = position + 1, True
                    continue
            elif is_end:
                return
        # At least as much again as there is: a long value is not tried over and over.
        chunk = file.read(max(_CHUNK, len(buffer) - position))
        is_end = not chunk
        buffer, position = buffer[position:] + chunk, 0


def _problem(error: Exception, end: int, size: int, is_end: bool) -> str | None:
    """Why the value is broken, or None where more of the file may complete it."""
    if not isinstance(error, json.JSONDecodeError):
        return "nested too deeply"
    if error.msg.startswith("Unterminated string") or error.pos > end - _NEAR_END:
        if is_end:
            return f"cut off by the end of the file: {error.msg}"
        return None if size < _MAX_CHARS else f"longer than {_MAX_CHARS} characters"
    return f"not valid JSON: {error.msg}"


def _end_of(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position


def _open_text(path: Path) -> TextIO:
    suffix = path.suffix.lower()
    if suffix in (".zst", ".zip"):
        raise DataError(f"{path}: {suffix} files are not read: decompress it first, or make it a .gz")
    opener = _OPENERS.get(suffix, open)
    # Bytes that are not UTF-8 become U+FFFD, which the filters know.
    return opener(path, "rt", encoding="utf-8-sig", errors="replace")
