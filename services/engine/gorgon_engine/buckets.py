"""The few sizes that steps are rounded up to where each size is a graph of its own.

Letters: B sequences, N rows a sequence.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

# Two sizes an octave: at most a third of the rows of a full batch is padding.
_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128)
# Of prompts. Products' tiles hold 64 rows: in between, filling up costs next to nothing.
PROMPT_WIDTHS = (16, 32, 64, 128, 192, 256, 384, 512)
# Kernels stop at each sequence's own length: the bound sets how many blocks begin and find nothing to do.
_FIRST_LENGTH, _LENGTH_FACTOR = 512, 4


@dataclass(frozen=True, slots=True)
class Buckets:
    """Ascending sizes; the last of each holds everything that the engine runs."""

    batches: tuple[int, ...]
    widths: tuple[int, ...]  # rows a sequence, root included
    lengths: tuple[int, ...]  # bounds of committed positions

    @classmethod
    def of(cls, *, num_slots: int, max_nodes: int, num_positions: int) -> "Buckets":
        """num_positions: of a slot."""
        lengths, length = [], _FIRST_LENGTH
        while length < num_positions:
            lengths.append(length)
            length *= _LENGTH_FACTOR
        return cls(_up_to(_BATCHES, num_slots), _up_to(_WIDTHS, max_nodes), (*lengths, num_positions))

    def batch(self, count: int) -> int:
        """Rows of state that a step of so many sequences runs."""
        return _at_least(self.batches, count)

    def width(self, count: int) -> int:
        """Rows of a tree that a step runs for a sequence of which so many are wanted."""
        return _at_least(self.widths, count)

    def length(self, count: int) -> int:
        """The bound of so many committed positions."""
        return _at_least(self.lengths, count)


def prompt_width(count: int) -> int:
    """Rows of a prompt that a pass runs where so many are wanted."""
    return _at_least(PROMPT_WIDTHS, count)


def _up_to(sizes: Sequence[int], last: int) -> tuple[int, ...]:
    return (*(size for size in sizes if size < last), last)


def _at_least(sizes: Sequence[int], count: int) -> int:
    assert count <= sizes[-1], f"{count} is beyond the largest of {sizes}"
    return sizes[bisect_left(sizes, count)]
