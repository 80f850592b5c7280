"""What the native drafts of all families share: the limits of the search, the trees that it fills, the vocabulary.

src/draft_search.h is the search; `drafters/beam.py` (the dynamic one) says in tensor operations what it finds.

Letters: B sequences, C hidden size, E tokens with an embedding, V tokens that can be drafted, M nodes of a tree.
"""

import ctypes
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gorgon_engine.kernels.cpu.library import check, describe

_EMBEDDING_DTYPES = (torch.float32, torch.bfloat16)


class VocabularyFields(ctypes.Structure):
    _fields_ = (
        ("embeddings", ctypes.c_void_p),
        ("num_embeddings", ctypes.c_int64),
        ("embeddings_are_bf16", ctypes.c_int64),
        ("drafted", ctypes.c_void_p),
    )


class LimitsFields(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_choices", "width", "max_nodes")),
        ("min_path_prob", ctypes.c_float),
    )


class TreesFields(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("tokens", "parents", "log_probs", "ranks"))


@dataclass(frozen=True, eq=False, slots=True)
class DraftVocabulary:
    """The backbone's embeddings, held and not copied, and the token of each output of the heads' projections."""

    embeddings: Tensor  # float32 or bfloat16 [E, C]
    drafted: Tensor | None  # int64 [V]; None: the output itself

    def check(self, hidden_size: int, vocab_size: int) -> None:
        """Raises ValueError where they do not fit each other, `hidden_size` or `vocab_size` outputs."""
        table, drafted = self.embeddings, self.drafted
        if table.dtype not in _EMBEDDING_DTYPES or table.ndim != 2:
            raise ValueError(f"embeddings must be float32 or bfloat16 [E, {hidden_size}], not {describe(table)}")
        check("embeddings", table, (table.shape[0], hidden_size), table.dtype)
        highest = vocab_size - 1
        if drafted is not None:
            check("vocabulary", drafted, (vocab_size,), torch.int64)
            highest = int(drafted.max())
            if int(drafted.min()) < 0:
                raise ValueError("vocabulary has a negative token")
        if highest >= table.shape[0]:
            raise ValueError(f"token {highest} can be drafted, but only {table.shape[0]} have embeddings")

    def fields(self) -> VocabularyFields:
        """For C++, which may use them as long as this lives."""
        return VocabularyFields(
            self.embeddings.data_ptr(),
            self.embeddings.shape[0],
            int(self.embeddings.dtype == torch.bfloat16),
            None if self.drafted is None else self.drafted.data_ptr(),
        )


def limits_fields(
    vocab_size: int, *, max_nodes: int, num_choices: int, width: int, min_path_prob: float
) -> LimitsFields:
    """For C++: `max_nodes` of a tree, the others as in `drafters.beam.BeamLimits`, of a search over `vocab_size`
    outputs. Raises ValueError for less than one of something."""
    if min(max_nodes, num_choices, width) < 1:
        raise ValueError(f"max_nodes {max_nodes}, num_choices {num_choices} and width {width} must be at least 1")
    return LimitsFields(min(num_choices, vocab_size), width, max_nodes, min_path_prob)


class DraftedTrees(NamedTuple):
    """The fields of a CandidateTree that are computed. Padding: token 0, parent -1, log-probability -inf, rank 0."""

    tokens: Tensor  # [B, M] int64
    parents: Tensor  # [B, M] int64
    log_probs: Tensor  # [B, M] float32
    ranks: Tensor  # [B, M] int64

    @classmethod
    def empty(cls, batch: int, max_nodes: int) -> "DraftedTrees":
        """To be filled."""
        tokens, parents, ranks = torch.empty((3, batch, max_nodes), dtype=torch.int64).unbind()
        return cls(tokens, parents, torch.empty((batch, max_nodes)), ranks)

    def fields(self) -> TreesFields:
        """For C++, which may use them as long as this lives."""
        return TreesFields(*(part.data_ptr() for part in self))
