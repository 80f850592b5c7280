"""The likeliest tokens of draft heads: top-k of a log-softmax without the log-softmax.

log_probs[r, i] = logits[r, ids[r, i]] - log(sum_v exp(logits[r, v])), for the k largest logits of the row.

Letters: R rows, V vocabulary, k choices a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gorgon_engine.kernels.cpu.library import NativeLibrary, available_library, check, describe


class TopLogProbs(NamedTuple):
    """The k likeliest tokens of each row, likeliest first."""

    log_probs: Tensor  # [R, k] float32, at most 0
    ids: Tensor  # [R, k] int64


def top_log_probs(logits: Tensor, k: int, *, library: NativeLibrary | None = None) -> TopLogProbs:
    """The k largest of each row's log-softmax, descending, the lower id first among equal logits. No gradient flows.

    logits: [R, V], on a CPU float32 and contiguous. -inf is a token of no probability. A row without a distribution
    (a NaN, a +inf or nothing but -inf in it) has log_probs -inf for the ids 0 to k - 1: it guesses nothing.

    A row's result depends on that row only, to the bit, whatever the number of threads. library: None = the one for
    this machine; torch does the work where there is none, and on a GPU. Raises ValueError for other shapes, dtypes or
    k than these.
    """
    if logits.ndim != 2 or not 1 <= k <= logits.shape[1]:
        raise ValueError(f"logits must be [R, V] with V at least k = {k}, and k at least 1, not {describe(logits)}")
    library = library or (available_library() if logits.device.type == "cpu" else None)
    if library is None:
        return _search(logits, k)
    rows, vocab_size = logits.shape
    address = check("logits", logits, (rows, vocab_size), torch.float32)
    log_probs = torch.empty((rows, k))
    ids = torch.empty((rows, k), dtype=torch.int64)
    code = library.handle.gorgon_top_log_probs(address, rows, vocab_size, k, log_probs.data_ptr(), ids.data_ptr())
    if code != 0:
        raise MemoryError(f"no memory to search {rows} rows of {vocab_size} logits")
    return TopLogProbs(log_probs, ids)


@torch.no_grad()
def reference(logits: Tensor, k: int) -> TopLogProbs:
    """What `top_log_probs` means, in the plainest torch; equal up to the rounding of the sum."""
    log_probs, logits = _without_broken_rows(logits)
    # By logits, not by log_probs: two logits may round to one log-probability.
    ids = torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :k]
    return TopLogProbs(log_probs.gather(1, ids), ids)


@torch.no_grad()
def _search(logits: Tensor, k: int) -> TopLogProbs:
    """`reference`, a few times as fast: `topk`, which breaks ties as it likes, over keys (logit, id) that have none."""
    log_probs, logits = _without_broken_rows(logits)
    bits = (logits + 0.0).view(torch.int32)  # + 0: -0 counts as 0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # as integers what the floats were
    last = logits.shape[1] - 1
    keys = (ordered << 32) + (last - torch.arange(last + 1, device=logits.device))
    ids = last - (keys.topk(k, dim=1).values & 0xFFFFFFFF)
    return TopLogProbs(log_probs.gather(1, ids), ids)


def _without_broken_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The log-softmax and the logits, both [R, V] float32, where a row without a distribution is -inf throughout."""
    log_probs = torch.log_softmax(logits.float(), dim=1)
    broken = log_probs[:, :1].isnan()  # one NaN in a log-softmax is a row of them
    return log_probs.masked_fill(broken, -torch.inf), logits.float().masked_fill(broken, -torch.inf)
