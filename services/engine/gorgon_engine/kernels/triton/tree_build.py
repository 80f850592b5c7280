"""The drafters' guesses merged, and the tree laid out breadth-first: one launch each, one program a sequence.

Merging closes a step, when the guesses are made; the layout opens the next, when the host has chosen the budget.
`gorgon_engine.tree.tree.merge_reference` and `flatten_reference` say what comes out, to the bit, padding included.

Nothing is sorted: a node's place is the number of nodes before it, counted in a matrix of comparisons. Ancestors are
found by pointer doubling: after r rounds a node knows all that lies less than 2^r above it.

Letters: B sequences, M candidates (root not counted), N nodes (root counted), W words a node.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gorgon_engine.kernels.cpu.trees import Flat, Forest, Merged

MAX_FORESTS = 3
MAX_CANDIDATES = 256  # of all forests
MAX_NODES = 128

# Odd 64-bit constants of splitmix64: token -> well-mixed integer, and the base of the polynomial path hash.
_MIX = tl.constexpr(-7046029254386353131)
_BASE = tl.constexpr(-4658895280553007687)
_CHUNK = 32  # columns of a matrix of comparisons that are held at once


@triton.jit
def _add_forest(  # type: ignore[no-untyped-def]
    held, pointers, strides, row, lane, SOURCE: tl.constexpr, START: tl.constexpr, COUNT: tl.constexpr
):
    """The candidates in lanes [M] with those of one forest put into its lanes."""
    tokens, parents, log_probs, ranks, sources = held
    inside = (lane >= START) & (lane < START + COUNT)
    at = lane - START
    parent = tl.load(pointers[1] + row * strides[1] + at, mask=inside, other=-1).to(tl.int32)
    tokens = tl.where(inside, tl.load(pointers[0] + row * strides[0] + at, mask=inside, other=0), tokens)
    parents = tl.where(inside & (parent >= 0), parent + START, parents)
    log_prob = tl.load(pointers[2] + row * strides[2] + at, mask=inside, other=float("-inf"))
    log_probs = tl.where(inside, log_prob, log_probs)
    ranks = tl.where(inside, tl.load(pointers[3] + row * strides[3] + at, mask=inside, other=0), ranks)
    sources = tl.where(inside, SOURCE, sources)
    return tokens, parents, log_probs, ranks, sources


@triton.jit
def _hash_paths(tokens, parents, ROUNDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A 64-bit hash of each candidate's token path, and its depth (root's children: 1)."""
    keys = (tokens + 1) * _MIX
    keys = keys ^ (keys >> 29)
    factors = tl.full(tokens.shape, _BASE, tl.int64)
    depths = tl.full(tokens.shape, 1, tl.int32)
    jump = parents
    for _ in tl.static_range(ROUNDS):
        above = tl.maximum(jump, 0)
        further = jump >= 0
        keys = tl.where(further, keys + factors * tl.gather(keys, above, 0), keys)
        factors = tl.where(further, factors * tl.gather(factors, above, 0), factors)
        depths = tl.where(further, depths + tl.gather(depths, above, 0), depths)
        jump = tl.where(further, tl.gather(jump, above, 0), jump)
    return keys, depths


@triton.jit
def _merge_kernel(  # type: ignore[no-untyped-def]
    forest_0, forest_1, forest_2, strides_0, strides_1, strides_2,
    tokens_ptr, parents_ptr, log_probs_ptr, ranks_ptr, sources_ptr, max_depth,
    COUNT_0: tl.constexpr, COUNT_1: tl.constexpr, COUNT_2: tl.constexpr, KEEP: tl.constexpr, ROUNDS: tl.constexpr,
    LANES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    num_candidates: tl.constexpr = COUNT_0 + COUNT_1 + COUNT_2
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    none = tl.zeros([LANES], tl.int32)
    held = (none.to(tl.int64), none - 1, none.to(tl.float32) - float("inf"), none.to(tl.int64), none)
    held = _add_forest(held, forest_0, strides_0, row, lane, 0, 0, COUNT_0)
    if COUNT_1 > 0:
        held = _add_forest(held, forest_1, strides_1, row, lane, 1, COUNT_0, COUNT_1)
    if COUNT_2 > 0:
        held = _add_forest(held, forest_2, strides_2, row, lane, 2, COUNT_0 + COUNT_1, COUNT_2)
    tokens, parents, log_probs, ranks, sources = held

    keys, depths = _hash_paths(tokens, parents, ROUNDS)
    # As a comparison that a NaN fails: it is padding too.
    real = (log_probs > float("-inf")) & (depths <= max_depth)
    log_probs = tl.where(real, log_probs, float("-inf"))
    # The first real candidate of each path and, there only, the best log-probability of all with that path.
    first = tl.full([LANES], num_candidates, tl.int32)
    joined = log_probs + float("-inf")
    for start in range(0, LANES, CHUNK):
        other = start + tl.arange(0, CHUNK)
        same = keys[:, None] == tl.gather(keys, other, 0)[None, :]
        same = same & (tl.gather(real.to(tl.int32), other, 0) != 0)[None, :]
        first = tl.minimum(first, tl.min(tl.where(same, other[None, :], num_candidates), 1))
        log_prob = tl.gather(log_probs, other, 0)[None, :]
        joined = tl.maximum(joined, tl.max(tl.where(same, log_prob, float("-inf")), 1))
    joined = tl.where(first == lane, joined, float("-inf"))

    # A parent precedes its children in the input, so it does among equals in the output.
    place = none
    for start in range(0, LANES, CHUNK):
        other = start + tl.arange(0, CHUNK)
        log_prob = tl.gather(joined, other, 0)[None, :]
        before = (log_prob > joined[:, None]) | ((log_prob == joined[:, None]) & (other[None, :] < lane[:, None]))
        place += tl.sum(before.to(tl.int32), 1)
    # A duplicate's children hang below the copy that was kept.
    kept_parent = tl.minimum(tl.gather(first, tl.maximum(parents, 0), 0), num_candidates - 1)
    parents = tl.where(parents < 0, -1, tl.gather(tl.minimum(place, KEEP), kept_parent, 0))

    # Lanes without a candidate come last of all.
    kept = place < KEEP
    at = row * KEEP + place
    tl.store(tokens_ptr + at, tokens, mask=kept)
    tl.store(parents_ptr + at, parents.to(tl.int64), mask=kept)
    tl.store(log_probs_ptr + at, joined, mask=kept)
    tl.store(ranks_ptr + at, ranks, mask=kept)
    tl.store(sources_ptr + at, sources.to(tl.int64), mask=kept)


def can_merge(forests: Sequence[Forest]) -> bool:
    """Whether these forests are within what the kernel holds."""
    return len(forests) <= MAX_FORESTS and sum(forest.tokens.shape[1] for forest in forests) <= MAX_CANDIDATES


def merge(forests: Sequence[Forest], *, max_nodes: int, max_depth: int) -> Merged:
    """The best `max_nodes - 1` distinct paths of all forests, best first."""
    assert can_merge(forests), [forest.tokens.shape for forest in forests]
    batch, device = forests[0].tokens.shape[0], forests[0].tokens.device
    counts = [forest.tokens.shape[1] for forest in forests]
    keep = min(max_nodes - 1, sum(counts))
    tokens, parents, ranks, sources = torch.empty((4, batch, keep), dtype=torch.int64, device=device)
    log_probs = torch.empty((batch, keep), dtype=torch.float32, device=device)
    columns = [_columns(forest) for forest in forests]
    missing = MAX_FORESTS - len(forests)
    columns += columns[:1] * missing  # of no candidates: never read
    counts += [0] * missing
    lanes = max(16, triton.next_power_of_2(sum(counts)))
    _merge_kernel[(batch,)](
        *columns, *(tuple(column.stride(0) for column in one) for one in columns),
        tokens, parents, log_probs, ranks, sources, max_depth,
        COUNT_0=counts[0], COUNT_1=counts[1], COUNT_2=counts[2], KEEP=keep, ROUNDS=max_depth.bit_length() + 1,
        LANES=lanes, CHUNK=min(_CHUNK, lanes), num_warps=8 if lanes > 128 else 4,
    )  # fmt: skip
    return Merged(tokens, parents, log_probs, ranks, sources, None)


def _columns(forest: Forest) -> tuple[Tensor, ...]:
    """What is read of a forest, its rows dense; the rows of a topology may be one row expanded over the batch."""
    assert forest.log_probs.dtype == torch.float32, forest.log_probs.dtype
    return tuple(
        column if column.stride(1) == 1 else column.contiguous()
        for column in (forest.tokens, forest.parents, forest.log_probs, forest.ranks)
    )


@triton.jit
def _flatten_kernel(  # type: ignore[no-untyped-def]
    root_tokens_ptr, num_nodes_ptr, tokens_ptr, parents_ptr, log_probs_ptr, ranks_ptr, sources_ptr,
    out_tokens_ptr, out_parents_ptr, out_depths_ptr, out_ancestors_ptr, out_log_probs_ptr, out_ranks_ptr,
    out_sources_ptr, out_num_nodes_ptr,
    stride, COLUMNS: tl.constexpr, NUM_WORDS: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    num_rows: tl.constexpr = COLUMNS + 1
    row = tl.program_id(0).to(tl.int64)
    node = tl.arange(0, LANES)
    at = row * stride + node - 1
    inside = (node > 0) & (node <= COLUMNS)
    log_probs = tl.load(log_probs_ptr + at, mask=inside, other=float("-inf"))
    is_guess = inside & (log_probs > float("-inf")) & (node < tl.load(num_nodes_ptr + row))
    real = is_guess | (node == 0)
    parents = tl.load(parents_ptr + at, mask=is_guess, other=-2).to(tl.int32) + 1

    depths = tl.where(parents >= 0, 1, 0)
    jump = parents
    for _ in tl.static_range(ROUNDS):
        above = tl.maximum(jump, 0)
        depths += tl.where(jump >= 0, tl.gather(depths, above, 0), 0)
        jump = tl.where(jump >= 0, tl.gather(jump, above, 0), -1)

    # Breadth-first, padding behind, then the lanes that are no rows; within a depth the best node first.
    level = tl.where(real, depths, tl.where(node < num_rows, num_rows, num_rows + 1))
    place = tl.zeros([LANES], tl.int32)
    for start in range(0, LANES, CHUNK):
        other = start + tl.arange(0, CHUNK)
        other_level = tl.gather(level, other, 0)[None, :]
        before = (other_level < level[:, None]) | ((other_level == level[:, None]) & (other[None, :] < node[:, None]))
        place += tl.sum(before.to(tl.int32), 1)

    parent_place = tl.where(parents >= 0, tl.gather(place, tl.maximum(parents, 0), 0), -1)
    one = tl.full([LANES], 1, tl.int64)
    own = one << (place % 64).to(tl.int64)
    low = tl.where(place < 64, own, 0)
    high = tl.where(place >= 64, own, 0)
    jump = parents
    for _ in tl.static_range(ROUNDS):
        above = tl.maximum(jump, 0)
        low = low | tl.where(jump >= 0, tl.gather(low, above, 0), 0)
        if NUM_WORDS > 1:
            high = high | tl.where(jump >= 0, tl.gather(high, above, 0), 0)
        jump = tl.where(jump >= 0, tl.gather(jump, above, 0), -1)

    is_row = node < num_rows
    to = row * num_rows + place
    root_token = tl.load(root_tokens_ptr + row)
    token = tl.load(tokens_ptr + at, mask=inside, other=0)
    tl.store(out_tokens_ptr + to, tl.where(node == 0, root_token, token), mask=is_row)
    tl.store(out_parents_ptr + to, parent_place.to(tl.int64), mask=is_row)
    tl.store(out_depths_ptr + to, depths.to(tl.int64), mask=is_row)
    tl.store(out_ancestors_ptr + to * NUM_WORDS, low, mask=is_row)
    if NUM_WORDS > 1:
        tl.store(out_ancestors_ptr + to * NUM_WORDS + 1, high, mask=is_row)
    tl.store(out_log_probs_ptr + to, tl.where(node == 0, 0.0, log_probs), mask=is_row)
    tl.store(out_ranks_ptr + to, tl.load(ranks_ptr + at, mask=inside, other=0), mask=is_row)
    tl.store(out_sources_ptr + to, tl.load(sources_ptr + at, mask=inside, other=0), mask=is_row)
    tl.store(out_num_nodes_ptr + row, tl.sum(real.to(tl.int64), 0))


def flatten(root_tokens: Tensor, candidates: Merged | None, num_nodes: Tensor, *, columns: int) -> Flat:
    """The tree of each sequence's root and the best `num_nodes[b] - 1` of its first `columns` candidates.

    root_tokens, num_nodes: [B] int64. candidates: dense rows, at least `columns` of them; None = the root alone, and
    `columns` 0.
    """
    batch, device = root_tokens.shape[0], root_tokens.device
    width = columns + 1
    num_words = (width + 63) // 64
    assert width <= MAX_NODES, width
    assert root_tokens.dtype == num_nodes.dtype == torch.int64, (root_tokens.dtype, num_nodes.dtype)
    if candidates is None:
        assert columns == 0, columns
        inputs: tuple[Tensor, ...] = (root_tokens, root_tokens, root_tokens.view(torch.float32), *(root_tokens,) * 2)
    else:
        assert columns <= candidates.tokens.shape[1], (columns, candidates.tokens.shape)
        assert candidates.draft_rows is None, "drawn candidates keep their rows: tensor operations do that"
        inputs = tuple(column.contiguous() for column in candidates if column is not None)
    stride = 0 if candidates is None else candidates.tokens.shape[1]
    tokens, parents, depths, ranks, sources = torch.empty((5, batch, width), dtype=torch.int64, device=device)
    ancestors = torch.empty((batch, width, num_words), dtype=torch.int64, device=device)
    log_probs = torch.empty((batch, width), dtype=torch.float32, device=device)
    kept = torch.empty(batch, dtype=torch.int64, device=device)
    lanes = max(16, triton.next_power_of_2(width))
    _flatten_kernel[(batch,)](
        root_tokens.contiguous(), num_nodes.contiguous(), *inputs, tokens, parents, depths, ancestors, log_probs,
        ranks, sources, kept, stride,
        COLUMNS=columns, NUM_WORDS=num_words, LANES=lanes, CHUNK=min(_CHUNK, lanes),
        ROUNDS=columns.bit_length(), num_warps=4 if lanes > 64 else 1,
    )  # fmt: skip
    return Flat(tokens, parents, depths, ancestors, log_probs, ranks, sources, kept, None)
