import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon_engine.models.linear import DenseLinear, Int8Linear, int8_matmul, int8_matmul_by_float
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
