"""The gate of the MLP (SwiGLU, 2002.05202), on the partial sums of the product in front.

    y[r, i] = silu(gate[r, i]) * up[r, i],   [gate, up][r] = sum_s partials[s, r]      in float32, s ascending

Letters: R rows, S partial sums, I intermediate size.
"""

import math

import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import silu
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gorgon_engine.kernels.triton.early_launch import early_options
from gorgon_engine.kernels.triton.partials import add_partials

_BLOCK = 1024


@triton.jit(do_not_specialize=["num_rows"])
def _silu_mul_kernel(  # type: ignore[no-untyped-def]
    partials_ptr, out_ptr, num_rows, size, NUM_PARTIALS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    at, stride = row * 2 * size + place, num_rows * 2 * size
    gate = add_partials(partials_ptr, at, stride, inside, NUM_PARTIALS)
    up = add_partials(partials_ptr, at + size, stride, inside, NUM_PARTIALS)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * size + place, y.to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul(partials: Tensor, out: Tensor) -> None:
    """partials: [S, R, 2 I] floating, gate before up; out: [R, I] of any floating dtype, overwritten. Contiguous."""
    num_partials, num_rows, width = partials.shape
    size = width // 2
    assert out.shape == (num_rows, size), (out.shape, partials.shape)
    assert partials.is_contiguous(), partials.stride()
    assert out.is_contiguous(), out.stride()
    grid = (num_rows, triton.cdiv(size, _BLOCK))
    _silu_mul_kernel[grid](
        partials, out, num_rows, size, NUM_PARTIALS=num_partials, BLOCK=_BLOCK, num_warps=4,
        **early_options(out.device, math.prod(grid)),
    )  # fmt: skip


def reference(partials: Tensor) -> Tensor:
    """y [R, I] in float64."""
    gate, up = partials.double().sum(dim=0).chunk(2, dim=1)
    return silu(gate) * up
