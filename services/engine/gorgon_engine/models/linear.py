"""Linear layers of a backbone in the forms that torch itself can run: dense, and int8 with exact sums.

    y[..., out] = x[..., in] @ W[out, in].T + bias[out]

All forms answer the same protocol, so that a forward pass does not know which one it calls. NF4 is in `nf4.py`; the
packed form of the native CPU kernels is in `kernels/cpu`.
"""

from collections.abc import Callable
from enum import StrEnum
from functools import cache
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional


class Linear(Protocol):
    """x [..., in] -> [..., out]."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor: ...

    def select_outputs(self, rows: Tensor) -> "Linear":
        """A copy that computes the given outputs [n] int64 only, in their order."""
        ...


class LinearRole(StrEnum):
    """Which of a backbone's matrices: precision may differ between them."""

    QKV = "qkv"  # rows of q, k and v, in this order
    O = "o"  # noqa: E741
    GATE_UP = "gate_up"  # rows of gate and up
    DOWN = "down"
    LM_HEAD = "lm_head"


# (weight [out, in], bias [out] | None, role) -> the linear that runs. The tensors may be views of a mapped file.
MakeLinear = Callable[[Tensor, Tensor | None, LinearRole], Linear]


class DenseLinear:
    """The weight as it is, in any floating dtype; x must have the same one."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight  # [out, in]
        self.bias = bias  # [out]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)

    def select_outputs(self, rows: Tensor) -> "DenseLinear":
        return DenseLinear(self.weight[rows], None if self.bias is None else self.bias[rows])


class Int8Linear:
    """Symmetric int8: one scale per output channel of the weight, one per row of x, measured as it comes.

        y[r, n] = (sum_k xq[r, k] * wq[n, k]) * x_scale[r] * w_scale[n] + bias[n],   scale = absmax / 127

    The sums are exact int32, so a row's result cannot depend on how many rows there are. CPU, float32 in and out.
    """

    def __init__(self, quantized: Tensor, scales: Tensor, bias: Tensor | None = None) -> None:
        self.quantized = quantized  # [out, in] int8
        self.scales = scales  # [out] float32
        self.bias = bias  # [out] float32

    @classmethod
    def quantize(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        """weight: [out, in], bias: [out], any floating dtype."""
        quantized, scales = quantize_rows(weight.float())
        return cls(quantized, scales, None if bias is None else bias.float())

    @property
    def in_features(self) -> int:
        return self.quantized.shape[1]

    @property
    def out_features(self) -> int:
        return self.quantized.shape[0]

    def dequantize(self) -> Tensor:
        """[out, in] float32."""
        return self.quantized.float() * self.scales[:, None]

    def __call__(self, x: Tensor) -> Tensor:
        rows, row_scales = quantize_rows(x.reshape(-1, self.in_features).float())
        sums = int8_matmul(rows, self.quantized)  # [rows, out] int32
        y = sums.float() * row_scales[:, None] * self.scales
        if self.bias is not None:
            y += self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def select_outputs(self, rows: Tensor) -> "Int8Linear":
        return Int8Linear(self.quantized[rows], self.scales[rows], None if self.bias is None else self.bias[rows])


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, n] float32 -> (int8 [rows, n], scales [rows] float32), rounding half to even; zero rows get scale 1."""
    scales = x.abs().amax(dim=1) / 127.0
    scales = torch.where(scales > 0, scales, 1.0)
    return (x / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] int8, b [n, k] int8 -> a @ b.T [m, n] int32, exact. CPU."""
    if a.shape[1] > 1 and _torch_int8_is_exact():  # torch 2.13 gives zeros for k = 1
        return torch._int_mm(a, b.t())
    return int8_matmul_by_float(a, b)


# Up to this many products of two int8 stay below 2^24 in sum, where float32 still counts every integer.
_EXACT_FLOAT_TERMS = 2**24 // (127 * 127)


def int8_matmul_by_float(a: Tensor, b: Tensor) -> Tensor:
    """`int8_matmul` out of float32 products over slices of k that are short enough to be exact in any order."""
    sums = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for left, right in zip(a.split(_EXACT_FLOAT_TERMS, dim=1), b.split(_EXACT_FLOAT_TERMS, dim=1), strict=True):
        sums += functional.linear(left.float(), right.float()).to(torch.int32)
    return sums


@cache
def _torch_int8_is_exact() -> bool:
    """Before VNNI, x86 adds two int8 products in 16 bits, which saturates: libraries differ in whether they care."""
    k = 256
    a = torch.full((2, k), 127, dtype=torch.int8)
    b = torch.full((16, k), -127, dtype=torch.int8)
    return bool((torch._int_mm(a, b.t()) == -127 * 127 * k).all())
