"""A dense product for few rows, of which each row's bits are its own: the lm_head, and draft heads.

    out[r, n] = sum_k w[n, k] x[r, k] + bias[n]        float32 sums, k ascending in blocks

Transposed: the weight is the left operand and the rows of x are the columns of the tensor cores' tile, so that few rows
waste nothing and the weight is read once. Which blocks of k are summed in which order depends on the weight's shape
alone, and a column of a tile does not see the others: unlike a library's product, which takes another algorithm for
another number of rows, a row gives the same bits in any company.

Letters: R rows, N outputs, K inputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_N = 128
_BLOCK_K = 64
_MAX_BLOCK_R = 64


@triton.jit(do_not_specialize=["num_rows"])
def _dense_linear_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, bias_ptr, out_ptr, num_rows, num_outputs, SIZE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # Tiles of rows change fastest: they share the weight's block while it is in the cache.
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, is_output = row < num_rows, output < num_outputs
    lane = tl.arange(0, BLOCK_K)
    weight_at = weight_ptr + output.to(tl.int64)[:, None] * SIZE + lane[None, :]
    x_at = x_ptr + row[None, :] * SIZE + lane[:, None]
    sums = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for start in range(0, SIZE, BLOCK_K):
        inside = start + lane < SIZE
        weight = tl.load(weight_at + start, mask=is_output[:, None] & inside[None, :], other=0.0)
        x = tl.load(x_at + start, mask=inside[:, None] & is_row[None, :], other=0.0)
        sums = tl.dot(weight, x, sums)
    if HAS_BIAS:
        sums += tl.load(bias_ptr + output, mask=is_output, other=0.0).to(tl.float32)[:, None]
    at = row.to(tl.int64)[None, :] * num_outputs + output[:, None]
    tl.store(out_ptr + at, sums.to(out_ptr.dtype.element_ty), mask=is_row[None, :] & is_output[:, None])


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """x: [R, K]; weight: [N, K] of the same dtype; bias: [N]; out: [R, N] of any floating dtype, overwritten; None = a
    new one of x's dtype. All contiguous, on one device."""
    num_rows, size = x.shape
    num_outputs = weight.shape[0]
    assert weight.shape == (num_outputs, size), (weight.shape, x.shape)
    assert weight.dtype == x.dtype, (weight.dtype, x.dtype)
    if out is None:
        out = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    assert out.shape == (num_rows, num_outputs), out.shape
    for tensor in (x, weight, out):
        assert tensor.is_contiguous(), tensor.stride()
    block_r = min(max(16, triton.next_power_of_2(num_rows)), _MAX_BLOCK_R)
    grid = (triton.cdiv(num_rows, block_r), triton.cdiv(num_outputs, _BLOCK_N))
    _dense_linear_kernel[grid](
        x, weight, weight if bias is None else bias, out, num_rows, num_outputs, SIZE=size, HAS_BIAS=bias is not None,
        BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K, BLOCK_R=block_r, num_warps=4, num_stages=4,
    )  # fmt: skip
    return out


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same in float64."""
    out = x.double() @ weight.double().T
    return out if bias is None else out + bias.double()
