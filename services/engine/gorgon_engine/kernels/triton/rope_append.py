"""From the qkv product to attention's inputs: queries turned, keys turned and put into the cache with their values.

    [q, k, v][r] = sum_s partials[s, r]                                          in float32, s ascending
    q, k         = norm(q), norm(k)                                              where the model has such norms (Qwen3)
    x'[i]        = x[i] cos[i] - x[i + D/2] sin[i],   x'[i + D/2] = x[i + D/2] cos[i] + x[i] sin[i]

RoPE: 2104.09864. Row n of sequence b goes to position `lengths[b] + n` of its slot, where `KVCache.write` puts it.
One program a row and some heads of a kind: nothing depends on other rows.

Letters: B sequences, N rows of each, S partial sums, H query heads, G KV heads, D head dimension, P positions
of a slot.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gorgon_engine.kernels.triton.early_launch import early_options
from gorgon_engine.kernels.triton.partials import add_partials

_MAX_HEADS_EACH = 8  # of a program: few programs begin sooner than many


@triton.jit(do_not_specialize=["num_rows", "rows_each", "num_positions"])
def _rope_append_kernel(  # type: ignore[no-untyped-def]
    partials_ptr, cos_ptr, sin_ptr, slots_ptr, lengths_ptr, q_norm_ptr, k_norm_ptr, query_ptr, keys_ptr, values_ptr,
    eps, num_rows, rows_each, num_positions,
    NUM_PARTIALS: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    HEADS_EACH: tl.constexpr, HAS_NORMS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    head_dim: tl.constexpr = 2 * HALF
    all_heads: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * HEADS_EACH  # of heads that are all queries, keys or values
    head = first + tl.arange(0, HEADS_EACH)[:, None]
    lane = tl.arange(0, HALF)[None, :]
    at, stride = (row * all_heads + head) * head_dim + lane, num_rows * all_heads * head_dim
    inside = (head < all_heads) & (lane < HALF)
    low = add_partials(partials_ptr, at, stride, inside, NUM_PARTIALS)  # [HEADS_EACH, HALF]
    high = add_partials(partials_ptr, at + HALF, stride, inside, NUM_PARTIALS)
    is_value = first >= NUM_HEADS + NUM_KV_HEADS
    if not is_value:
        if HAS_NORMS:
            norm_ptr = q_norm_ptr if first < NUM_HEADS else k_norm_ptr
            scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / head_dim + eps)[:, None]
            low = low * scale * tl.load(norm_ptr + lane).to(tl.float32)
            high = high * scale * tl.load(norm_ptr + HALF + lane).to(tl.float32)
        cos = tl.load(cos_ptr + row * HALF + lane)
        sin = tl.load(sin_ptr + row * HALF + lane)
        turned = low * cos - high * sin
        high = high * cos + low * sin
        low = turned
    if first < NUM_HEADS:
        to = query_ptr + (row * NUM_HEADS + head) * head_dim + lane
        tl.store(to, low.to(query_ptr.dtype.element_ty))
        tl.store(to + HALF, high.to(query_ptr.dtype.element_ty))
    else:
        sequence = row // rows_each
        slot = tl.load(slots_ptr + sequence)
        position = tl.load(lengths_ptr + sequence) + row % rows_each
        if is_value:
            at = ((slot * NUM_KV_HEADS + head - NUM_HEADS - NUM_KV_HEADS) * num_positions + position) * head_dim + lane
            tl.store(values_ptr + at, low.to(values_ptr.dtype.element_ty))
            tl.store(values_ptr + at + HALF, high.to(values_ptr.dtype.element_ty))
        else:
            at = ((slot * NUM_KV_HEADS + head - NUM_HEADS) * num_positions + position) * head_dim + lane
            tl.store(keys_ptr + at, low.to(keys_ptr.dtype.element_ty))
            tl.store(keys_ptr + at + HALF, high.to(keys_ptr.dtype.element_ty))


def rope_append(
    partials: Tensor, cos: Tensor, sin: Tensor, *,
    slots: Tensor, lengths: Tensor, keys: Tensor, values: Tensor, query: Tensor,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 0.0,
) -> None:  # fmt: skip
    """partials: [S, B N, (H + 2 G) D] floating; cos, sin: [B N, D/2] float32; slots, lengths: [B] int64; keys, values:
    [slots, G, P, D], written behind the lengths; query: [B N, H, D], overwritten; q_norm, k_norm: [D], both or none.
    D is a power of two. All contiguous, on one device.
    """
    num_partials, num_rows, width = partials.shape
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, num_positions = keys.shape[1:3]
    assert width == (num_heads + 2 * num_kv_heads) * head_dim, (partials.shape, query.shape, keys.shape)
    assert keys.shape == values.shape, (keys.shape, values.shape)
    assert keys.shape[3] == head_dim, (keys.shape, query.shape)
    assert head_dim & (head_dim - 1) == 0, head_dim
    assert query.shape[0] == num_rows, (query.shape, partials.shape)
    assert cos.shape == sin.shape == (num_rows, head_dim // 2), (cos.shape, sin.shape)
    assert cos.dtype == sin.dtype == torch.float32, (cos.dtype, sin.dtype)
    assert num_rows % slots.shape[0] == 0, (num_rows, slots.shape)
    assert (q_norm is None) == (k_norm is None)
    for tensor in (partials, cos, sin, keys, values, query):
        assert tensor.is_contiguous(), tensor.stride()
    common = math.gcd(num_heads, num_kv_heads)
    heads_each = min(common & -common, _MAX_HEADS_EACH)  # the largest power of two that divides both
    grid = (num_rows, (num_heads + 2 * num_kv_heads) // heads_each)
    _rope_append_kernel[grid](
        partials, cos, sin, slots, lengths, cos if q_norm is None else q_norm, cos if k_norm is None else k_norm,
        query, keys, values, eps, num_rows, num_rows // slots.shape[0], num_positions,
        NUM_PARTIALS=num_partials, NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HALF=head_dim // 2,
        HEADS_EACH=heads_each, HAS_NORMS=q_norm is not None, num_warps=max(heads_each * head_dim // 256, 1),
        **early_options(query.device, math.prod(grid)),
    )  # fmt: skip


def reference(
    partials: Tensor, cos: Tensor, sin: Tensor, *, num_heads: int, num_kv_heads: int,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries [B N, H, D], keys and values [B N, G, D] in float64."""
    heads = partials.double().sum(dim=0).unflatten(1, (num_heads + 2 * num_kv_heads, -1))
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = (
            part * torch.rsqrt(part.square().mean(dim=2, keepdim=True) + eps) * norm.double()
            for part, norm in ((q, q_norm), (k, k_norm))
        )

    def turned(x: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=2)
        c, s = cos.double()[:, None], sin.double()[:, None]
        return torch.cat([low * c - high * s, high * c + low * s], dim=2)

    return turned(q), turned(k), v
