"""Counter-based random numbers: Philox4x32-10 (Salmon et al., SC'11), keyed by (seed, position, stream).

The same generator as Triton's `tl.rand`, so that a GPU kernel can give the same numbers. Nothing is stored and nothing
advances: a number is a pure function of its counter.
"""

from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_NUM_ROUNDS = 10


class Stream(IntEnum):
    """Independent uses of randomness at one position."""

    TARGET = 0  # the token drawn from the backbone's distribution
    ACCEPT = 1  # Leviathan's acceptance tests
    DRAFT = 2  # children drawn by a drafter


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit words (int64 tensors in [0, 2^32)) of broadcastable 32-bit counter and key words."""
    c0, c1, c2, c3 = counter
    rounds = torch.arange(_NUM_ROUNDS, device=c0.device)
    keys_a = ((key[0][..., None] + rounds * _KEY_A) & _MASK).unbind(-1)
    keys_b = ((key[1][..., None] + rounds * _KEY_B) & _MASK).unbind(-1)
    for key_a, key_b in zip(keys_a, keys_b, strict=True):
        # The products wrap in signed 64 bits; their bit patterns, hence both halves, are right all the same.
        product_a, product_b = c0 * _ROUND_A, c2 * _ROUND_B
        c0, c2 = ((product_b >> 32) & _MASK) ^ c1 ^ key_a, ((product_a >> 32) & _MASK) ^ c3 ^ key_b
        c1, c3 = product_b & _MASK, product_a & _MASK
    return c0, c1, c2, c3


def uniform(seeds: Tensor, positions: Tensor, count: int, stream: Stream) -> Tensor:
    """Uniform numbers in (0, 1), float32, [..., count] for seeds and positions [...] (broadcast together)."""
    seeds, positions = torch.broadcast_tensors(seeds, positions)
    blocks = torch.arange((count + 3) // 4, device=seeds.device)
    words = _words(seeds[..., None], positions[..., None], blocks, stream)
    return _to_uniform(torch.stack(words, dim=-1).flatten(-2)[..., :count])


def _words(seeds: Tensor, positions: Tensor, blocks: Tensor, stream: Stream) -> tuple[Tensor, ...]:
    counter = (blocks, positions & _MASK, (positions >> 32) & _MASK, torch.full_like(blocks, int(stream)))
    return philox(counter, (seeds & _MASK, (seeds >> 32) & _MASK))


def _to_uniform(bits: Tensor) -> Tensor:
    # Half a step from 0, and a float32 below 1: both logarithms of the Gumbel noise stay finite.
    return ((bits.double() + 0.5) * 2.0**-32).float().clamp_(max=1.0 - 2.0**-24)


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int, stream: Stream = Stream.TARGET) -> Tensor:
    """Standard Gumbel noise [..., vocab_size] float32 for seeds and positions [...]."""
    # log1p keeps the small exponentials, which win the race, at full relative precision.
    return -torch.log(-torch.log1p(-uniform(seeds, positions, vocab_size, stream)))
