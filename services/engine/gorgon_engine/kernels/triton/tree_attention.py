"""Tree attention: every node attends to its sequence's committed prefix and to its own ancestors in the tree.

    out[b, n, h] = softmax(q[b, n, h] . K^T * D^-1/2) V    over the prefix, positions < lengths[b] of the slot, and over
                                                           the rows lengths[b] + j of it whose bit j node n has set

A node with c bits set stands at the logical position p = lengths[b] + c - 1 of its sequence. Its last `tail` positions
(p - tail + 1 .. p) and all before them are summed apart:

1. *Prefix.* Positions before the tail lie in the committed prefix, where storage order is logical order. The query
   heads of a KV head are packed into the rows of tensor core products (row = node * group + head), blocks of 64
   positions go through an online softmax (1805.02867; FlashAttention 2205.14135), units of blocks to programs of their
   own (Flash-Decoding's split). A row whose tail has begun is masked: it adds exact zeros. No tree mask is needed.
2. *Tail and fold.* One program a node and KV head gathers the node's tail, committed positions and ancestors alike,
   into logical order, and folds the partial sums and the tail in order. With programmatic dependent launch the tail
   is done while the prefix is still being summed.

Row-invariance: what is summed in which order follows from p alone. A token gives the same bits as a node of a tree of
any shape and when decoded plainly, if the tree is no deeper than the tail is long (deeper ones are right, but not
bit-equal) and every call has the same unit size. It costs the gather, tail * D * 4 bytes for each node and KV head, and
the fixed cut of the prefix. Masks and ragged lengths: SpecInfer 2305.09781, Medusa 2401.10774; grouped queries
2305.13245; sharing a KV head's reads between rows: DeFT 2404.00242.

Letters: B sequences, N nodes, H query heads, G KV heads, D head dimension, S slots, P positions, W words a node.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from gorgon_engine.kernels.triton.tree_attention_plan import (
    BLOCK_COLUMNS,
    TreeAttentionPlan,
    TreeAttentionWorkspace,
    check_dtype,
    pack_tree_mask,
)

# A power of two whose products stay exact: a row whose block is wholly masked gives finite numbers, never NaN.
_MASKED = tl.constexpr(-(2.0**99))
_NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def _popcount(word):  # type: ignore[no-untyped-def]
    """Bits set in int64 words, by adding neighbours; the shifted-in sign bits are masked away each time."""
    word = (word & 0x5555555555555555) + ((word >> 1) & 0x5555555555555555)
    word = (word & 0x3333333333333333) + ((word >> 2) & 0x3333333333333333)
    word = (word & 0x0F0F0F0F0F0F0F0F) + ((word >> 4) & 0x0F0F0F0F0F0F0F0F)
    word += word >> 8
    word += word >> 16
    word += word >> 32
    return (word & 0xFF).to(tl.int32)


@triton.jit
def _unit_start(unit, unit_size, GROWING: tl.constexpr):  # type: ignore[no-untyped-def]
    start = unit * unit_size
    if GROWING:
        start = tl.where(unit > 8, start + (unit - 8) * unit_size, start)
        start = tl.where(unit > 12, start + (unit - 12) * 2 * unit_size, start)
    return start


@triton.jit
def _num_units(limit, unit_size, GROWING: tl.constexpr):  # type: ignore[no-untyped-def]
    """Units that hold the positions below `limit`."""
    count = (limit + unit_size - 1) // unit_size
    if GROWING:
        late = tl.maximum(limit - 8 * unit_size, 0)
        later = tl.maximum(limit - 16 * unit_size, 0)
        grown = 8 + (late + 2 * unit_size - 1) // (2 * unit_size)
        grown = tl.where(later > 0, 12 + (later + 4 * unit_size - 1) // (4 * unit_size), grown)
        count = tl.where(late > 0, grown, count)
    return count


@triton.jit
def _fold(best, total, out, part_best, part_total, part_out):  # type: ignore[no-untyped-def]
    """Two partial softmax sums as one. Both kernels fold: an explicit fma leaves no choice of rounding."""
    new_best = tl.maximum(best, part_best)
    keep = tl.exp2(best - new_best)
    weight = tl.exp2(part_best - new_best)
    total = tl.fma(total, keep, part_total * weight)
    out = tl.fma(out, tl.broadcast_to(keep[:, None], out.shape), part_out * weight[:, None])
    return new_best, total, out


@triton.jit
def _sum_unit(  # type: ignore[no-untyped-def]
    query, keys, values, base, first, last, limits, lowest, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The positions first..last of one unit: query [M, D] -> best [M], total [M], out [M, D]."""
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, HEAD_DIM)
    best = tl.full([BLOCK_M], _NOTHING, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        if DESCRIPTORS:
            # A block may reach past the slot's end, into another's rows: masked in the scores.
            key = keys.load([(base + start).to(tl.int32), 0])
        else:
            at = (base + start + columns)[:, None] * HEAD_DIM + dims[None, :]
            inside = (start + columns < last)[:, None]
            key = tl.load(keys + at, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key)) * scale_log2
        if start + BLOCK_N > lowest:
            scores = tl.where((start + columns)[None, :] < limits[:, None], scores, _MASKED)
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - new_best[:, None])
        keep = tl.exp2(best - new_best)
        total = total * keep + tl.sum(weights, 1)
        out = out * keep[:, None]
        if DESCRIPTORS:
            value = values.load([(base + start).to(tl.int32), 0])
        else:
            value = tl.load(values + at, mask=inside, other=0.0)
        out = tl.dot(weights.to(value.dtype), value, out)
        best = new_best
    return best, total, out


@triton.jit(do_not_specialize=["num_nodes", "num_positions", "num_parts", "unit_size", "words_stride"])
def _prefix_kernel(  # type: ignore[no-untyped-def]
    query_ptr, keys, values, slots_ptr, lengths_ptr, ancestors_ptr, outs_ptr, bests_ptr, totals_ptr,
    scale_log2, num_nodes, num_positions, num_parts, unit_size, words_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROWING: tl.constexpr, TAIL: tl.constexpr,
    WHOLE: tl.constexpr, STAGES: tl.constexpr, DESCRIPTORS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    group: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()  # behind the wait: the next kernel reads queries and keys at once
    tile = tl.program_id(0)
    part = num_parts - 1 - tl.program_id(1)  # large units first
    sequence = tl.program_id(2) // NUM_KV_HEADS
    kv_head = tl.program_id(2) % NUM_KV_HEADS
    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    first_unit = 0 if WHOLE else part
    if _unit_start(first_unit, unit_size, GROWING) >= length:
        return
    slot = tl.load(slots_ptr + sequence).to(tl.int64)

    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    node = packed // group
    real = node < num_nodes
    row = sequence.to(tl.int64) * num_nodes + node
    words_ptr = ancestors_ptr + sequence.to(tl.int64) * words_stride + node * NUM_WORDS
    num_seen = tl.zeros([BLOCK_M], tl.int32)
    for word in tl.static_range(NUM_WORDS):
        num_seen += _popcount(tl.load(words_ptr + word, mask=real, other=0))
    # Where a row's tail begins: a row past the last has nothing to sum, and masks nobody's block.
    limits = tl.maximum(tl.minimum(length, length + num_seen - TAIL), 0)
    highest = tl.max(tl.where(real, limits, 0), 0)
    lowest = tl.min(tl.where(real, limits, length), 0)

    dims = tl.arange(0, HEAD_DIM)
    head = kv_head * group + packed % group
    query_at = (row * NUM_HEADS + head)[:, None] * HEAD_DIM + dims[None, :]
    query = tl.load(query_ptr + query_at, mask=real[:, None], other=0.0)
    base = (slot * NUM_KV_HEADS + kv_head) * num_positions

    if WHOLE:
        best = tl.full([BLOCK_M], _MASKED, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        out = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
        for unit in range(0, _num_units(highest, unit_size, GROWING)):
            first = _unit_start(unit, unit_size, GROWING)
            last = tl.minimum(_unit_start(unit + 1, unit_size, GROWING), highest)
            unit_best, unit_total, unit_out = _sum_unit(
                query, keys, values, base, first, last, limits, lowest, scale_log2,
                HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, DESCRIPTORS,
            )  # fmt: skip
            # A row whose tail begins before this unit has no part in it.
            unit_best = tl.where(limits > first, unit_best, _NOTHING)
            best, total, out = _fold(best, total, out, unit_best, unit_total, unit_out)
    else:
        first = _unit_start(part, unit_size, GROWING)
        last = tl.minimum(_unit_start(part + 1, unit_size, GROWING), highest)
        best, total, out = _sum_unit(
            query, keys, values, base, first, last, limits, lowest, scale_log2,
            HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, DESCRIPTORS,
        )  # fmt: skip
    at = (row * NUM_HEADS + head) * num_parts + part
    tl.store(outs_ptr + at[:, None] * HEAD_DIM + dims[None, :], out, mask=real[:, None])
    tl.store(bests_ptr + at, best, mask=real)
    tl.store(totals_ptr + at, total, mask=real)


@triton.jit
def _load_part(  # type: ignore[no-untyped-def]
    outs_ptr, bests_ptr, totals_ptr, at, part, count, is_head, HEAD_DIM: tl.constexpr
):
    """One partial sum of the program's heads; past the last one a part that folds to no change."""
    there = is_head & (part < count)
    dims = tl.arange(0, HEAD_DIM)
    out = tl.load(outs_ptr + (at + part)[:, None] * HEAD_DIM + dims[None, :], mask=there[:, None], other=0.0)
    best = tl.load(bests_ptr + at + part, mask=there, other=_NOTHING)
    total = tl.load(totals_ptr + at + part, mask=there, other=0.0)
    return best, total, out


@triton.jit
def _ancestor_rows(words_ptr, wanted, NUM_WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The places [T] of the wanted[T]-th bits set in a node's words, counted from 0."""
    place = tl.zeros(wanted.shape, tl.int32)
    bit = tl.arange(0, 64)
    before = 0
    for number in tl.static_range(NUM_WORDS):
        word = tl.load(words_ptr + number)
        is_set = ((word >> bit) & 1).to(tl.int32)
        rank = before + tl.cumsum(is_set, 0) - is_set
        hit = (rank[None, :] == wanted[:, None]) & (is_set != 0)[None, :]
        place += tl.sum(tl.where(hit, (bit + number * 64)[None, :], 0), 1)
        before += _popcount(word)
    return place


@triton.jit
def _sum_tail(  # type: ignore[no-untyped-def]
    query_ptr, keys_ptr, values_ptr, words_ptr, row, head0, base, length, start, end, scale_log2,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    NUM_WORDS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The logical positions start..end of one node: best [HEADS], total [HEADS], out [HEADS, D]."""
    tile: tl.constexpr = 16 if HEADS < 16 else HEADS  # the least rows of a product
    dims = tl.arange(0, HEAD_DIM)
    lane = tl.arange(0, tile)
    query_at = (row * NUM_HEADS + head0 + lane)[:, None] * HEAD_DIM + dims[None, :]
    query = tl.load(query_ptr + query_at, mask=(lane < GROUP)[:, None], other=0.0)
    position = start + tl.arange(0, TAIL)
    stored = tl.where(position < length, position, length + _ancestor_rows(words_ptr, position - length, NUM_WORDS))
    inside = position < end
    at = (base + stored)[:, None] * HEAD_DIM + dims[None, :]
    key = tl.load(keys_ptr + at, mask=inside[:, None], other=0.0)
    value = tl.load(values_ptr + at, mask=inside[:, None], other=0.0)
    scores = tl.where(inside[None, :], tl.dot(query, tl.trans(key)) * scale_log2, _MASKED)
    best = tl.max(scores, 1)
    weights = tl.where(inside[None, :] & (lane < GROUP)[:, None], tl.exp2(scores - best[:, None]), 0.0)
    best = tl.where(lane < GROUP, best, 0.0)
    total = tl.sum(weights, 1)
    out = tl.dot(weights.to(value.dtype), value)
    # The first HEADS rows alone: the others are zeros, which change no sum.
    best = tl.sum(tl.reshape(best, [tile // HEADS, HEADS]), 0)
    total = tl.sum(tl.reshape(total, [tile // HEADS, HEADS]), 0)
    out = tl.sum(tl.reshape(out, [tile // HEADS, HEADS, HEAD_DIM]), 0)
    return best, total, out


@triton.jit(do_not_specialize=["num_nodes", "num_positions", "num_parts", "unit_size", "words_stride"])
def _fold_kernel(  # type: ignore[no-untyped-def]
    query_ptr, keys_ptr, values_ptr, slots_ptr, lengths_ptr, ancestors_ptr, outs_ptr, bests_ptr, totals_ptr, out_ptr,
    scale_log2, num_nodes, num_positions, num_parts, unit_size, words_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    NUM_WORDS: tl.constexpr, GROWING: tl.constexpr, TAIL: tl.constexpr, WHOLE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    group: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(2).to(tl.int64) * num_nodes + tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2)
    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    slot = tl.load(slots_ptr + sequence).to(tl.int64)
    base = (slot * NUM_KV_HEADS + kv_head) * num_positions
    words_ptr = ancestors_ptr + sequence.to(tl.int64) * words_stride + tl.program_id(0) * NUM_WORDS
    num_seen = 0
    for word in tl.static_range(NUM_WORDS):
        num_seen += _popcount(tl.load(words_ptr + word))
    end = length + num_seen
    limit = tl.maximum(tl.minimum(length, end - TAIL), 0)

    head0 = kv_head * group
    tail_best, tail_total, tail_out = _sum_tail(
        query_ptr, keys_ptr, values_ptr, words_ptr, row, head0, base, length, limit, end, scale_log2,
        NUM_HEADS, group, HEADS, HEAD_DIM, NUM_WORDS, TAIL,
    )  # fmt: skip
    # A node with more ancestors than the tail has positions: right as well, summed piece by piece.
    for start in tl.range(limit + TAIL, end, TAIL, num_stages=1):
        more_best, more_total, more_out = _sum_tail(
            query_ptr, keys_ptr, values_ptr, words_ptr, row, head0, base, length, start, end, scale_log2,
            NUM_HEADS, group, HEADS, HEAD_DIM, NUM_WORDS, TAIL,
        )  # fmt: skip
        tail_best, tail_total, tail_out = _fold(tail_best, tail_total, tail_out, more_best, more_total, more_out)

    if EARLY:
        gdc_wait()  # everything above was in memory before the first kernel began
    lane = tl.arange(0, HEADS)
    is_head = lane < group
    count = _num_units(limit, unit_size, GROWING)
    if WHOLE:
        count = tl.minimum(count, 1)
    at = (row * NUM_HEADS + head0 + lane) * num_parts
    best = tl.full([HEADS], _MASKED, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    out = tl.zeros([HEADS, HEAD_DIM], tl.float32)
    for first in range(0, count, 4):
        # Four loads are under way at a time.
        best0, total0, out0 = _load_part(outs_ptr, bests_ptr, totals_ptr, at, first, count, is_head, HEAD_DIM)
        best1, total1, out1 = _load_part(outs_ptr, bests_ptr, totals_ptr, at, first + 1, count, is_head, HEAD_DIM)
        best2, total2, out2 = _load_part(outs_ptr, bests_ptr, totals_ptr, at, first + 2, count, is_head, HEAD_DIM)
        best3, total3, out3 = _load_part(outs_ptr, bests_ptr, totals_ptr, at, first + 3, count, is_head, HEAD_DIM)
        best, total, out = _fold(best, total, out, best0, total0, out0)
        best, total, out = _fold(best, total, out, best1, total1, out1)
        best, total, out = _fold(best, total, out, best2, total2, out2)
        best, total, out = _fold(best, total, out, best3, total3, out3)
    best, total, out = _fold(best, total, out, tail_best, tail_total, tail_out)
    result = out / tl.where(total > 0, total, 1.0)[:, None]
    dims = tl.arange(0, HEAD_DIM)
    out_at = (row * NUM_HEADS + head0 + lane)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out_ptr + out_at, result.to(out_ptr.dtype.element_ty), mask=is_head[:, None])


def tree_attention(
    query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor, ancestors: Tensor, *,
    plan: TreeAttentionPlan, workspace: TreeAttentionWorkspace, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of the nodes of B trees, whose keys and values lie in the cache already: row n at `lengths[b] + n`.

    query: [B, N, H, D]; keys, values: [S, G, P, D], all of one dtype, bfloat16 or float16 (float32 in Triton's
    interpreter), finite wherever they are; slots, lengths: [B] int64, lengths at most `plan.max_length`; ancestors:
    [B, N, W] int64 words, bit j % 64 of word j // 64 = sees node j, itself included, or the boolean TreeMask
    [B N, B N] (packed here, with a look at its values on the host). A node with no bit set sees the prefix alone. out:
    [B, N, H, D], overwritten; None = a new one. All contiguous (the words within a sequence), on one device. B and N
    are at most the plan's.

    Reads lengths, slots and words on the device: it can be captured in a CUDA graph. Raises `ModelError` for another
    dtype, `BadRequestError` for a TreeMask that is none.
    """
    check_dtype(query.dtype)
    batch, num_nodes, num_heads, head_dim = query.shape
    if ancestors.dtype == torch.bool:
        ancestors = pack_tree_mask(ancestors, batch)
    if out is None:
        out = torch.empty_like(query)
    _check(query, keys, values, slots, lengths, ancestors, out, plan, workspace)
    num_slots, num_kv_heads, num_positions, _ = keys.shape
    scale_log2 = head_dim**-0.5 * 1.4426950408889634
    if plan.tensor_descriptors:
        shape, block = [num_slots * num_kv_heads * num_positions, head_dim], [BLOCK_COLUMNS, head_dim]
        sources = tuple(TensorDescriptor(t, shape, [head_dim, 1], block) for t in (keys, values))
    else:
        sources = (keys, values)
    num_tiles = triton.cdiv(num_nodes * plan.group, plan.block_rows)
    words = ancestors.shape[2]
    launch = {"launch_pdl": True} if plan.early_fold else {}
    _prefix_kernel[(num_tiles, plan.num_parts, batch * num_kv_heads)](
        query, *sources, slots, lengths, ancestors, workspace.outs, workspace.bests, workspace.totals,
        scale_log2, num_nodes, num_positions, plan.num_parts, plan.unit, ancestors.stride(0),
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, NUM_WORDS=words,
        BLOCK_M=plan.block_rows, BLOCK_N=BLOCK_COLUMNS, GROWING=plan.growing, TAIL=plan.tail,
        WHOLE=plan.whole, STAGES=plan.num_stages, DESCRIPTORS=plan.tensor_descriptors, EARLY=plan.early_fold,
        num_warps=plan.num_warps, num_stages=plan.num_stages, **launch,
    )  # fmt: skip
    _fold_kernel[(num_nodes, num_kv_heads, batch)](
        query, keys, values, slots, lengths, ancestors, workspace.outs, workspace.bests, workspace.totals, out,
        scale_log2, num_nodes, num_positions, plan.num_parts, plan.unit, ancestors.stride(0),
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEADS=triton.next_power_of_2(plan.group), HEAD_DIM=head_dim,
        NUM_WORDS=words, GROWING=plan.growing, TAIL=plan.tail, WHOLE=plan.whole,
        EARLY=plan.early_fold, num_warps=plan.fold_warps, num_stages=1, **launch,
    )  # fmt: skip
    return out


def _check(
    query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor, ancestors: Tensor, out: Tensor,
    plan: TreeAttentionPlan, workspace: TreeAttentionWorkspace,
) -> None:  # fmt: skip
    batch, num_nodes, num_heads, head_dim = query.shape
    num_slots, num_kv_heads, num_positions, _ = keys.shape
    assert (num_heads, num_kv_heads, head_dim) == (plan.num_heads, plan.num_kv_heads, plan.head_dim), query.shape
    assert batch <= plan.batch, (query.shape, plan)
    assert num_nodes <= plan.num_nodes, (query.shape, plan)
    assert keys.shape == values.shape == (num_slots, num_kv_heads, num_positions, head_dim), (keys.shape, values.shape)
    assert query.dtype == keys.dtype == values.dtype == out.dtype, (query.dtype, keys.dtype, values.dtype, out.dtype)
    assert out.shape == query.shape, out.shape
    assert slots.shape == lengths.shape == (batch,), (slots.shape, lengths.shape)
    assert ancestors.shape == (batch, num_nodes, triton.cdiv(num_nodes, 64)), (ancestors.shape, query.shape)
    assert slots.dtype == lengths.dtype == ancestors.dtype == torch.int64, (slots.dtype, lengths.dtype, ancestors.dtype)
    for tensor in (query, keys, values, slots, lengths, ancestors[0], out):
        assert tensor.is_contiguous(), tensor.stride()
        assert tensor.device == query.device, (tensor.device, query.device)
    rows = batch * num_nodes * num_heads * plan.num_parts
    assert rows <= workspace.bests.numel(), (rows, workspace.bests.shape)
    assert rows * head_dim <= workspace.outs.numel(), (rows, workspace.outs.shape)


def reference(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor, ancestors: Tensor) -> Tensor:
    """The loop over branches, in float64: each node's path is put behind the prefix and attended to as a plain chain.

    Arguments as in `tree_attention`, words only -> [B, N, H, D] float64.
    """
    batch, num_nodes, num_heads, head_dim = query.shape
    group = num_heads // keys.shape[1]
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    bit = torch.arange(64, device=query.device)
    for b in range(batch):
        length = int(lengths[b])
        seen = ((ancestors[b, :, :, None] >> bit) & 1).bool().flatten(1)  # [N, 64 W]
        prefix = torch.arange(length, device=query.device)
        for n in range(num_nodes):
            path = torch.cat([prefix, length + seen[n].nonzero().flatten()])
            key = keys[slots[b]][:, path].double().repeat_interleave(group, dim=0)  # [H, T, D]
            value = values[slots[b]][:, path].double().repeat_interleave(group, dim=0)
            scores = torch.einsum("hd,htd->ht", query[b, n].double(), key) * head_dim**-0.5
            out[b, n] = torch.einsum("ht,htd->hd", scores.softmax(dim=1), value)
    return out
