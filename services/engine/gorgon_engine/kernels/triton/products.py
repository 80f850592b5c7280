"""A model's matrices as the kernels of a step multiply them: in partial sums that the next kernel adds up.

For few rows a product costs the reading of its weights, and a row's bits are its own (`nf4_linear`, `dense_linear`).
For a long piece of a prompt it costs arithmetic: there the weights are written out once, and a library multiplies.

Letters: R rows, S partial sums.
"""

from typing import Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional

from gorgon_engine.kernels.triton.dense_linear import dense_linear
from gorgon_engine.kernels.triton.nf4_linear import Nf4Variant, dequantize, nf4_linear, sum_partials
from gorgon_engine.kernels.triton.nf4_packing import PackedNf4
from gorgon_engine.kernels.triton.nf4_plan import Nf4Plan, plan_nf4


class Product(Protocol):
    """A matrix [out, in] on a GPU."""

    def __call__(self, x: Tensor) -> Tensor:
        """x: [R, in] contiguous -> partial sums [S, R, out] float32, S and what is summed in which order fixed by the
        matrix alone."""
        ...

    def of_many(self, x: Tensor) -> Tensor:
        """The same for rows by the hundred: sooner, but in an order that may depend on their number. [1, R, out] in
        the dtype of x."""
        ...

    @property
    def num_bytes(self) -> int: ...


class DenseProduct:
    """In one sum."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight: [out, in] in the dtype of the rows; bias: [out]."""
        self._weight = weight.contiguous()
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        out = torch.empty(1, x.shape[0], self._weight.shape[0], dtype=torch.float32, device=x.device)
        dense_linear(x, self._weight, self._bias, out=out[0])
        return out

    def of_many(self, x: Tensor) -> Tensor:
        return functional.linear(x, self._weight, self._bias)[None]

    @property
    def num_bytes(self) -> int:
        return self._weight.numel() * self._weight.element_size()


class Nf4Product:
    """In the partial sums of its plan; in one where there is a bias to add."""

    def __init__(self, weight: PackedNf4, plan: Nf4Plan, variant: Nf4Variant, bias: Tensor | None = None) -> None:
        """bias: [out], in the dtype of the rows."""
        self._weight = weight
        self._plan = plan
        self._variant = variant
        self._bias = bias

    @classmethod
    def of(cls, weight: PackedNf4, variant: Nf4Variant, bias: Tensor | None = None, *, max_partials: int = 8) -> Self:
        """max_partials: 1 for a product that is read as it is."""
        plan = plan_nf4(weight.num_row_blocks, weight.num_input_blocks, max_partials=max_partials)
        return cls(weight, plan, variant, bias)

    def __call__(self, x: Tensor) -> Tensor:
        partials = nf4_linear(x, self._weight, self._plan, variant=self._variant)
        if self._bias is None:
            return partials
        whole = torch.empty_like(partials[:1])
        sum_partials(partials, whole[0], self._bias)
        return whole

    def of_many(self, x: Tensor) -> Tensor:
        # The caching allocator gives each layer the memory that the last one has left.
        return functional.linear(x, dequantize(self._weight, x.dtype), self._bias)[None]

    @property
    def num_bytes(self) -> int:
        return self._weight.num_bytes
