"""The interface of a drafter: from a sequence's state to a set of guessed continuations.

Letters: B sequences, M candidate nodes, S history positions, C hidden size.
"""

from dataclasses import dataclass
from typing import Protocol

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


class Drafter(Protocol):
    """Guesses continuations of the root. Pure tensor work on the context's device, of shapes fixed by (B, M)."""

    @property
    def name(self) -> str:
        """`head`, `lookup`, ...: the `source` of its nodes on the wire."""
        ...

    def propose(self, context: DraftContext, max_nodes: int) -> CandidateTree:
        """Up to `max_nodes` candidates (the root not counted)."""
        ...
