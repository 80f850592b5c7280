"""What bytes each token stands for, so that text can be decoded as it comes, in constant time a token.

A tokenizer's decoder is a chain of small steps. For the two kinds that language models of the Llama family use, the
chain acts on each token alone, but for the beginning of the text:

    byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM):  every character of a token is one byte
    sentencepiece (Llama 2, Mistral, TinyLlama):    U+2581 is a space, <0xE2> a byte; one leading space is dropped
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from gorgon_protocol.errors import ModelError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Spelling:
    """Token -> bytes, for one decoder. Stateless: what a text's first token loses is for `TextStart` to know."""

    def __init__(self, decoder: Mapping[str, Any] | None) -> None:
        """decoder: as `tokenizer.json` describes it. Raises `ModelError` for one that cannot be followed."""
        self._replacements: list[tuple[str, str]] = []
        self._is_byte_level = False
        self._has_byte_tokens = False
        self.separator = b"" if decoder else b" "  # before a token; without a decoder, tokens are words
        self.first_token_drops = ""  # a character
        self.leading_character = b""  # what a text may lose at its beginning, up to `max_leading` times
        self.max_leading = 0
        is_fused = False
        for step in _steps(decoder):
            is_fused = self._add(step, is_fused)

    def spell(self, token: str) -> bytes:
        """The bytes of a token inside a text; they need not be whole characters."""
        if self._is_byte_level:
            try:
                return bytes(_BYTE_OF_CHARACTER[character] for character in token)
            except KeyError:
                return token.encode()  # an added token, spelt as it is
        for old, new in self._replacements:
            token = token.replace(old, new)
        if self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return self.separator + token.encode()

    def _add(self, step: Mapping[str, Any], is_fused: bool) -> bool:
        """Take up one step of the chain; returns whether tokens are joined from here on."""
        match step:
            case {"type": "ByteLevel"}:
                self._is_byte_level = True
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if not is_fused:
                self._replacements.append((old, new))
            case {"type": "Metaspace", "replacement": str(old)} if not is_fused:
                self._replacements.append((old, " "))
                if step.get("prepend_scheme", "always") != "never":
                    self.first_token_drops = old
            case {"type": "ByteFallback"}:
                self._has_byte_tokens = True
            case {"type": "Fuse"}:
                return True
            case {"type": "Strip", "content": str(content), "start": int(start), "stop": 0} if (
                is_fused and len(content.encode()) == 1
            ):
                self.leading_character, self.max_leading = content.encode(), start
            case _:
                raise ModelError(f"the tokenizer's decoder {json.dumps(step, ensure_ascii=False)} is not supported")
        return is_fused


class TextStart:
    """What the beginning of one text loses: the space that a tokenizer put there itself."""

    def __init__(self, spelling: Spelling) -> None:
        self._spelling = spelling
        self._is_first = True
        self._num_leading = spelling.max_leading

    def spell(self, token: str) -> bytes:
        """`Spelling.spell` of the next token of the text."""
        spelling = self._spelling
        if self._is_first:
            self._is_first = False
            if spelling.first_token_drops:
                token = token.replace(spelling.first_token_drops, "")
            piece = spelling.spell(token).removeprefix(spelling.separator)
        else:
            piece = spelling.spell(token)
        while self._num_leading and piece:
            if not piece.startswith(spelling.leading_character):
                self._num_leading = 0
                break
            piece = piece[1:]
            self._num_leading -= 1
        return piece


def _steps(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if decoder is None:
        return
    if decoder.get("type") != "Sequence":
        yield decoder
        return
    for step in decoder.get("decoders", ()):
        yield from _steps(step)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for characters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF_CHARACTER: Mapping[str, int] = _byte_of_character()
