"""The residual stream between two matrices: add what the last one gave, normalise for the next.

    x'[r] = x[r] + sum_s partials[s, r]          in float32, s ascending
    y[r]  = x'[r] / sqrt(mean(x'[r]^2) + eps) * weight

RMSNorm: 1910.07467. The sum over s closes the split-K product in front (`nf4_linear`), which so needs no pass of its
own. One program a row: a row's bits do not depend on the others.

Letters: R rows, S partial sums, C hidden size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gorgon_engine.kernels.triton.early_launch import early_options
from gorgon_engine.kernels.triton.partials import add_partials


@triton.jit(do_not_specialize=["num_rows"])
def _add_rms_norm_kernel(  # type: ignore[no-untyped-def]
    residual_ptr, partials_ptr, weight_ptr, normed_ptr, eps, num_rows, size,
    NUM_PARTIALS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK)
    inside = dims < size
    x = tl.load(residual_ptr + row * size + dims, mask=inside, other=0.0).to(tl.float32)
    if NUM_PARTIALS > 0:
        x += add_partials(partials_ptr, row * size + dims, num_rows * size, inside, NUM_PARTIALS)
        tl.store(residual_ptr + row * size + dims, x, mask=inside)
    scale = tl.rsqrt(tl.sum(x * x, 0) / size + eps)
    weight = tl.load(weight_ptr + dims, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed_ptr + row * size + dims, (x * scale * weight).to(normed_ptr.dtype.element_ty), mask=inside)


def add_rms_norm(residual: Tensor, partials: Tensor | None, weight: Tensor, eps: float, normed: Tensor) -> None:
    """residual: [R, C] float32, changed in place; partials: [S, R, C] floating, None = nothing to add; weight: [C];
    normed: [R, C] of any floating dtype, overwritten. All contiguous, on one device."""
    num_rows, size = residual.shape
    assert residual.dtype == torch.float32, residual.dtype
    assert normed.shape == residual.shape, (normed.shape, residual.shape)
    assert weight.shape == (size,), weight.shape
    assert partials is None or partials.shape[1:] == residual.shape, (partials.shape, residual.shape)
    for tensor in (residual, weight, normed, *(() if partials is None else (partials,))):
        assert tensor.is_contiguous(), tensor.stride()
    _add_rms_norm_kernel[(num_rows,)](
        residual, residual if partials is None else partials, weight, normed, eps, num_rows, size,
        NUM_PARTIALS=0 if partials is None else partials.shape[0],
        BLOCK=triton.next_power_of_2(size), num_warps=8 if size > 2048 else 4,
        **early_options(residual.device, num_rows),
    )  # fmt: skip


def reference(residual: Tensor, partials: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x' and y in float64."""
    x = residual.double()
    if partials is not None:
        x = x + partials.double().sum(dim=0)
    return x, x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + eps) * weight.double()
