"""The NF4 product in plain Triton against its reference, and that a row's bits are its own."""

import pytest

from support.triton_checks import run_check

PRELUDE = """
from gorgon_engine.kernels.triton.nf4_linear import (
    Nf4Variant, dequantize, nf4_linear, reference, sum_partials
)
from gorgon_engine.kernels.triton.nf4_packing import pack_nf4, reference_weights
from gorgon_engine.kernels.triton.nf4_plan import nf4_plans
from gorgon_engine.models.nf4 import Nf4Tensor


def packed(out_features, in_features):
    tensor = Nf4Tensor.quantize(torch.randn(out_features, in_features)).to(torch.device(device))
    return pack_nf4(tensor.packed, tensor.absmax, tensor.code, out_features, in_features)


def close(out, want, dtype):
    error = ((out.double() - want).norm() / want.norm()).item()
    assert error < {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype], error


portable = Nf4Variant.PORTABLE
# The interpreter's arithmetic in bfloat16 is wrong.
dtypes = [torch.float32, torch.float16, *([torch.bfloat16] if device == "cuda" else [])]
"""

SHAPES = """
for rows, out_features, in_features in {shapes}:
    for dtype in dtypes:
        weight = packed(out_features, in_features)
        x = torch.randn(rows, in_features, device=device).to(dtype)
        partials = nf4_linear(x, weight, variant=portable)
        out = torch.empty(rows, out_features, dtype=dtype, device=device)
        sum_partials(partials, out)
        close(out, reference(x, weight), dtype)
"""

PLANS = """
weight = packed(270, 768)
x = torch.randn(5, 768, device=device)
plans = nf4_plans(8, 3)
assert {(plan.inner_splits, plan.num_partials) for plan in plans} >= {(1, 1), (1, 2), (1, 3)}
deep = packed(64, 1024)
for weight, x, plan in [
    *((weight, x, plan) for plan in plans),
    *((deep, torch.randn(3, 1024, device=device), plan) for plan in nf4_plans(4, 4) if plan.inner_splits > 1),
]:
    partials = nf4_linear(x, weight, plan, variant=portable)
    assert partials.shape[0] == plan.num_partials
    bias = torch.randn(weight.out_features, device=device)
    out = torch.empty(x.shape[0], weight.out_features, device=device)
    sum_partials(partials, out, bias)
    close(out, reference(x, weight) + bias, torch.float32)
"""

ROWS = """
weight = packed(64, 512)
x = torch.randn(65, 512, device=device).half()
for plan in [plan for plan in nf4_plans(4, 2) if plan.num_partials * plan.inner_splits == 2]:
    whole = nf4_linear(x, weight, plan, variant=portable)
    for rows in (1, 16, 17):
        some = nf4_linear(x[:rows].contiguous(), weight, plan, variant=portable)
        assert torch.equal(some, whole[:, :rows]), (plan, rows)
    last = nf4_linear(x[64:].contiguous(), weight, plan, variant=portable)
    assert torch.equal(last[:, 0], whole[:, 64])
"""

DEQUANTIZE = """
weight = packed(130, 320)
for dtype in dtypes:
    assert torch.equal(dequantize(weight, dtype), reference_weights(weight, dtype))
out = torch.empty(130, 320, device=device)
assert dequantize(weight, torch.float32, out) is out
assert torch.equal(out, reference_weights(weight))
"""

CALLERS_BUFFER = """
weight = packed(64, 64)
x = torch.randn(3, 64, device=device)
partials = torch.full((1, 3, 64), torch.nan, dtype=torch.float16, device=device)
assert nf4_linear(x, weight, partials=partials, variant=portable) is partials
close(partials[0], reference(x, weight), torch.float16)
assert torch.equal(nf4_linear(x, weight), nf4_linear(x, weight, variant=portable)) or device == "cuda"
"""

ERRORS = """
from gorgon_protocol.errors import ModelError

weight = packed(64, 64)


def message(x, variant):
    try:
        nf4_linear(x, weight, variant=variant)
    except ModelError as error:
        return str(error)
    raise AssertionError("no error")


wide = torch.randn(2, 64, device=device).double()
assert "not torch.float64" in message(wide, portable)
for hopper in (Nf4Variant.REGISTERS, Nf4Variant.SHARED):
    assert "takes bfloat16, not torch.float16" in message(wide.half(), hopper)
    if device == "cpu":
        assert "needs a GPU, not cpu: use the portable one" in message(wide.bfloat16(), hopper)
"""

SMALL = [(1, 64, 64), (7, 100, 320), (16, 65, 576)]
MANY_ROWS = [(33, 64, 128), (65, 70, 320)]


@pytest.mark.parametrize("shapes", [SMALL, MANY_ROWS], ids=["few rows", "many rows"])
def test_against_the_reference(shapes: list[tuple[int, int, int]]) -> None:
    run_check(PRELUDE + SHAPES.format(shapes=shapes))


def test_every_kind_of_plan() -> None:
    run_check(PRELUDE + PLANS)


def test_a_rows_bits_are_its_own() -> None:
    run_check(PRELUDE + ROWS)


def test_dequantized_buffers_and_errors() -> None:
    run_check(PRELUDE + DEQUANTIZE + CALLERS_BUFFER + ERRORS)
