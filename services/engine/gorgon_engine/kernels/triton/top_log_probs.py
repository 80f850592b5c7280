"""The likeliest tokens of draft heads: top-k of a log-softmax in two launches, without the log-softmax.

    log_probs[r, i] = logits[r, ids[r, i]] - log(sum_v exp(logits[r, v])),  for the k largest logits of the row

`gorgon_engine.kernels.cpu.drafting.reference` says what comes out: the lower id first among equal logits, and a row
without a distribution (a NaN, a +inf or nothing but -inf in it) gives -inf for the ids 0 to k - 1.

A key orders what is looked for: the logit's bits as an integer of the same order, then the id, lower first. No two are
equal, so the largest k of a part of the row, and of those of all parts, are one set in one order, however the parts are
cut. The sums of the parts are added in a fixed tree: a row's bits do not depend on the other rows.

Letters: R rows, V vocabulary, k choices, S parts of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gorgon_engine.kernels.cpu.drafting import TopLogProbs

MAX_CHOICES = 16
_PART = 2048
_MAX_PARTS = 128  # the merge holds k of each at once
_NO_KEY = tl.constexpr(-(2**63))


@triton.jit
def _ordered(values):  # type: ignore[no-untyped-def]
    """float32 as int32 of the same order; its own inverse on bits."""
    bits = values.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _parts_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, keys_ptr, tops_ptr, sums_ptr, vocab_size, stride,
    COUNT: tl.constexpr, CHOICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part, num_parts = tl.program_id(1), tl.num_programs(1)
    token = part * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab_size
    logits = tl.load(logits_ptr + row * stride + token, mask=inside, other=float("-inf")).to(tl.float32)
    top = tl.max(tl.where(logits != logits, float("inf"), logits), 0)
    total = tl.sum(tl.exp(logits - tl.where(top == float("-inf"), 0.0, top)), 0)
    at = row * num_parts + part
    tl.store(tops_ptr + at, top)  # +inf: no distribution
    tl.store(sums_ptr + at, total)

    same_zero = tl.where(logits == 0.0, 0.0, logits)  # -0 counts as 0
    keys = (_ordered(same_zero).to(tl.int64) << 32) + (vocab_size - 1 - token).to(tl.int64)
    keys = tl.where(inside, keys, _NO_KEY)
    choice = tl.arange(0, CHOICES)
    chosen = tl.full([CHOICES], _NO_KEY, tl.int64)
    for rank in tl.static_range(COUNT):
        best = tl.max(keys, 0)
        chosen = tl.where(choice == rank, best, chosen)
        keys = tl.where(keys == best, _NO_KEY, keys)
    tl.store(keys_ptr + at * CHOICES + choice, chosen)


@triton.jit
def _merge_kernel(  # type: ignore[no-untyped-def]
    keys_ptr, tops_ptr, sums_ptr, log_probs_ptr, ids_ptr, vocab_size, num_parts,
    COUNT: tl.constexpr, CHOICES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    inside = part < num_parts
    tops = tl.load(tops_ptr + row * num_parts + part, mask=inside, other=float("-inf"))
    sums = tl.load(sums_ptr + row * num_parts + part, mask=inside, other=0.0)
    top = tl.max(tops, 0)
    is_broken = (top == float("inf")) | (top == float("-inf"))
    top = tl.where(is_broken, 0.0, top)
    total = tl.sum(sums * tl.exp(tops - top), 0)
    log_total = tl.log(tl.where(is_broken, 1.0, total))

    lane = tl.arange(0, PARTS * CHOICES)
    keys = tl.load(keys_ptr + row * num_parts * CHOICES + lane, mask=lane < num_parts * CHOICES, other=_NO_KEY)
    for rank in tl.static_range(COUNT):
        best = tl.max(keys, 0)
        keys = tl.where(keys == best, _NO_KEY, keys)
        bits = (best >> 32).to(tl.int32)
        logit = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
        log_prob = tl.where(is_broken, float("-inf"), logit - top - log_total)
        token = tl.where(is_broken, rank, vocab_size - 1 - (best & 0xFFFFFFFF))
        tl.store(log_probs_ptr + row * COUNT + rank, log_prob)
        tl.store(ids_ptr + row * COUNT + rank, token)


def can_choose(logits: Tensor, count: int) -> bool:
    """Whether the kernels hold that many choices of such rows."""
    return count <= MAX_CHOICES and logits.shape[1] <= _PART * _MAX_PARTS


def top_log_probs(logits: Tensor, count: int) -> TopLogProbs:
    """The `count` largest of each row's log-softmax, descending. logits: [R, V] of any floating dtype, dense rows."""
    rows, vocab_size = logits.shape
    assert 1 <= count <= vocab_size, (count, logits.shape)
    assert can_choose(logits, count), (count, logits.shape)
    assert logits.stride(1) == 1, logits.stride()
    num_parts, choices = triton.cdiv(vocab_size, _PART), triton.next_power_of_2(count)
    device = logits.device
    keys = torch.empty((rows, num_parts, choices), dtype=torch.int64, device=device)
    tops, sums = torch.empty((2, rows, num_parts), dtype=torch.float32, device=device)
    log_probs = torch.empty((rows, count), dtype=torch.float32, device=device)
    ids = torch.empty((rows, count), dtype=torch.int64, device=device)
    _parts_kernel[(rows, num_parts)](
        logits, keys, tops, sums, vocab_size, logits.stride(0), COUNT=count, CHOICES=choices, BLOCK=_PART, num_warps=4
    )
    _merge_kernel[(rows,)](
        keys, tops, sums, log_probs, ids, vocab_size, num_parts,
        COUNT=count, CHOICES=choices, PARTS=triton.next_power_of_2(num_parts), num_warps=4,
    )  # fmt: skip
    return TopLogProbs(log_probs, ids)
