"""Quantising without bitsandbytes gives what bitsandbytes gives."""

import subprocess
import sys

import pytest
import torch

from gorgon_engine.models import nf4
from gorgon_engine.models.nf4 import Nf4Tensor, quantize_nf4
from gorgon_protocol.errors import ModelError


def matrix(rows: int, columns: int) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.05
    weight[3] = 0.0
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_what_bitsandbytes_makes_of_it(dtype: torch.dtype) -> None:
    weight = matrix(96, 192).to(dtype)
    ours, theirs = quantize_nf4(weight), Nf4Tensor.quantize(weight)
    assert torch.equal(ours.absmax, theirs.absmax)
    assert torch.equal(ours.code, theirs.code)
    assert (ours.out_features, ours.in_features) == (96, 192)
    # A value on the middle of two codes may go either way, and narrow dtypes have such values.
    assert (ours.packed != theirs.packed).float().mean().item() < 1e-3
    assert not ours.dequantize()[3].any()


def test_the_nearest_value_of_the_code_is_taken() -> None:
    weight = matrix(8, 128)
    quantized = quantize_nf4(weight)
    scales = quantized.absmax.repeat_interleave(64).view(8, 128)
    distances = (weight[..., None] - quantized.code * scales[..., None]).abs()
    taken = (weight - quantized.dequantize()).abs()
    torch.testing.assert_close(taken, distances.amin(dim=-1), rtol=0, atol=1e-7)


def test_pieces_are_no_other_than_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(100, 64)
    whole = quantize_nf4(weight)
    monkeypatch.setattr(nf4, "_ROWS_AT_A_TIME", 7)
    pieces = quantize_nf4(weight)
    assert torch.equal(pieces.packed, whole.packed)
    assert torch.equal(pieces.absmax, whole.absmax)


def test_a_transposed_matrix_is_read_as_it_is_seen() -> None:
    weight = matrix(64, 128)
    assert torch.equal(quantize_nf4(weight.T).packed, quantize_nf4(weight.T.contiguous()).packed)


def test_it_needs_whole_blocks() -> None:
    with pytest.raises(ModelError, match="multiple of 64, not 96"):
        quantize_nf4(torch.zeros(4, 96))


def test_it_needs_no_bitsandbytes() -> None:
    program = """
import sys
sys.modules["bitsandbytes"] = None
import torch
from gorgon_engine.models.nf4 import quantize_nf4
quantize_nf4(torch.ones(2, 64))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
