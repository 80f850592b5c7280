"""A product with weights in NF4 for few rows: it costs the reading of the weights, from 1 row to 64.

    partials[s, r, n] = sum over part s of the inputs of W[n, k] x[r, k]         float32 sums
    W[n, k] = code[index[n, k]] * scale[n, k // 64]                              rounded to the dtype of x

The parts are those of the plan (`nf4_plan`), in ascending order of the inputs; whoever reads the product adds them up
in that order (`add_partials`), which the kernels of the step do on the way. NF4: QLoRA, 2305.14314, section 3.

Row-invariance: which inputs are summed in which order depends on the matrix alone, and a column of the tensor cores'
tile does not see the others. A row gives the same bits alone, among 64 and among 1,000.

Two kernels read the same packed weights: `nf4_gluon` for Hopper GPUs, and the one here in plain Triton for all others
and for Triton's interpreter. Both round the same weights and add them in the same order. For prompts, `dequantize`
gives the matrix for a product whose cost is arithmetic.

Letters: R rows, N outputs, K inputs, S partial sums.
"""

from enum import StrEnum

import torch
import triton
import triton.language as tl
from torch import Tensor

from gorgon_engine.kernels.triton.nf4_packing import BLOCK_ROWS, BLOCK_WORDS, PackedNf4, reference_weights
from gorgon_engine.kernels.triton.nf4_plan import Nf4Plan, choose_tile, plan_nf4
from gorgon_engine.kernels.triton.partials import add_partials
from gorgon_protocol.errors import ModelError

# With more, two stages do not fit in the 99 KiB of shared memory of consumers' GPUs.
_PORTABLE_MAX_BLOCK_R = 32
_SUM_BLOCK = 1024
_BLOCK_WORDS = tl.constexpr(BLOCK_WORDS)


class Nf4Variant(StrEnum):
    PORTABLE = "portable"
    REGISTERS = "registers"  # Hopper: weights straight to registers, one block ahead
    SHARED = "shared"  # Hopper: weights through a ring in shared memory, several blocks ahead


@triton.jit
def _decode_group(words_ptr, code_ptr, block, group: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Group `group` of packed block `block`: [64, 64] weights."""
    base = words_ptr + block.to(tl.int64) * _BLOCK_WORDS
    row = tl.arange(0, 64)
    lane_row = row // 16 * 128 + row % 8 * 16 + row // 8 % 2 * 2 + group // 2  # (warp, g, half, half of the inputs)
    place = tl.arange(0, 16)
    lane_input = place // 4 * 512 + place % 4 * 4  # (c, t)
    words = tl.load(base + lane_row[:, None] + lane_input[None, :])  # [64, 16]
    byte = tl.arange(0, 2)[None, :, None, None] + group % 2 * 2
    nibble = tl.arange(0, 2)[None, None, None, :]
    index = (words[:, None, :, None] >> (byte * 8 + nibble * 4)) & 15  # [64, 2, 16, 2]
    values = tl.load(code_ptr + tl.reshape(index, [64, 64])).to(dtype).to(tl.float32)
    pair = tl.load(base + 2048 + row * 2 + group // 2)
    bits = pair << 16 if group % 2 == 0 else pair & -65536
    return (values * bits.to(tl.float32, bitcast=True)[:, None]).to(dtype)


@triton.jit(do_not_specialize=["num_rows", "num_input_blocks", "span"])
def _nf4_linear_kernel(  # type: ignore[no-untyped-def]
    x_ptr, words_ptr, code_ptr, partials_ptr, num_rows, num_outputs, size, num_input_blocks, span,
    INNER: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A row block's share of one part of its tile."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_block = tl.program_id(1)
    part = tl.program_id(2)
    is_row = row < num_rows
    lane = tl.arange(0, 64)
    start = row_block // (4 // INNER) * num_input_blocks  # of the tile, in units
    cut = (start // span + part) * span
    first = tl.maximum(cut, start) - start
    steps = (tl.minimum(cut + span, start + num_input_blocks) - start - first) // INNER
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    total = tl.zeros([64, BLOCK_R], tl.float32)
    for h in tl.static_range(INNER):
        sums = tl.zeros([64, BLOCK_R], tl.float32)
        for step in range(steps):
            block = first + h * steps + step
            for group in tl.static_range(4):
                weights = _decode_group(words_ptr, code_ptr, row_block * num_input_blocks + block, group, dtype)
                column = block * 256 + group * 64 + lane
                inside = (column < size)[:, None] & is_row[None, :]
                x = tl.load(x_ptr + row.to(tl.int64)[None, :] * size + column[:, None], mask=inside, other=0.0)
                sums = tl.dot(weights, x, sums, input_precision="ieee")
        total = sums if h == 0 else total + sums
    output = row_block * 64 + lane
    at = (part * num_rows + row).to(tl.int64)[None, :] * num_outputs + output[:, None]
    inside = is_row[None, :] & (output < num_outputs)[:, None]
    tl.store(partials_ptr + at, total.to(partials_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dequantize_kernel(  # type: ignore[no-untyped-def]
    words_ptr, code_ptr, out_ptr, num_outputs, size, num_input_blocks
):
    row_block = tl.program_id(1)
    lane = tl.arange(0, 64)
    output = row_block * 64 + lane
    for group in tl.static_range(4):
        block = row_block * num_input_blocks + tl.program_id(0)
        weights = _decode_group(words_ptr, code_ptr, block, group, out_ptr.dtype.element_ty)
        column = tl.program_id(0) * 256 + group * 64 + lane
        inside = (output < num_outputs)[:, None] & (column < size)[None, :]
        tl.store(out_ptr + output.to(tl.int64)[:, None] * size + column[None, :], weights, mask=inside)


@triton.jit(do_not_specialize=["size"])
def _sum_partials_kernel(  # type: ignore[no-untyped-def]
    partials_ptr, bias_ptr, out_ptr, size, num_outputs, HAS_BIAS: tl.constexpr, NUM_PARTIALS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = add_partials(partials_ptr, at, size, inside, NUM_PARTIALS)
    if HAS_BIAS:
        total += tl.load(bias_ptr + at % num_outputs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def default_variant(device: torch.device, dtype: torch.dtype) -> Nf4Variant:
    """The kernel for rows of a dtype on a device: the Hopper kernel multiplies bfloat16 alone."""
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    if is_hopper and dtype == torch.bfloat16:
        return Nf4Variant.REGISTERS
    return Nf4Variant.PORTABLE


def nf4_linear(
    x: Tensor, weight: PackedNf4, plan: Nf4Plan | None = None, *, partials: Tensor | None = None,
    variant: Nf4Variant | None = None,
) -> Tensor:  # fmt: skip
    """x: [R, K] contiguous; partials: [S, R, N] contiguous, float32 (or any floating dtype where S = 1), overwritten;
    None = a new one. All on the weight's device. Gives `partials`.

    plan: None = `plan_nf4`; variant: None = `default_variant`. Raises `ModelError` where the variant cannot take x's
    dtype, the device or the plan.
    """
    num_rows, size = x.shape
    plan = plan_nf4(weight.num_row_blocks, weight.num_input_blocks) if plan is None else plan
    variant = default_variant(x.device, x.dtype) if variant is None else variant
    if partials is None:
        partials = x.new_empty(plan.num_partials, num_rows, weight.out_features, dtype=torch.float32)
    assert size == weight.in_features, (x.shape, weight.in_features)
    assert (plan.num_row_blocks, plan.num_input_blocks) == (weight.num_row_blocks, weight.num_input_blocks), plan
    assert partials.shape == (plan.num_partials, num_rows, weight.out_features), partials.shape
    assert partials.dtype == torch.float32 or plan.num_partials == 1, partials.dtype
    for tensor in (x, partials):
        assert tensor.is_contiguous(), tensor.stride()
        assert tensor.device == weight.words.device, (tensor.device, weight.words.device)
    if variant is not Nf4Variant.PORTABLE:
        _hopper(x, weight, plan, partials, variant)
        return partials
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ModelError(f"NF4 products take float32, float16 or bfloat16, not {x.dtype}")
    block_r = min(max(16, triton.next_power_of_2(num_rows)), _PORTABLE_MAX_BLOCK_R)
    # Tiles of rows change fastest: they share the weights while they are in the cache.
    grid = (triton.cdiv(num_rows, block_r), triton.cdiv(weight.out_features, BLOCK_ROWS), plan.num_partials)
    _nf4_linear_kernel[grid](
        x, weight.words, weight.code, partials, num_rows, weight.out_features, size, plan.num_input_blocks, plan.span,
        INNER=plan.inner_splits, BLOCK_R=block_r, num_warps=4, num_stages=2,
    )  # fmt: skip
    return partials


def _hopper(x: Tensor, weight: PackedNf4, plan: Nf4Plan, partials: Tensor, variant: Nf4Variant) -> None:
    if x.dtype != torch.bfloat16:
        raise ModelError(f"the Hopper NF4 kernel takes bfloat16, not {x.dtype}: use the portable one")
    # Here: the dialect is part of some of Triton's releases only.
    try:
        from gorgon_engine.kernels.triton import nf4_gluon
    except ImportError as error:
        raise ModelError(f"the Hopper NF4 kernel needs Triton 3.6 with Gluon: {error}") from error
    nf4_gluon.check_device(x.device)
    half_sums = partials.dtype != torch.float32
    tile = choose_tile(x.shape[0], plan.inner_splits, shared_weights=variant is Nf4Variant.SHARED, half_sums=half_sums)
    nf4_gluon.launch(x, weight, plan, partials, tile)


def sum_partials(partials: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """partials: [S, R, N]; bias: [N], added last; out: [R, N] of any floating dtype, overwritten. Contiguous."""
    num_partials, num_rows, num_outputs = partials.shape
    assert out.shape == (num_rows, num_outputs), (out.shape, partials.shape)
    assert bias is None or bias.shape == (num_outputs,), bias.shape
    for tensor in (partials, out):
        assert tensor.is_contiguous(), tensor.stride()
    grid = (triton.cdiv(out.numel(), _SUM_BLOCK),)
    _sum_partials_kernel[grid](
        partials, partials if bias is None else bias, out, out.numel(), num_outputs, HAS_BIAS=bias is not None,
        NUM_PARTIALS=num_partials, BLOCK=_SUM_BLOCK, num_warps=4,
    )  # fmt: skip


def dequantize(weight: PackedNf4, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """W [N, K]: the very values that the products multiply. out: of `dtype`, contiguous, overwritten; None = a new."""
    if out is None:
        out = torch.empty(weight.out_features, weight.in_features, dtype=dtype, device=weight.words.device)
    assert out.shape == (weight.out_features, weight.in_features), out.shape
    assert out.dtype == dtype, out.dtype
    assert out.is_contiguous(), out.stride()
    grid = (weight.num_input_blocks, triton.cdiv(weight.out_features, BLOCK_ROWS))
    _dequantize_kernel[grid](
        weight.words, weight.code, out, weight.out_features, weight.in_features, weight.num_input_blocks, num_warps=4
    )
    return out


def reference(x: Tensor, weight: PackedNf4) -> Tensor:
    """The whole product [R, N] in float64, of weights rounded to the dtype of x as the kernels round them."""
    return x.double() @ reference_weights(weight, x.dtype).double().T
