"""The small kernels of a step against their references, and that a row's bits are its own."""

import pytest

from support.triton_checks import run_check

ADD_RMS_NORM = """
from gorgon_engine.kernels.triton.rms_norm import add_rms_norm, reference

for rows, size, parts in ((1, 48, 0), (3, 576, 1), (5, 100, 4)):
    residual = torch.randn(rows, size, device=device) * 3
    partials = torch.randn(parts, rows, size, device=device) if parts else None
    weight = torch.rand(size, device=device) + 0.5
    want, want_normed = reference(residual, partials, weight, 1e-5)
    alone = residual[:1].clone()
    normed, first = torch.empty(rows, size, device=device), torch.empty(1, size, device=device)
    add_rms_norm(residual, partials, weight, 1e-5, normed)
    torch.testing.assert_close(residual.double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(normed.double(), want_normed, atol=1e-5, rtol=1e-5)
    add_rms_norm(alone, None if partials is None else partials[:, :1].contiguous(), weight, 1e-5, first)
    assert torch.equal(normed[:1], first)
"""

SILU_MUL = """
from gorgon_engine.kernels.triton.silu_mul import reference, silu_mul

for rows, size, parts in ((1, 48, 1), (3, 1500, 2)):
    partials = torch.randn(parts, rows, 2 * size, device=device) * 4
    out = torch.empty(rows, size, device=device)
    silu_mul(partials, out)
    torch.testing.assert_close(out.double(), reference(partials), atol=1e-5, rtol=1e-5)
    half = torch.empty(rows, size, device=device, dtype=torch.float16)
    silu_mul(partials, half)
    assert torch.equal(half, out.half())
"""

ROPE_APPEND = """
from gorgon_engine.kernels.triton.rope_append import reference, rope_append

for batch, each, heads, groups, dim, parts, has_norms in ((2, 3, 4, 2, 16, 1, False), (1, 5, 6, 2, 64, 3, True)):
    rows, positions = batch * each, 40
    partials = torch.randn(parts, rows, (heads + 2 * groups) * dim, device=device)
    angles = torch.rand(rows, dim // 2, device=device) * 6
    norms = [torch.rand(dim, device=device) + 0.5 for _ in range(2)] if has_norms else [None, None]
    slots = torch.randperm(batch + 1, device=device)[:batch]
    lengths = torch.randint(0, positions - each, (batch,), device=device)
    keys = torch.randn(batch + 1, groups, positions, dim, device=device)
    values = torch.randn_like(keys)
    before = keys.clone(), values.clone()
    query = torch.empty(rows, heads, dim, device=device)
    rope_append(
        partials, angles.cos(), angles.sin(), slots=slots, lengths=lengths, keys=keys, values=values, query=query,
        q_norm=norms[0], k_norm=norms[1], eps=1e-6,
    )
    q, k, v = reference(
        partials, angles.cos(), angles.sin(), num_heads=heads, num_kv_heads=groups, q_norm=norms[0], k_norm=norms[1],
        eps=1e-6,
    )
    torch.testing.assert_close(query.double(), q, atol=1e-5, rtol=1e-5)
    for cache, old, new in ((keys, before[0], k), (values, before[1], v)):
        expected = old.double()
        for b in range(batch):
            for n in range(each):
                expected[slots[b], :, lengths[b] + n] = new[b * each + n]
        torch.testing.assert_close(cache.double(), expected, atol=1e-5, rtol=1e-5)
"""

DENSE_LINEAR = """
from gorgon_engine.kernels.triton.dense_linear import dense_linear, reference

for rows, outputs, size, has_bias in ((1, 100, 64, False), (17, 300, 200, True), (70, 129, 96, True)):
    x = torch.randn(rows, size, device=device).to(torch.{dtype})
    weight = torch.randn(outputs, size, device=device).to(torch.{dtype})
    bias = torch.randn(outputs, device=device).to(torch.{dtype}) if has_bias else None
    out = dense_linear(x, weight, bias, out=torch.empty(rows, outputs, device=device))
    want = reference(x, weight, bias)
    error = ((out.double() - want).norm() / want.norm()).item()
    assert error < 2e-3, error
    first = dense_linear(x[:1].contiguous(), weight, bias, out=torch.empty(1, outputs, device=device))
    if device == "cuda":  # the interpreter multiplies by numpy's library
        assert torch.equal(out[:1], first)
"""


@pytest.mark.parametrize("program", [ADD_RMS_NORM, SILU_MUL, ROPE_APPEND], ids=["rms_norm", "silu_mul", "rope_append"])
def test_elementwise(program: str) -> None:
    run_check(program)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dense_linear(dtype: str) -> None:
    run_check(DENSE_LINEAR.format(dtype=dtype))
