"""The interface of a drafter: from a sequence's state to a set of guessed continuations.

Letters: B sequences, M candidate nodes, S history positions, E rows of a sequence, C hidden size.
"""

from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

from torch import Tensor

from gorgon_engine.tree.candidates import CandidateTree


@dataclass(frozen=True, slots=True)
class DraftContext:
    """What a drafter may look at. The root token is exact: the backbone itself gave it."""

    root_tokens: Tensor  # [B] int64, at position history_lengths - 1
    hidden: Tensor  # [B, C]: the backbone's hidden state at the position *before* the root, which predicted it
    history: Tensor  # [B, S] int64: prompt and output so far, the root last
    history_lengths: Tensor  # [B] int64, root included
    seeds: Tensor  # [B] int64, for drafters that draw
    slots: Tensor | None = None  # [B] int64, for drafters that remember something of every slot

    def select(self, rows: Tensor) -> "DraftContext":
        """The given rows [R] int64 only."""
        return DraftContext(
            root_tokens=self.root_tokens[rows],
            hidden=self.hidden[rows],
            history=self.history[rows],
            history_lengths=self.history_lengths[rows],
            seeds=self.seeds[rows],
            slots=None if self.slots is None else self.slots[rows],
        )


@dataclass(frozen=True, slots=True)
class Committed:
    """What has become certain of some sequences: consecutive positions, what the backbone made of them, what follows.

    Each position's pair is complete: the token behind the last one is the next root, which the backbone itself gave.
    """

    slots: Tensor  # [B] int64, each at most once
    starts: Tensor  # [B] int64: position of the first row
    hidden: Tensor  # [B, E, C]: the backbone's hidden states
    next_tokens: Tensor  # [B, E] int64: the token behind each position
    counts: Tensor  # [B] int64: rows past it are padding, of any content


class Drafter(Protocol):
    """Guesses continuations of the root. Pure tensor work on the context's device, of shapes fixed by (B, M)."""

    @property
    def name(self) -> str:
        """`head`, `lookup`, ...: the `source` of its nodes on the wire."""
        ...

    @property
    def is_costly(self) -> bool:
        """Whether it runs a network: what it costs is then weighed against what it brings."""
        ...

    def propose(self, context: DraftContext, max_nodes: int) -> CandidateTree:
        """Up to `max_nodes` candidates (the root not counted)."""
        ...


@runtime_checkable
class StatefulDrafter(Drafter, Protocol):
    """A drafter that remembers something of the sequence in every slot, and so has to be told what is committed.

    It is told of every position of a sequence once and in order, from the first on, or of none at all: sequences that
    do not speculate cost it nothing. What a slot held before is never forgotten by a call: a sequence's own positions
    overwrite it, and its length bounds what is read.
    """

    def for_slots(self, num_slots: int, num_positions: int) -> Self:
        """This drafter with a memory of its own, for positions 0 .. num_positions - 1 of slots 0 .. num_slots - 1."""
        ...

    def observe(self, committed: Committed) -> None:
        """Remember. Rows past a sequence's count may write to the positions that they stand for, if within range."""
        ...
