"""Prompts to measure with: MT-bench's questions, or the trainer's own records; first turns only."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from gorgon_engine.tokenizer import ChatMessage, Tokenizer
from gorgon_protocol.errors import BadRequestError, DataError


@dataclass(frozen=True, slots=True)
class EvaluationPrompt:
    """A text to continue, or chat messages of which the last is the user's."""

    where: str  # file and line, for errors
    content: str | tuple[ChatMessage, ...]

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """Its tokens, through the model's chat template for messages. Raises `BadRequestError` naming its line."""
        try:
            if isinstance(self.content, str):
                return tokenizer.encode(self.content)
            return tokenizer.encode_chat(self.content)
        except BadRequestError as error:
            raise BadRequestError(f"{self.where}: {error}") from None


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[EvaluationPrompt], *, max_tokens: int | None = None
) -> list[tuple[str, list[int]]]:
    """(where, tokens) of the prompts, without those of more than `max_tokens`.

    Raises `BadRequestError` for a prompt that the chat template refuses, and where none is left.
    """
    encoded = [(prompt.where, prompt.encode(tokenizer)) for prompt in prompts]
    kept = [(where, tokens) for where, tokens in encoded if max_tokens is None or len(tokens) <= max_tokens]
    if not kept:
        raise BadRequestError(f"none of {len(prompts)} prompts has at most {max_tokens} tokens")
    return kept


def read_prompts(path: Path, *, limit: int | None = None) -> list[EvaluationPrompt]:
    """The prompts of a JSONL file, one a line, the first `limit` of them.

    A line is {"turns": [str, ...]} (MT-bench: the first turn is asked), {"messages": [...]} (up to the first message of
    the user), {"text": str} or {"prompt": str} (continued). A file is read whole or not at all, since figures of a part
    of it would not compare: raises `DataError` for the first line that is none of these, and for no prompts at all.
    """
    prompts = []
    try:
        with path.open(encoding="utf-8") as file:
            lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
            for number, line in islice(lines, limit):
                prompts.append(_prompt(f"{path}, line {number}", line))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: convert it first") from error
    if not prompts:
        raise DataError(f"{path}: holds no prompts")
    return prompts


def _prompt(where: str, line: str) -> EvaluationPrompt:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    match entry:
        case {"turns": [str(first), *_]}:
            return EvaluationPrompt(where, ({"role": "user", "content": first},))
        case {"messages": [*messages]}:
            return EvaluationPrompt(where, _first_turn(where, messages))
        case {"text": str(text)} | {"prompt": str(text)}:
            return EvaluationPrompt(where, text)
    raise DataError(f'{where}: has none of a list "turns", a list "messages", a text "text" and a text "prompt"')


def _first_turn(where: str, messages: list[Any]) -> tuple[ChatMessage, ...]:
    turn: list[ChatMessage] = []
    for message in messages:
        match message:
            case {"role": str(role), "content": str(content)}:
                turn.append({"role": role, "content": content})
            case _:
                raise DataError(f"{where}: message {len(turn)} needs a role and a content, both text")
        if role == "user":
            return tuple(turn)
    raise DataError(f"{where}: no message of the user")
