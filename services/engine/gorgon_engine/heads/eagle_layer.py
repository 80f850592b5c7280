"""An EAGLE head's layer as a GPU's kernels read it: its matrices as products for few rows, in NF4 or dense.

A wrong last bit of a guess changes nothing but the guess, so the layer, and a copy of the lm_head that it is read by,
may be 4-bit: a quarter of the bytes, which is what a pass of a few rows costs. What is verified never sees them.

With SmolLM2's shipped head, on ten questions of MT-bench with 6 depths and 32 nodes, the acceptance length was 2.94 in
float32, 2.88 with the layer in NF4, and 2.75 with the projection to 16,384 tokens in NF4 too. At Llama-3-8B's sizes on
an H100 the projection in NF4 takes 0.2 ms from a step of 3.9 ms, and over all of MT-bench the tokens a step stayed what
they were (docs/experiments.md).

Letters: C hidden size, V tokens that can be drafted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from gorgon_engine.heads.eagle import EagleHead, EagleShape
from gorgon_engine.kernels.triton.nf4_linear import default_variant
from gorgon_engine.kernels.triton.nf4_packing import GROUP, pack_nf4
from gorgon_engine.kernels.triton.products import DenseProduct, Nf4Product, Product
from gorgon_engine.models.linear import DenseLinear
from gorgon_engine.models.nf4 import quantize_nf4


@dataclass(frozen=True, slots=True, eq=False)
class EagleLayer:
    """The head and what its features are read by."""

    shape: EagleShape
    feature_norm: Tensor  # [C]
    embedding_norm: Tensor  # [C]
    attention_norm: Tensor  # [C]
    mlp_norm: Tensor  # [C]
    norm: Tensor  # [C]
    fc: Product
    qkv: Product
    o: Product
    gate_up: Product
    down: Product
    projection: Product  # [V, C], whole sums

    @classmethod
    def pack(cls, head: EagleHead, projection: DenseLinear, *, four_bit: bool) -> Self:
        """projection: the backbone's lm_head, of the tokens that are drafted. four_bit: the layer and the
        projection in NF4, where a matrix's input size is a multiple of 64 (the others stay dense). Weights that are
        packed are freed. Everything stays on its device, and has the dtype of the head.
        """
        dtype = head.norm.dtype

        def product(name: str) -> Product:
            weight = getattr(head, name).weight.detach()
            setattr(head, name, None)
            return _product(weight, None, dtype, four_bit=four_bit)

        def gain(name: str) -> Tensor:
            return getattr(head, name).detach().contiguous()

        return cls(
            shape=head.shape,
            feature_norm=gain("feature_norm"),
            embedding_norm=gain("embedding_norm"),
            attention_norm=gain("attention_norm"),
            mlp_norm=gain("mlp_norm"),
            norm=gain("norm"),
            fc=product("fc"),
            qkv=product("qkv"),
            o=product("o"),
            gate_up=product("gate_up"),
            down=product("down"),
            projection=_product(
                projection.weight.to(dtype),
                None if projection.bias is None else projection.bias.to(dtype),
                dtype,
                four_bit=four_bit,
                max_partials=1,
            ),
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.dtype

    @property
    def products(self) -> Sequence[Product]:
        return (self.fc, self.qkv, self.o, self.gate_up, self.down, self.projection)

    @property
    def num_bytes(self) -> int:
        """Of the matrices, the projection's copy included."""
        return sum(product.num_bytes for product in self.products)

    @property
    def is_four_bit(self) -> bool:
        return any(isinstance(product, Nf4Product) for product in self.products)


def _product(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, four_bit: bool, max_partials: int = 8
) -> Product:
    if not four_bit or bias is not None or weight.shape[1] % GROUP:
        return DenseProduct(weight, bias)
    tensor = quantize_nf4(weight)
    packed = pack_nf4(tensor.packed, tensor.absmax, tensor.code, tensor.out_features, tensor.in_features)
    return Nf4Product.of(packed, default_variant(weight.device, dtype), max_partials=max_partials)
