from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon_engine.kernels.cpu import PackedLinear
from gorgon_engine.models.linear import DenseLinear, Int8Linear, Linear, int8_matmul, int8_matmul_by_float
from gorgon_engine.models.nf4 import Nf4Linear, Nf4Tensor
from gorgon_protocol.errors import ModelError


@given(st.integers(1, 40), st.integers(1, 3000), st.integers(1, 50), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_int8_products_are_exact(m, k, n, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(-127, 128, (m, k), generator=generator, dtype=torch.int8)
    b = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    a[0], b[0] = 127, -127  # the largest sums
    expected = a.long() @ b.long().T
    assert torch.equal(int8_matmul(a, b).long(), expected)
    assert torch.equal(int8_matmul_by_float(a, b).long(), expected)


def test_int8_is_close_to_the_weight_and_exact_in_its_own_terms():
    torch.manual_seed(0)
    weight, bias, x = torch.randn(48, 80), torch.randn(48), torch.randn(2, 5, 80)
    linear = Int8Linear.quantize(weight.bfloat16(), bias)
    assert (linear.in_features, linear.out_features) == (80, 48)
    assert linear.quantized.dtype == torch.int8
    step = weight.bfloat16().float().abs().amax(1, keepdim=True) / 127
    assert ((linear.dequantize() - weight.bfloat16().float()).abs() <= step * 0.5001).all()
    y = linear(x)
    assert y.shape == (2, 5, 48)
    error = (y - DenseLinear(weight, bias)(x)).norm() / y.norm()
    assert error < 0.02


def test_int8_rows_do_not_depend_on_each_other():
    torch.manual_seed(1)
    linear = Int8Linear.quantize(torch.randn(33, 70), torch.randn(33))
    x = torch.randn(40, 70) * torch.logspace(-3, 3, 40)[:, None]
    together = linear(x)
    for row in range(40):
        assert torch.equal(linear(x[row]), together[row])
    order = torch.randperm(40)
    assert torch.equal(linear(x[order]), together[order])


def test_int8_of_zeros_is_the_bias():
    bias = torch.randn(4)
    linear = Int8Linear.quantize(torch.zeros(4, 8), bias)
    assert torch.equal(linear(torch.ones(1, 8))[0], bias)
    assert torch.equal(Int8Linear.quantize(torch.ones(4, 8), bias)(torch.zeros(1, 8))[0], bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_is_code_times_scale_rounded_once(dtype):
    torch.manual_seed(2)
    tensor = Nf4Tensor.quantize(torch.randn(24, 128).to(dtype))
    index = torch.stack([tensor.packed >> 4, tensor.packed & 15], dim=1).flatten().long()
    expected = (tensor.code[index].view(-1, 64) * tensor.absmax[:, None]).view(24, 128).to(dtype)
    assert torch.equal(tensor.dequantize(dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_nf4_product_is_that_of_its_dequantised_weight(dtype, rows):
    torch.manual_seed(3)
    weight, bias, x = (
        torch.randn(32, 192, dtype=dtype),
        torch.randn(32, dtype=dtype),
        torch.randn(rows, 192, dtype=dtype),
    )
    linear = Nf4Linear.quantize(weight, bias)
    assert (linear.in_features, linear.out_features) == (192, 32)
    expected = torch.nn.functional.linear(x, linear.dequantize(dtype), bias)
    torch.testing.assert_close(linear(x), expected)
    torch.testing.assert_close(linear(x[:, None]), expected[:, None])
    assert (linear.dequantize() - weight.float()).norm() / weight.float().norm() < 0.12


def test_nf4_matrices_are_fused_without_requantising():
    torch.manual_seed(4)
    parts = [Nf4Tensor.quantize(torch.randn(rows, 64)) for rows in (8, 2, 6)]
    fused = Nf4Tensor.concat(parts)
    assert fused.out_features == 16
    assert torch.equal(fused.dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_nf4_refuses_rows_that_share_scales():
    with pytest.raises(ModelError, match="multiple of 64, not 96"):
        Nf4Tensor.quantize(torch.randn(4, 96))


def dense_of_integers(weight: torch.Tensor, bias: torch.Tensor | None) -> DenseLinear:
    """Small integers: sums are exact in any order, so a library's choice of kernel cannot show."""
    return DenseLinear((weight * 4).round(), None if bias is None else (bias * 4).round())


SELECTABLE: dict[str, Callable[[torch.Tensor, torch.Tensor | None], Linear]] = {
    "dense": dense_of_integers,
    "int8": Int8Linear.quantize,
    "packed-fp32": lambda weight, bias: PackedLinear.pack(weight, bias, "fp32"),
    "packed-bf16": lambda weight, bias: PackedLinear.pack(weight, bias, "bf16"),
    "packed-int8": lambda weight, bias: PackedLinear.pack(weight, bias, "int8"),
}


def selections(out_features: int) -> list[torch.Tensor]:
    """One output, all of them, some in any order, and one several times."""
    generator = torch.Generator().manual_seed(out_features)
    mixed = torch.randint(out_features, (out_features // 2 + 3,), generator=generator)
    return [torch.tensor([out_features - 1]), torch.arange(out_features), mixed, torch.zeros(40, dtype=torch.int64)]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(48, 70), (64, 32), (33, 5), (130, 101), (2, 1)])
@pytest.mark.parametrize("kind", SELECTABLE)
def test_selected_outputs_are_those_of_the_whole_product(kind: str, inputs: int, outputs: int, with_bias: bool) -> None:
    """To the bit, whatever panel or scale an output came from."""
    generator = torch.Generator().manual_seed(inputs * 1000 + outputs)
    # Rows of very different sizes have very different scales.
    weight = torch.randn(outputs, inputs, generator=generator) * torch.logspace(-2, 1, outputs)[:, None]
    bias = torch.randn(outputs, generator=generator) if with_bias else None
    linear = SELECTABLE[kind](weight, bias)
    x = torch.randn(2, 3, inputs, generator=generator)
    x = (x * 4).round() if kind == "dense" else x
    whole = linear(x)
    for rows in selections(outputs):
        chosen = linear.select_outputs(rows)
        assert (chosen.in_features, chosen.out_features) == (inputs, rows.numel())
        assert torch.equal(chosen(x), whole[..., rows])
        again = chosen.select_outputs(torch.tensor([rows.numel() - 1]))
        assert torch.equal(again(x), whole[..., rows[-1:]])
    assert torch.equal(linear(x), whole), "the whole one is as it was"


@given(st.integers(1, 90), st.integers(1, 60), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_packed_int8_scales_survive_a_selection(outputs: int, inputs: int, seed: int) -> None:
    """The rows are packed anew from their values: their scales must come out as they were, rows of zeros as well."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator) * 10 ** (
        8 * torch.rand(outputs, 1, generator=generator) - 4
    )
    weight[:: int(torch.randint(1, 9, (1,), generator=generator))] *= 0
    linear = PackedLinear.pack(weight, None, "int8")
    rows = torch.randint(outputs, (outputs,), generator=generator)
    chosen = linear.select_outputs(rows)
    assert torch.equal(chosen.dequantized(), linear.dequantized()[rows])
    x = torch.randn(3, inputs, generator=generator)
    assert torch.equal(chosen(x), linear(x)[:, rows])


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("outputs", [5, 32, 70])
def test_selected_nf4_outputs_keep_their_codes_and_scales(outputs: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(outputs)
    weight = torch.randn(outputs, 192, generator=generator)
    bias = torch.randn(outputs, generator=generator) if with_bias else None
    linear = Nf4Linear.quantize(weight, bias)
    x = torch.randn(3, 192, generator=generator)
    whole = linear(x)
    for rows in selections(outputs):
        chosen = linear.select_outputs(rows)
        assert (chosen.in_features, chosen.out_features) == (192, rows.numel())
        assert torch.equal(chosen.dequantize(), linear.dequantize()[rows])
        # The product is the library's: its kernels may differ in the last bits with the number of outputs.
        torch.testing.assert_close(chosen(x), whole[:, rows], atol=1e-5, rtol=1e-5)
