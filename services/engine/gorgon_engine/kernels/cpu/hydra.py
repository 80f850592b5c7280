"""Drafting with Hydra heads in one native call: the heads, the search below the root and the tree at its end.

`drafters/hydra.py` (the dynamic search) and `heads/hydra.py` say in tensor operations what comes out. The tree is the
same up to the rounding of SiLU, norms and sums. A sequence's result depends on that sequence only, to the bit, whatever
the others, their order and the number of threads.

Letters: B sequences, C hidden size, V tokens that can be drafted, M nodes of a tree.
"""

import ctypes
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gorgon_engine.kernels.cpu.draft_search import (
    DraftedTrees,
    DraftVocabulary,
    LimitsFields,
    TreesFields,
    VocabularyFields,
    limits_fields,
)
from gorgon_engine.kernels.cpu.library import PackedLinear, PackedMatrix, check, gather_in_arena


class HydraHeadWeights(ctypes.Structure):
    _fields_ = (
        ("input", ctypes.POINTER(PackedMatrix)),
        ("residual", ctypes.POINTER(PackedMatrix)),
        ("blocks", ctypes.POINTER(ctypes.POINTER(PackedMatrix))),
        ("projection", ctypes.POINTER(PackedMatrix)),
    )


class HydraConfig(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("hidden_size", "num_heads", "num_blocks")),
        ("heads", ctypes.POINTER(HydraHeadWeights)),
        ("norm", ctypes.c_void_p),
        ("rms_norm_eps", ctypes.c_float),
        ("vocabulary", VocabularyFields),
    )


class HydraArgs(ctypes.Structure):
    _fields_ = (
        ("batch", ctypes.c_int64),
        ("hidden", ctypes.c_void_p),
        ("root_tokens", ctypes.c_void_p),
        ("limits", LimitsFields),
        ("out", TreesFields),
    )


@dataclass(frozen=True, eq=False, slots=True)
class NativeHydraHead:
    """The head of one depth, counted from 1."""

    input: PackedLinear  # [C, (1 + depth) C]
    residual: PackedLinear | None  # as input; None: the hidden state itself
    blocks: tuple[PackedLinear, ...]  # each [C, C], as many in every head
    projection: PackedLinear  # [V, C], shared or the head's own

    def linears(self) -> list[PackedLinear]:
        """In the order of use."""
        matrices = (self.input, self.residual, *self.blocks, self.projection)
        return [linear for linear in matrices if linear is not None]


class NativeHydra:
    """Hydra heads and what they read. It owns its workspace, so drafts run one at a time (a lock sees to it)."""

    def __init__(
        self,
        heads: Sequence[NativeHydraHead],
        *,
        norm: Tensor | None,
        norm_eps: float,
        embeddings: Tensor,
        vocabulary: Tensor | None,
    ) -> None:
        """norm: float32 [C], the gain before the projection, of heads whose inputs are normalised; None: of others.

        embeddings: the backbone's, float32 or bfloat16 [E, C], held and not copied. vocabulary: int64 [V], the token of
        each row of the projections; None: the row itself. Raises ValueError for what does not fit together.
        """
        if not heads:
            raise ValueError("there must be at least one head")
        self._heads = tuple(heads)
        self._norm = norm
        self._vocabulary = DraftVocabulary(embeddings, vocabulary)
        self.hidden_size = self._heads[0].input.out_features
        self.vocab_size = self._heads[0].projection.out_features
        self._check()
        self._library = self._heads[0].input.library
        self._arena = gather_in_arena([linear for head in self._heads for linear in head.linears()], self._library)
        self._lock = threading.Lock()
        described = (HydraHeadWeights * len(self._heads))(*(_describe_head(head) for head in self._heads))
        config = HydraConfig(
            self.hidden_size,
            len(self._heads),
            len(self._heads[0].blocks),
            described,
            None if norm is None else norm.data_ptr(),
            norm_eps,
            self._vocabulary.fields(),
        )
        handle = self._library.handle.gorgon_hydra_create(ctypes.byref(config))
        if not handle:
            raise MemoryError("no memory for the native heads")
        self._handle = ctypes.c_void_p(handle)
        weakref.finalize(self, self._library.handle.gorgon_hydra_destroy, self._handle)

    def _check(self) -> None:
        size, num_blocks = self.hidden_size, len(self._heads[0].blocks)
        for depth, head in enumerate(self._heads, start=1):
            if len(head.blocks) != num_blocks:
                raise ValueError(f"head {depth}: {len(head.blocks)} blocks where the first head has {num_blocks}")
            expected = [
                (head.input, size, (1 + depth) * size),
                (head.residual, size, (1 + depth) * size),
                *((block, size, size) for block in head.blocks),
                (head.projection, self.vocab_size, size),
            ]
            for linear, rows, columns in expected:
                if linear is not None and (linear.out_features, linear.in_features) != (rows, columns):
                    actual = [linear.out_features, linear.in_features]
                    raise ValueError(f"head {depth}: a matrix must be {[rows, columns]}, not {actual}")
            if head.residual is not None and head.residual.kind != head.input.kind:
                raise ValueError(f"head {depth}: residual is {head.residual.kind}, input {head.input.kind}")
        if self._norm is not None:
            check("norm", self._norm, (size,), torch.float32)
        self._vocabulary.check(size, self.vocab_size)

    def draft(
        self,
        hidden: Tensor,
        root_tokens: Tensor,
        *,
        max_nodes: int,
        num_choices: int,
        width: int,
        min_path_prob: float,
    ) -> DraftedTrees:
        """The `max_nodes` likeliest paths below each root, as far as the search finds that many.

        hidden: float32 [B, C]; root_tokens: int64 [B]. num_choices, width and min_path_prob: as in
        `drafters.beam.BeamLimits`. Raises ValueError for other shapes and dtypes or a root without an embedding.
        """
        limits = limits_fields(
            self.vocab_size, max_nodes=max_nodes, num_choices=num_choices, width=width, min_path_prob=min_path_prob
        )
        batch = root_tokens.shape[0] if root_tokens.ndim else 0
        trees = DraftedTrees.empty(batch, max_nodes)
        args = HydraArgs(
            batch,
            check("hidden", hidden, (batch, self.hidden_size), torch.float32),
            check("root_tokens", root_tokens, (batch,), torch.int64),
            limits,
            trees.fields(),
        )
        with self._lock:
            problem = self._library.handle.gorgon_hydra_draft(self._handle, ctypes.byref(args))
        if problem is not None:
            raise ValueError(problem.decode())
        return trees


def _describe_head(head: NativeHydraHead) -> HydraHeadWeights:
    blocks = (ctypes.POINTER(PackedMatrix) * len(head.blocks))(*(ctypes.pointer(block.matrix) for block in head.blocks))
    return HydraHeadWeights(
        ctypes.pointer(head.input.matrix),
        None if head.residual is None else ctypes.pointer(head.residual.matrix),
        blocks,
        ctypes.pointer(head.projection.matrix),
    )
