"""argmax(logits / temperature + Gumbel noise) of each row, without the noise ever lying in memory.

The noise of token v is that of `gorgon_engine.random`: word v % 4 of Philox4x32-10 with the counter (v // 4, position,
stream) and the seed as key; u = (word + 1/2) / 2^32, noise = -log(-log(1 - u)). A temperature of 0 is greedy: the
largest logit as it is. Ties go to the lowest id.

Letters: R rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gorgon_engine.random import Stream, gumbel_noise

_BLOCK = 512  # counters of four tokens each


@triton.jit
def _gumbel_argmax_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, temperatures_ptr, seeds_ptr, positions_ptr, tokens_ptr, vocab_size, stream, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures_ptr + row)
    seed = tl.load(seeds_ptr + row)
    position = tl.load(positions_ptr + row)
    drawn = temperature > 0.0
    divisor = tl.where(drawn, temperature, 1.0)
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    token = tl.full([BLOCK], 2147483647, tl.int32)
    for start in range(0, vocab_size, 4 * BLOCK):
        block = start // 4 + lane
        counter = block.to(tl.uint32)
        zero = counter * 0
        words = tl.philox(seed, counter, zero + low, zero + high, zero + stream)
        for place in tl.static_range(4):
            index = 4 * block + place
            inside = index < vocab_size
            logit = tl.load(logits_ptr + row * vocab_size + index, mask=inside, other=float("-inf")).to(tl.float32)
            # Double precision: single would lose the small exponentials, which win the race.
            uniform = ((words[place].to(tl.float64) + 0.5) * 2.3283064365386963e-10).to(tl.float32)
            uniform = tl.minimum(uniform, 1.0 - 5.9604644775390625e-08)
            noise = -tl.log(-tl.log(1.0 - uniform.to(tl.float64))).to(tl.float32)
            value = logit / divisor + tl.where(drawn, noise, 0.0)
            # A lane meets its tokens in ascending order: a later equal one is not better.
            better = inside & (value > best)
            best = tl.where(better, value, best)
            token = tl.where(better, index, token)
    top = tl.max(best, 0)
    chosen = tl.min(tl.where(best == top, token, 2147483647), 0)
    tl.store(tokens_ptr + row, tl.minimum(chosen, vocab_size - 1).to(tl.int64))


def gumbel_argmax(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, stream: Stream) -> Tensor:
    """One token a row. logits: [R, V] of any floating dtype, contiguous rows; temperatures: [R] float32, 0 = greedy;
    seeds, positions: [R] int64 -> [R] int64. A row of nothing but -inf or NaN gives some token in range.
    """
    rows, vocab_size = logits.shape
    assert logits.is_contiguous(), logits.stride()
    assert temperatures.shape == seeds.shape == positions.shape == (rows,), (temperatures.shape, seeds.shape)
    assert temperatures.dtype == torch.float32, temperatures.dtype
    assert seeds.dtype == positions.dtype == torch.int64, (seeds.dtype, positions.dtype)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _gumbel_argmax_kernel[(rows,)](
        logits, temperatures.contiguous(), seeds.contiguous(), positions.contiguous(), tokens, vocab_size,
        int(stream), BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return tokens


def reference(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, stream: Stream) -> Tensor:
    """The same in torch operations."""
    drawn = (temperatures > 0)[:, None]
    scaled = logits.float() / torch.where(drawn, temperatures[:, None], 1.0)
    noise = gumbel_noise(seeds, positions, logits.shape[1], stream)
    return torch.where(drawn, scaled + noise, scaled).argmax(dim=1)
