"""Attention of tree nodes, prompt chunks and single tokens over the flat KV cache, without a mask in memory.

    out[b, n, h] = softmax(q[b, n, h] . K^T * D^-1/2) V    over the slot's positions < lengths[b], and over the rows of
                                                           this call that row n may see: its ancestors in the tree, or
                                                           (without ancestor words) all rows up to its own

One pass with a running maximum (online softmax, 1805.02867; FlashAttention 2205.14135). The query heads that share a KV
head are packed into the rows of one tile, so that keys and values are read once for all of them. Lengths are read on
the device: one compiled kernel, and one CUDA graph, for sequences of any length.

Letters: B sequences, N rows, H query heads, G KV heads, D head dimension, S slots, P positions, W words a node.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gorgon_engine.kernels.tree_attention import attention_mask
from gorgon_engine.kernels.tree_attention import reference as masked_reference

_BLOCK_N = 64
_MAX_BLOCK_M = 64
# A power of two whose products with the scale stay exact: a row whose block is wholly masked gives exactly 0, not NaN.
_MASKED = tl.constexpr(-(2.0**99))


@triton.jit
def _accumulate(query, key, value, seen, best, total, out, scale_log2):  # type: ignore[no-untyped-def]
    """One block of positions: query [M, D], key and value [N, D], seen [M, N] or broadcastable."""
    scores = tl.dot(query, tl.trans(key)) * scale_log2
    scores = tl.where(seen, scores, _MASKED)
    new_best = tl.maximum(best, tl.max(scores, 1))
    weights = tl.where(seen, tl.exp2(scores - new_best[:, None]), 0.0)
    fade = tl.exp2(best - new_best)
    total = total * fade + tl.sum(weights, 1)
    out = out * fade[:, None] + tl.dot(weights.to(value.dtype), value)
    return new_best, total, out


@triton.jit(do_not_specialize=["num_rows"])
def _attention_kernel(  # type: ignore[no-untyped-def]
    query_ptr, keys_ptr, values_ptr, slots_ptr, lengths_ptr, ancestors_ptr, out_ptr,
    scale_log2, num_rows, num_positions,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    group: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2)
    length = tl.load(lengths_ptr + sequence)
    slot = tl.load(slots_ptr + sequence)

    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # row of the tile: node * group + query head of the group
    row = packed // group
    head = kv_head * group + packed % group
    real = row < num_rows
    dims = tl.arange(0, HEAD_DIM)
    offset = ((sequence * num_rows + row) * NUM_HEADS + head)[:, None] * HEAD_DIM + dims[None, :]
    query = tl.load(query_ptr + offset, mask=real[:, None], other=0.0)

    base = (slot * NUM_KV_HEADS + kv_head) * num_positions
    columns = tl.arange(0, BLOCK_N)
    best = tl.full([BLOCK_M], _MASKED, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for start in range(0, length, BLOCK_N):
        position = start + columns
        inside = position < length
        at = (base + position)[:, None] * HEAD_DIM + dims[None, :]
        key = tl.load(keys_ptr + at, mask=inside[:, None], other=0.0)
        value = tl.load(values_ptr + at, mask=inside[:, None], other=0.0)
        best, total, out = _accumulate(query, key, value, inside[None, :], best, total, out, scale_log2)

    # The rows of this call: a chain sees no column behind the tile's last row, a tree may see any.
    last = tl.minimum(num_rows, (tile * BLOCK_M + BLOCK_M - 1) // group + 1) if NUM_WORDS == 0 else num_rows
    for start in range(0, last, BLOCK_N):
        column = start + columns
        inside = column < num_rows
        at = (base + length + column)[:, None] * HEAD_DIM + dims[None, :]
        key = tl.load(keys_ptr + at, mask=inside[:, None], other=0.0)
        value = tl.load(values_ptr + at, mask=inside[:, None], other=0.0)
        if NUM_WORDS == 0:
            seen = column[None, :] <= row[:, None]
        else:
            word_at = (sequence * num_rows + row)[:, None] * NUM_WORDS + (column // 64)[None, :]
            word = tl.load(ancestors_ptr + word_at, mask=real[:, None] & inside[None, :], other=0)
            seen = ((word >> (column % 64)[None, :]) & 1) != 0
        best, total, out = _accumulate(query, key, value, seen & inside[None, :], best, total, out, scale_log2)

    result = out / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + offset, result.to(out_ptr.dtype.element_ty), mask=real[:, None])


def attention(
    query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor, ancestors: Tensor | None
) -> Tensor:
    """Attention over a slot's prefix and this call's own rows, which lie in the cache already.

    query: [B, N, H, D]; keys, values: [S, G, P, D], all of one 16-bit or 32-bit floating dtype; slots, lengths: [B]
    int64; ancestors: [B, N, W] int64 words of a tree, None = a causal chain. D is a power of two from 16. Row n lies
    at position `lengths[b] + n`. Returns [B, N, H, D].
    """
    batch, num_rows, num_heads, head_dim = query.shape
    num_slots, num_kv_heads, num_positions, _ = keys.shape
    assert keys.shape == values.shape == (num_slots, num_kv_heads, num_positions, head_dim), (keys.shape, values.shape)
    assert query.dtype == keys.dtype == values.dtype, (query.dtype, keys.dtype, values.dtype)
    assert keys.is_contiguous(), keys.stride()
    assert values.is_contiguous(), values.stride()
    assert head_dim >= 16, head_dim
    assert head_dim & (head_dim - 1) == 0, head_dim
    assert num_heads % num_kv_heads == 0, (num_heads, num_kv_heads)
    query = query.contiguous()
    words = 0
    if ancestors is not None:
        assert ancestors.shape[:2] == (batch, num_rows), (ancestors.shape, query.shape)
        ancestors = ancestors.contiguous()
        words = ancestors.shape[2]
    packed_rows = num_rows * (num_heads // num_kv_heads)
    block_m = min(max(16, triton.next_power_of_2(packed_rows)), _MAX_BLOCK_M)
    out = torch.empty_like(query)
    grid = (triton.cdiv(packed_rows, block_m), num_kv_heads, batch)
    _attention_kernel[grid](
        query, keys, values, slots, lengths, slots if ancestors is None else ancestors, out,
        head_dim**-0.5 * 1.4426950408889634, num_rows, num_positions,
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, NUM_WORDS=words,
        BLOCK_M=block_m, BLOCK_N=_BLOCK_N, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


def reference(
    query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor, ancestors: Tensor | None
) -> Tensor:
    """The same through an explicit mask, in float64."""
    batch, num_rows = query.shape[:2]
    depths = torch.arange(num_rows, device=query.device).expand(batch, -1)
    mask = attention_mask(lengths, depths, ancestors, num_positions=keys.shape[2], sliding_window=0)
    return masked_reference(query, keys, values, slots, mask)
