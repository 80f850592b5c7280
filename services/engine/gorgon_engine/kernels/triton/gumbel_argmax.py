"""argmax(logits / temperature + Gumbel noise) of each row, without the noise ever lying in memory.

The noise of token v is that of `gorgon_engine.random`: word v % 4 of Philox4x32-10 with the counter (v // 4, position,
stream) and the seed as key; u = (word + 1/2) / 2^32, noise = -log(-log(1 - u)), up to rounding. A temperature of 0 is
greedy: the largest logit as it is. Ties go to the lowest id.

A row is cut into parts, one program each, so that even a single row occupies the GPU; a second launch takes the best of
the parts. A maximum is exact: neither the cut nor the other rows change a token.

Letters: R rows, V vocabulary, B sequences, N nodes of each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gorgon_engine.random import Stream, gumbel_noise

_PART = 4096  # tokens of a program
_NO_TOKEN = tl.constexpr(2147483647)


@triton.jit
def _noise(words):  # type: ignore[no-untyped-def]
    """Standard Gumbel noise, float32, of 32 random bits each."""
    uniform = tl.minimum(words.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 1.0 - 5.96046448e-08)
    # -log1p(-u): 1 - u is rounded, and the quotient undoes it (Goldberg 1991, theorem 4). The small exponentials, which
    # win the race, keep their full relative precision.
    rest = 1.0 - uniform
    is_whole = rest == 1.0
    exponential = -tl.log(rest) * (uniform / tl.where(is_whole, 1.0, 1.0 - rest))
    return -tl.log(tl.where(is_whole, uniform, exponential))


@triton.jit(do_not_specialize=["rows_each", "last_row", "stream"])
def _parts_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, starts_ptr, depths_ptr, temperatures_ptr, seeds_ptr, positions_ptr, values_ptr, tokens_ptr,
    vocab_size, rows_each, last_row, stream,
    DRAWN: tl.constexpr, IN_TREES: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part, num_parts = tl.program_id(1), tl.num_programs(1)
    sequence, source = row, row
    if IN_TREES:
        sequence = row // rows_each
        source = tl.minimum(tl.load(starts_ptr + sequence) + row % rows_each, last_row)
    token = part * PART + tl.arange(0, PART)
    logits = tl.load(logits_ptr + source * vocab_size + token, mask=token < vocab_size, other=float("-inf"))
    value = logits.to(tl.float32)
    if DRAWN:
        temperature = tl.load(temperatures_ptr + sequence)
        if temperature > 0.0:
            position = tl.load(positions_ptr + sequence)
            if IN_TREES:
                position += tl.load(depths_ptr + row) + 1  # of the token behind the node
            counter = (part * (PART // 4) + tl.arange(0, PART // 4)).to(tl.uint32)
            zero = counter * 0
            low = (position & 0xFFFFFFFF).to(tl.uint32)
            high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
            seed = tl.load(seeds_ptr + sequence)
            first, second, third, fourth = tl.philox(seed, counter, zero + low, zero + high, zero + stream)
            # Word j of counter i belongs to token 4 i + j.
            words = tl.join(tl.join(first, third), tl.join(second, fourth)).reshape([PART])
            # Rounded as torch rounds it: the same where filters have torch divide.
            value = tl.div_rn(value, tl.zeros_like(value) + temperature) + _noise(words)
    value = tl.where(value != value, float("-inf"), value)
    best = tl.max(value, 0)
    at = row * num_parts + part
    tl.store(values_ptr + at, best)
    tl.store(tokens_ptr + at, tl.min(tl.where(value == best, token, _NO_TOKEN), 0))


@triton.jit
def _best_kernel(  # type: ignore[no-untyped-def]
    values_ptr, tokens_ptr, out_ptr, vocab_size, num_parts, PARTS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    inside = part < num_parts
    value = tl.load(values_ptr + row * num_parts + part, mask=inside, other=float("-inf"))
    token = tl.load(tokens_ptr + row * num_parts + part, mask=inside, other=_NO_TOKEN)
    token = tl.min(tl.where(value == tl.max(value, 0), token, _NO_TOKEN), 0)
    # The places behind the vocabulary are -inf too, and may be what a row without a number in it gives.
    tl.store(out_ptr + row, tl.minimum(token, vocab_size - 1).to(tl.int64))


def gumbel_argmax(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, stream: Stream) -> Tensor:
    """One token a row. logits: [R, V] of any floating dtype, contiguous rows; temperatures: [R] float32, 0 = greedy;
    seeds, positions: [R] int64 -> [R] int64. A row of nothing but -inf or NaN gives some token in range.
    """
    shape = (logits.shape[0],)
    assert temperatures.shape == seeds.shape == positions.shape == shape, (temperatures.shape, seeds.shape)
    return _launch(logits, shape, logits, logits, temperatures, seeds, positions, stream, is_drawn=True, in_trees=False)


def draw_behind_nodes(
    logits: Tensor, starts: Tensor, depths: Tensor, *,
    temperatures: Tensor, seeds: Tensor, positions: Tensor, all_greedy: bool,
) -> Tensor:  # fmt: skip
    """What the backbone says behind every node of B trees: [B, N] int64.

    logits: [R, V] of any floating dtype, contiguous; that of node n of tree b is row `starts[b] + n`, or the last one
    where there are not so many. starts: [B] int64; depths: [B, N] int64; temperatures: [B] float32, 0 = greedy; seeds:
    [B] int64; positions: [B] int64, of the roots. all_greedy: the host knows that every temperature is 0.
    """
    batch = starts.shape[0]
    assert depths.shape[0] == batch, (depths.shape, starts.shape)
    assert starts.dtype == depths.dtype == torch.int64, (starts.dtype, depths.dtype)
    assert temperatures.shape == seeds.shape == positions.shape == (batch,), (temperatures.shape, seeds.shape)
    return _launch(
        logits, (batch, depths.shape[1]), starts, depths, temperatures, seeds, positions, Stream.TARGET,
        is_drawn=not all_greedy, in_trees=True,
    )  # fmt: skip


def _launch(
    logits: Tensor, shape: tuple[int, ...], starts: Tensor, depths: Tensor, temperatures: Tensor, seeds: Tensor,
    positions: Tensor, stream: Stream, *, is_drawn: bool, in_trees: bool,
) -> Tensor:  # fmt: skip
    num_rows, vocab_size = logits.shape
    assert logits.is_contiguous(), logits.stride()
    if is_drawn:
        assert temperatures.dtype == torch.float32, temperatures.dtype
        assert seeds.dtype == positions.dtype == torch.int64, (seeds.dtype, positions.dtype)
    out = torch.empty(shape, dtype=torch.int64, device=logits.device)
    num_parts = triton.cdiv(vocab_size, _PART)
    values = torch.empty((out.numel(), num_parts), dtype=torch.float32, device=logits.device)
    tokens = torch.empty((out.numel(), num_parts), dtype=torch.int32, device=logits.device)
    _parts_kernel[(out.numel(), num_parts)](
        logits, starts.contiguous(), depths.contiguous(), temperatures.contiguous(), seeds.contiguous(),
        positions.contiguous(), values, tokens, vocab_size, shape[-1], num_rows - 1, int(stream),
        DRAWN=is_drawn, IN_TREES=in_trees, PART=_PART, num_warps=8,
    )  # fmt: skip
    _best_kernel[(out.numel(),)](
        values, tokens, out, vocab_size, num_parts, PARTS=triton.next_power_of_2(num_parts), num_warps=1
    )
    return out


def reference(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, stream: Stream) -> Tensor:
    """`gumbel_argmax` in torch operations."""
    drawn = (temperatures > 0)[:, None]
    scaled = logits.float() / torch.where(drawn, temperatures[:, None], 1.0)
    noise = gumbel_noise(seeds, positions, logits.shape[1], stream)
    return torch.where(drawn, scaled + noise, scaled).argmax(dim=1)
