"""The course of a training run, as the report draws it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from gorgon_protocol.errors import DataError


@dataclass(frozen=True, slots=True)
class HistoryRecord:
    """One moment of a run: what training measured since the record before, and what was held out, where it was."""

    step: int  # optimizer steps so far
    num_positions: int  # trained on so far
    loss: float  # weighted sum of the heads' losses
    head_losses: tuple[float, ...]  # of the heads that are trained: one layer's later depths may not be
    learning_rate: float | None = None
    positions_per_second: float | None = None
    held_out_losses: tuple[float, ...] = ()
    held_out_acceptance_length: float | None = None  # predicted from the held-out accuracies

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """A line of a run's `history.jsonl`. Raises `DataError` for what is none."""
        held_out = record.get("held_out") or {}
        try:
            return cls(
                step=int(record["step"]),
                num_positions=int(record["num_positions"]),
                loss=float(record["loss"]),
                head_losses=tuple(map(float, record["head_losses"])),
                learning_rate=record.get("learning_rate"),
                positions_per_second=record.get("positions_per_second"),
                held_out_losses=tuple(map(float, held_out.get("losses", ()))),
                held_out_acceptance_length=held_out.get("acceptance_length"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"not a record of a training run: {error!r} in {dict(record)!r:.200}") from error


def last_held_out(history: Sequence[HistoryRecord]) -> HistoryRecord | None:
    """The last record with held-out losses."""
    return next((record for record in reversed(history) if record.held_out_losses), None)
