"""Trees on a CPU: the drafters' guesses merged, and laid out breadth-first, in one call each.

`gorgon_engine.tree.tree` says what comes out, in tensor operations; the results are equal to the bit.

Letters: B sequences, M candidates (root not counted), N nodes (root counted), W words a node.
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gorgon_engine.kernels.cpu.library import NativeLibrary, check

_NODE_FIELDS = ("tokens", "parents", "log_probs", "ranks")


class ForestArgs(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_void_p) for name in (*_NODE_FIELDS, "draft_rows")), ("count", ctypes.c_int64))


class MergeArgs(ctypes.Structure):
    _fields_ = (
        ("forests", ctypes.POINTER(ForestArgs)),
        *((name, ctypes.c_int64) for name in ("num_forests", "batch", "max_depth", "keep")),
        *((name, ctypes.c_void_p) for name in (*_NODE_FIELDS, "sources", "draft_rows")),
    )


class FlattenArgs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "stride", "columns", "words")),
        *((name, ctypes.c_void_p) for name in ("root_tokens", "num_nodes")),
        *((name, ctypes.c_void_p) for name in (*_NODE_FIELDS, "sources", "draft_rows")),
        *((f"out_{name}", ctypes.c_void_p) for name in ("tokens", "parents", "depths", "ancestors", "log_probs")),
        *((f"out_{name}", ctypes.c_void_p) for name in ("ranks", "sources", "num_nodes", "draft_rows")),
    )


class Forest(Protocol):
    """One drafter's candidates, parents before children: a CandidateTree."""

    @property
    def tokens(self) -> Tensor: ...  # [B, M] int64
    @property
    def parents(self) -> Tensor: ...  # [B, M] int64, -1 = child of the root
    @property
    def log_probs(self) -> Tensor: ...  # [B, M] float32, -inf = padding
    @property
    def ranks(self) -> Tensor: ...  # [B, M] int64
    @property
    def draft_rows(self) -> Tensor | None: ...  # [B, M] int64


class Merged(NamedTuple):
    """The fields of a MergedCandidates that are computed: M is what was kept."""

    tokens: Tensor  # [B, M] int64
    parents: Tensor  # [B, M] int64
    log_probs: Tensor  # [B, M] float32
    ranks: Tensor  # [B, M] int64
    sources: Tensor  # [B, M] int64
    draft_rows: Tensor | None  # [B, M] int64


class Flat(NamedTuple):
    """The fields of a TreeBatch that are computed."""

    tokens: Tensor  # [B, N] int64
    parents: Tensor  # [B, N] int64
    depths: Tensor  # [B, N] int64
    ancestors: Tensor  # [B, N, W] int64
    log_probs: Tensor  # [B, N] float32
    ranks: Tensor  # [B, N] int64
    sources: Tensor  # [B, N] int64
    num_nodes: Tensor  # [B] int64
    draft_rows: Tensor | None  # [B, N] int64


def merge(library: NativeLibrary, forests: Sequence[Forest], *, max_nodes: int, max_depth: int, drawn: bool) -> Merged:
    """The best `max_nodes - 1` distinct paths of all forests, best first. drawn: with their draft_rows.

    Raises ValueError for forests of different batches, other dtypes, or a parent that does not precede its child.
    """
    batch = forests[0].tokens.shape[0]
    count = sum(forest.tokens.shape[1] for forest in forests)
    keep = min(max_nodes - 1, count)
    held: list[Tensor] = []  # what C++ reads has to live until it has
    described = (ForestArgs * len(forests))(*(_describe(forest, batch, drawn, held) for forest in forests))
    tokens, parents, ranks, sources, *draft_rows = torch.empty((5 if drawn else 4, batch, keep), dtype=torch.int64)
    log_probs = torch.empty((batch, keep))
    outputs = (tokens, parents, log_probs, ranks, sources, *draft_rows)
    arguments = MergeArgs(described, len(forests), batch, max_depth, keep, *(t.data_ptr() for t in outputs))
    if problem := library.handle.gorgon_merge_candidates(ctypes.byref(arguments)):
        raise ValueError(f"merging {count} candidates: {problem.decode()}")
    return Merged(tokens, parents, log_probs, ranks, sources, draft_rows[0] if drawn else None)


def _describe(forest: Forest, batch: int, drawn: bool, held: list[Tensor]) -> ForestArgs:
    shape = (batch, forest.tokens.shape[1])
    return ForestArgs(
        _address("tokens", forest.tokens, shape, held),
        _address("parents", forest.parents, shape, held),
        _address("log_probs", forest.log_probs, shape, held),
        _address("ranks", forest.ranks, shape, held),
        _address("draft_rows", forest.draft_rows if drawn else None, shape, held),
        shape[1],
    )


def _address(name: str, tensor: Tensor | None, shape: tuple[int, ...], held: list[Tensor]) -> int:
    """Of the tensor, or of a copy where it is a view with gaps (as one topology expanded over a batch); 0 for None."""
    if tensor is None:
        return 0
    dense = tensor.contiguous()
    held.append(dense)
    return check(name, dense, shape, torch.float32 if name == "log_probs" else torch.int64)


def flatten(
    library: NativeLibrary, root_tokens: Tensor, candidates: Merged, num_nodes: Tensor, *, columns: int
) -> Flat:
    """The tree of each sequence's root and the best `num_nodes[b] - 1` of its first `columns` candidates.

    root_tokens, num_nodes: [B] int64. columns: at most M. Raises ValueError for other shapes and dtypes, or a parent
    that does not precede its child.
    """
    batch, stride = candidates.tokens.shape
    width, words = columns + 1, columns // 64 + 1
    held: list[Tensor] = []
    inputs = (
        _address("root_tokens", root_tokens, (batch,), held),
        _address("num_nodes", num_nodes, (batch,), held),
        *(_address(name, getattr(candidates, name), (batch, stride), held) for name in Merged._fields),
    )
    drawn = candidates.draft_rows is not None
    nodes = torch.empty((6 if drawn else 5, batch, width), dtype=torch.int64)
    tokens, parents, depths, ranks, sources, *draft_rows = nodes
    ancestors = torch.empty((batch, width, words), dtype=torch.int64)
    log_probs = torch.empty((batch, width))
    kept = torch.empty(batch, dtype=torch.int64)
    outputs = (tokens, parents, depths, ancestors, log_probs, ranks, sources, kept, *draft_rows)
    arguments = FlattenArgs(batch, stride, columns, words, *inputs, *(t.data_ptr() for t in outputs))
    if problem := library.handle.gorgon_flatten(ctypes.byref(arguments)):
        raise ValueError(f"laying out trees of {width} nodes: {problem.decode()}")
    return Flat(tokens, parents, depths, ancestors, log_probs, ranks, sources, kept, draft_rows[0] if drawn else None)
