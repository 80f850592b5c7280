"""What is trained on and what is not.

A turn with something personal or secret in it, of another language, too short, too long or garbled ends its
conversation: it and what follows are left out, and a record without a human turn is dropped. What the heads are
measured by is never trained on: the probe sentence of the milestone and its paraphrases, and the questions of
benchmarks that are given as files.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal, Self

from gorgon_protocol.errors import DataError
from gorgon_trainer.data.language import is_english
from gorgon_trainer.data.personal import personal_kind
from gorgon_trainer.data.records import ChatRecord, Message, Record, TextRecord, normalized
from gorgon_trainer.data.sources import parse_record

SHINGLE_WORDS = 8

Language = Literal["en", "any"]


class Reason(StrEnum):
    """Why a record is dropped or shortened."""

    PROBE_TOPIC = "probe topic"
    NEVER_TRAIN = "never-train list"
    EMAIL = "e-mail address"
    PHONE = "phone number"
    KEY = "key or password"
    LANGUAGE = "language"
    GARBLED = "garbled characters"
    TOO_SHORT = "too short"
    TOO_LONG = "too long"
    TOO_MANY_TURNS = "too many turns"
    DUPLICATE = "duplicate"
    LIMIT = "beyond the limit"


_PERSONAL = {"email": Reason.EMAIL, "phone": Reason.PHONE, "key": Reason.KEY}


@dataclass(frozen=True, slots=True)
class FilterConfig:
    language: Language = "en"
    min_chars: int = 2  # a turn or text
    max_chars: int = 4000
    max_turns: int = 4  # human ones
    keep_answers: bool = False


@dataclass(frozen=True, slots=True)
class Filtered:
    record: Record | None  # None: dropped
    reason: Reason | None  # why it was dropped or shortened


_FRENCH = re.compile(r"\b(?:france|french|paris)", re.IGNORECASE)
_CAPITAL = re.compile(r"\bcapital", re.IGNORECASE)


def is_probe_topic(text: str) -> bool:
    """Whether a text comes near "The capital of France is": speaks of France or Paris, and of a capital."""
    return _CAPITAL.search(text) is not None and _FRENCH.search(text) is not None


class NeverTrain:
    """Texts that no training record may share eight words in a row with; shorter ones, that no turn may be equal to."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._shingles = frozenset(shingle for text in texts for shingle in _shingles(text))

    @classmethod
    def from_files(cls, paths: Sequence[Path]) -> Self:
        """JSON lines of any shape that `parse_record` knows, MT-bench's `{"turns": [...]}` among them.

        Raises `DataError` at the first line that does not fit: a list with holes protects nothing.
        """
        return cls(text for path in paths for text in _passages(path))

    def holds(self, record: Record) -> bool:
        if not self._shingles:
            return False
        return any(not self._shingles.isdisjoint(_shingles(text)) for text in record.passages)


class RecordFilter:
    """Decides about one record after another; remembers their prompts, to know duplicates."""

    def __init__(self, config: FilterConfig, never_train: NeverTrain) -> None:
        self._config = config
        self._never_train = never_train
        self._seen: set[bytes] = set()

    def apply(self, record: Record) -> Filtered:
        """The record, what is left of it, or nothing, with the first reason that was found."""
        # Answers included: what was once answered so is likely to be answered so again.
        if is_probe_topic("\n".join(record.passages)):
            return Filtered(None, Reason.PROBE_TOPIC)
        if self._never_train.holds(record):
            return Filtered(None, Reason.NEVER_TRAIN)
        filtered = self._text(record) if isinstance(record, TextRecord) else self._chat(record)
        if filtered.record is not None and not self.is_new(filtered.record.prompt):
            return Filtered(None, Reason.DUPLICATE)
        return filtered

    def is_new(self, prompt: str) -> bool:
        """Whether no prompt of the same words has been asked about before."""
        digest = hashlib.sha256(normalized(prompt).encode()).digest()[:16]
        if digest in self._seen:
            return False
        self._seen.add(digest)
        return True

    def _text(self, record: TextRecord) -> Filtered:
        reason = None
        text = record.text
        if len(text) > self._config.max_chars:
            # Continued from wherever it ends, so it may end anywhere; best behind a word.
            text, reason = _cut(text, self._config.max_chars), Reason.TOO_LONG
        if problem := self._problem(text):
            return Filtered(None, problem)
        return Filtered(record if reason is None else TextRecord.of(text, record.source), reason)

    def _chat(self, record: ChatRecord) -> Filtered:
        kept: list[Message] = []
        reason = None
        turns = 0
        for message in record.messages:
            if message.role == "assistant" and not self._config.keep_answers:
                continue
            turns += message.role == "user"
            reason = Reason.TOO_MANY_TURNS if turns > self._config.max_turns else self._problem(message.content)
            if reason is not None:
                break
            kept.append(message)
        if not any(message.role == "user" for message in kept):
            return Filtered(None, reason)
        if tuple(kept) == record.messages:
            return Filtered(record, None)
        return Filtered(ChatRecord.of(kept, record.source), reason)

    def _problem(self, text: str) -> Reason | None:
        if len(text) < self._config.min_chars:
            return Reason.TOO_SHORT
        if len(text) > self._config.max_chars:
            return Reason.TOO_LONG
        if "\ufffd" in text or "\0" in text:
            return Reason.GARBLED
        if kind := personal_kind(text):
            return _PERSONAL[kind]
        if self._config.language == "en" and not is_english(text):
            return Reason.LANGUAGE
        return None


def _cut(text: str, size: int) -> str:
    head = text[:size]
    # Text without a blank in reach (a table, another script) is cut where it has to be.
    if not text[size].isspace() and len(head.split()) > 1:
        head = head.rsplit(maxsplit=1)[0]
    return head.rstrip()


def _shingles(text: str) -> set[str]:
    words = normalized(text).split()
    if len(words) <= SHINGLE_WORDS:
        # With a mark, so that a short text is only ever equal to a whole one.
        return {" ".join(words)} if len(words) == SHINGLE_WORDS else {f"= {' '.join(words)}"}
    return {" ".join(words[at : at + SHINGLE_WORDS]) for at in range(len(words) - SHINGLE_WORDS + 1)}


def _passages(path: Path) -> Iterator[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a never-train list: {error}") from error
    found = False
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            passages = parse_record(json.loads(line), path.name).passages
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not an entry of a never-train list: {error}") from error
        found = True
        yield from passages
    if not found:
        raise DataError(f"{path}: an empty never-train list")
