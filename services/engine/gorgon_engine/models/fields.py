"""Typed reading of a foreign JSON object: every value is checked where it enters, every error names file and field."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gorgon_protocol.errors import ModelError

# No field of a real model comes near it; a larger one would overflow shapes before it failed clearly.
_MAX_INT = 2**31 - 1


class Fields:
    """The values of one JSON object. A `null` counts as absent, as it does for transformers' optional fields.

    Each reader takes the value to assume when the field is absent; without one, absence raises `ModelError`.
    """

    def __init__(self, values: Mapping[str, Any], source: Path | str) -> None:
        self._values = values
        self.source = source

    def get(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        return default if value is None else value

    def is_null(self, name: str) -> bool:
        """Whether the field is present and null, where that differs from being absent."""
        return name in self._values and self._values[name] is None

    def positive_int(self, name: str, default: int | None = None) -> int:
        return self._int(name, default, minimum=1)

    def non_negative_int(self, name: str, default: int | None = None) -> int:
        return self._int(name, default, minimum=0)

    def positive_float(self, name: str, default: float | None = None) -> float:
        value = self._required(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ModelError(f"{self.source}: {name} is {value!r}: expected a positive number")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ModelError(f"{self.source}: {name} is {value!r}: expected true or false")
        return value

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """One id, a list of ids or nothing. Ids outside the vocabulary are refused, -1 is an old way to say none."""
        value = self.get(name, ())
        ids = value if isinstance(value, list | tuple) else [value]
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not -1 <= token_id < vocab_size:
                raise ModelError(
                    f"{self.source}: {name} {token_id!r} is not a token id of a vocabulary of {vocab_size}"
                )
        return tuple(token_id for token_id in ids if token_id >= 0)

    def _required(self, name: str, default: Any) -> Any:
        value = self.get(name, default)
        if value is None:
            raise ModelError(f"{self.source}: {name} is missing")
        return value

    def _int(self, name: str, default: int | None, *, minimum: int) -> int:
        value = self._required(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= _MAX_INT:
            raise ModelError(f"{self.source}: {name} is {value!r}: expected an integer from {minimum}")
        return value
