"""Prompt lookup in one launch: what followed the longest, then most recent, earlier occurrences of a sequence's end.

    match[p]  = how many tokens at p, p-1, ... equal those at the end, at most max_match;  0 at the end and behind it
    ends      = the A positions with the largest (match, p), descending
    tokens    = history[ends + 1 .. ends + D]

One program a sequence, newest block first: blocks that hold nothing better than what was found cost one comparison.
`gorgon_engine.drafters.ngram.NgramDrafter.propose_reference` says what comes out, to the bit, padding included.

Letters: B sequences, S history positions, A chains, D depth of a chain.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gorgon_engine.kernels.cpu.lookup import Chains

_BLOCK = 4096


@triton.jit(do_not_specialize=["num_positions", "stride"])
def _lookup_kernel(  # type: ignore[no-untyped-def]
    history_ptr, lengths_ptr, log_confidence_ptr, tokens_ptr, parents_ptr, log_probs_ptr, ranks_ptr,
    num_positions, stride,
    MAX_MATCH: tl.constexpr, NUM_CHAINS: tl.constexpr, CHAINS: tl.constexpr, DEPTH: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    history_ptr += row * stride
    last = tl.load(lengths_ptr + row).to(tl.int32) - 1

    chain = tl.arange(0, CHAINS)
    # The best keys so far, in any order; to begin with distinct ones, all worse than any position's.
    best = -1 - chain
    num_blocks = tl.cdiv(num_positions, BLOCK)
    for number in range(0, num_blocks):
        position = (num_blocks - 1 - number) * BLOCK + tl.arange(0, BLOCK)
        running = position < last
        match = tl.zeros([BLOCK], tl.int32)
        for back in tl.static_range(MAX_MATCH):
            running = running & (position >= back)
            wanted = tl.load(history_ptr + tl.maximum(last - back, 0))
            # Where the match has ended nothing is read any more: most of the block, behind the first token.
            token = tl.load(history_ptr + position - back, mask=running, other=-1)
            running = running & (token == wanted)
            match += running.to(tl.int32)
        # Longest match first, the most recent of equals: one key that sorts both ways. No two are equal.
        key = tl.where(position < num_positions, match * num_positions + position, -1 - CHAINS)
        top = tl.max(key, 0)
        worst = tl.min(best, 0)
        while top > worst:
            best = tl.where(best == worst, top, best)
            key = tl.where(key == top, -1 - CHAINS, key)
            top = tl.max(key, 0)
            worst = tl.min(best, 0)

    # Only the first NUM_CHAINS of CHAINS places are wanted; each chain's place is the number of better ones.
    place = tl.sum((best[:, None] < best[None, :]).to(tl.int32), 1)
    end = best % num_positions
    match = best // num_positions
    step = tl.arange(0, STEPS)
    known_end = end[:, None] + 1 + step[None, :]
    inside = (place < NUM_CHAINS)[:, None] & (step < DEPTH)[None, :]
    token = tl.load(history_ptr + tl.minimum(known_end, num_positions - 1), mask=inside, other=0)
    # Chains that begin like the first are joined with it, at its confidence; where they part, theirs counts.
    first = tl.load(log_confidence_ptr + 3 * match + tl.where(place == 0, 0, 2), mask=place < NUM_CHAINS, other=0.0)
    later = tl.load(log_confidence_ptr + 3 * match + 1, mask=place < NUM_CHAINS, other=0.0)
    log_prob = first[:, None] + later[:, None] * step[None, :].to(tl.float32)
    known = (known_end <= last) & (match > 0)[:, None]
    log_prob = tl.where(known, log_prob, float("-inf"))
    index = place[:, None] * DEPTH + step[None, :]
    at = row * NUM_CHAINS * DEPTH + index
    tl.store(tokens_ptr + at, token, mask=inside)
    tl.store(parents_ptr + at, tl.where(step[None, :] == 0, -1, index - 1).to(tl.int64), mask=inside)
    tl.store(log_probs_ptr + at, log_prob, mask=inside)
    tl.store(ranks_ptr + at, (place[:, None] + tl.zeros_like(index)).to(tl.int64), mask=inside)


def lookup(history: Tensor, lengths: Tensor, log_confidence: Tensor, *, num_chains: int, depth: int) -> Chains:
    """history: [B, S] int64, S below 2^27, its rows dense; lengths: [B] int64, at most S; log_confidence:
    [1 + max_match, 3] float32 by the number of matching tokens: of the first draft, of later ones, of the first draft
    of a further chain. num_chains: at most S.
    """
    batch, num_positions = history.shape
    max_match = log_confidence.shape[0] - 1
    assert history.stride(1) == 1, history.stride()
    assert history.dtype == lengths.dtype == torch.int64, (history.dtype, lengths.dtype)
    assert lengths.shape == (batch,), lengths.shape
    assert 1 <= num_chains <= num_positions, (num_chains, history.shape)
    assert (max_match + 1) * num_positions < 2**31, history.shape
    assert log_confidence.dtype == torch.float32, log_confidence.dtype
    tokens, parents, ranks = torch.empty((3, batch, num_chains * depth), dtype=torch.int64, device=history.device)
    log_probs = torch.empty((batch, num_chains * depth), dtype=torch.float32, device=history.device)
    _lookup_kernel[(batch,)](
        history, lengths.contiguous(), log_confidence.contiguous(), tokens, parents, log_probs, ranks,
        num_positions, history.stride(0),
        MAX_MATCH=max_match, NUM_CHAINS=num_chains, CHAINS=triton.next_power_of_2(num_chains), DEPTH=depth,
        STEPS=triton.next_power_of_2(depth), BLOCK=min(_BLOCK, triton.next_power_of_2(num_positions)),
        num_warps=8,
        enable_fp_fusion=False,  # the reference rounds the product, then the sum
    )  # fmt: skip
    return Chains(tokens, parents, log_probs, ranks)
