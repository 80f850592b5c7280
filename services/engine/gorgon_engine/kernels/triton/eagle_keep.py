"""Of each sequence's committed rows the last one, kept in its slot: where the next draft begins.

    kept_x[slots[b]], kept_query[slots[b]] = x[b, counts[b] - 1], query[b, counts[b] - 1]      where counts[b] > 0

What a layer makes of the last true feature is made when that feature is remembered: the draft goes on from here and
need not run the first half of the layer again.

Letters: B sequences, E rows of each, S slots, C hidden size, Q = H * D width of the queries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit(do_not_specialize=["rows_each"])
def _eagle_keep_kernel(  # type: ignore[no-untyped-def]
    x_ptr, query_ptr, slots_ptr, counts_ptr, kept_x_ptr, kept_query_ptr, rows_each, size, query_size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(counts_ptr + sequence)
    slot = tl.load(slots_ptr + sequence)
    row = sequence * rows_each + count - 1
    there = count > 0
    inside = there & (place < size)
    x = tl.load(x_ptr + row * size + place, mask=inside, other=0.0)
    tl.store(kept_x_ptr + slot * size + place, x, mask=inside)
    inside = there & (place < query_size)
    query = tl.load(query_ptr + row * query_size + place, mask=inside, other=0.0)
    tl.store(kept_query_ptr + slot * query_size + place, query, mask=inside)


def eagle_keep(x: Tensor, query: Tensor, slots: Tensor, counts: Tensor, kept_x: Tensor, kept_query: Tensor) -> None:
    """x: [B E, C]; query: [B E, ...] of Q values a row; slots, counts: [B] int64, each slot at most once; kept_x:
    [S, C] and kept_query: [S, ...], of the same dtypes, changed in place. All contiguous, on one device."""
    num_rows, size = x.shape
    batch = slots.shape[0]
    assert num_rows % batch == 0, (x.shape, slots.shape)
    assert counts.shape == (batch,), counts.shape
    assert kept_x.shape[1] == size, (kept_x.shape, x.shape)
    assert kept_query.shape[1:] == query.shape[1:], (kept_query.shape, query.shape)
    assert (kept_x.dtype, kept_query.dtype) == (x.dtype, query.dtype), (kept_x.dtype, kept_query.dtype)
    for tensor in (x, query, slots, counts, kept_x, kept_query):
        assert tensor.is_contiguous(), tensor.stride()
    query_size = query[0].numel()
    _eagle_keep_kernel[(batch, triton.cdiv(max(size, query_size), _BLOCK))](
        x, query, slots, counts, kept_x, kept_query, num_rows // batch, size, query_size, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def reference(x: Tensor, query: Tensor, slots: Tensor, counts: Tensor, kept_x: Tensor, kept_query: Tensor) -> None:
    """The same in torch operations."""
    last = torch.arange(slots.shape[0], device=slots.device) * (x.shape[0] // slots.shape[0]) + counts - 1
    there = counts > 0
    kept_x[slots[there]] = x[last[there]]
    kept_query[slots[there]] = query[last[there]]
