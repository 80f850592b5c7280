"""Text to tokens and back, by the tokenizer and the chat template that a model folder brings.

`tokenizer.json` is taken as the truth, through the `tokenizers` library and without transformers' per-model classes:
those rebuild it by rules of their own and cost seconds to import. Folders without one (Llama 2's sentencepiece file
alone) are converted by transformers' `AutoTokenizer`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from gorgon_engine.spelling import Spelling
from gorgon_protocol.errors import BadRequestError, ModelError

ChatMessage = Mapping[str, str]  # role, content


class Tokenizer:
    """The tokenizer of one model. Immutable; safe to share between sequences."""

    def __init__(self, tokenizer: Any, folder: Path) -> None:
        """tokenizer: a transformers tokenizer with a `tokenizers` backend."""
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._folder = folder
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        decoder = self._backend.decoder
        try:
            self.spelling = Spelling(None if decoder is None else json.loads(decoder.__getstate__()))
        except ModelError as error:
            raise ModelError(f"{folder}: {error}") from error

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Raises `ModelError` where the folder has no tokenizer or one that cannot be read."""
        try:
            if (folder / "tokenizer.json").is_file():
                from transformers import PreTrainedTokenizerFast

                tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            elif any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json")):
                from transformers import AutoTokenizer

                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            else:
                raise ModelError(f"{folder}: no tokenizer.json and no tokenizer.model: the folder lacks a tokenizer")
        except ModelError:
            raise
        # What broken tokenizer files raise is not part of any contract: plain Exception among it, from Rust.
        except Exception as error:
            summary = str(error).strip().partition("\n")[0]
            raise ModelError(f"{folder}: the tokenizer cannot be read: {summary}") from error
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ModelError(f"{folder}: {type(tokenizer).__name__} has no fast form (tokenizer.json): not supported")
        return cls(tokenizer, folder)

    @property
    def vocab_size(self) -> int:
        """Added tokens included. The model's own vocabulary may be padded beyond it."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def bos_token_id(self) -> int | None:
        return self._id(self._tokenizer.bos_token_id)

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's own; the ids that end a generation are in the model's config."""
        return self._id(self._tokenizer.eos_token_id)

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Raises `BadRequestError` for text that cannot be UTF-8 (a lone surrogate out of a JSON escape)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRequestError(f"the text holds half a surrogate pair at character {error.start}") from error
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_chat(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True) -> list[int]:
        """The conversation as the model's chat template writes it, ready for the assistant's answer.

        Raises `BadRequestError` for a model without a template and for messages that the template refuses.
        """
        if not self.has_chat_template:
            raise BadRequestError(f"{self._folder}: the model has no chat template: give a plain prompt instead")
        for number, message in enumerate(messages):
            if not all(isinstance(message.get(key), str) for key in ("role", "content")):
                raise BadRequestError(f"message {number} needs a role and a content, both text")
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, ValueError, TypeError, IndexError, KeyError) as error:
            raise BadRequestError(f"the model's chat template refuses these messages: {error}") from error
        return self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of a whole answer. Never "cleaned up": spaces stay as the model wrote them."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special))

    def token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token, None for ids that the tokenizer does not know."""
        value = self._backend.id_to_token(token_id)
        return None if value is None else str(value)

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a mark of the model's format, which is left out of text."""
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds inside a text, in UTF-8; it need not be whole characters. Nothing for unknown ids."""
        token = self.token(token_id)
        return b"" if token is None else self.spelling.spell(token)

    def token_text(self, token_id: int) -> str:
        """One token for people to see, as it reads inside a text: leading space kept, part characters as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    @staticmethod
    def _id(value: Any) -> int | None:
        return None if value is None else int(value)
