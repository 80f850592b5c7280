"""An EAGLE head's layer as a GPU's kernels read it: its matrices as products for few rows, in NF4 or dense.

A wrong last bit of a guess changes nothing but the guess, so the layer, and a copy of the lm_head that it is read by,
may be 4-bit: a quarter of the bytes, which is what a pass of a few rows costs. What is verified never sees them.

With SmolLM2's shipped head, on ten questions of MT-bench with 6 depths and 32 nodes, the acceptance length was 2.94 in
float32 and 2.88 with the layer in NF4; then 2.78 with half of the 16,384 tokens that are drafted, or 2.75 with the
projection to all of them in NF4. The layer is worth it; a smaller projection gains about what it loses.

Letters: R rows, S partial sums, C hidden size, V tokens that can be drafted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from gorgon_engine.heads.eagle import EagleHead, EagleShape
from gorgon_engine.kernels.triton.dense_linear import dense_linear
from gorgon_engine.kernels.triton.nf4_linear import Nf4Variant, default_variant, nf4_linear
from gorgon_engine.kernels.triton.nf4_packing import GROUP, PackedNf4, pack_nf4
from gorgon_engine.kernels.triton.nf4_plan import Nf4Plan, plan_nf4
from gorgon_engine.models.linear import DenseLinear
from gorgon_engine.models.nf4 import Nf4Tensor
from gorgon_protocol.errors import ModelError

_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_ROWS_AT_A_TIME = 4096  # of a matrix that is quantised: bounds what it needs beside


class Product(Protocol):
    """A matrix [out, in]."""

    def __call__(self, x: Tensor) -> Tensor:
        """x: [R, in] contiguous -> partial sums [S, R, out] float32, S fixed by the matrix."""
        ...

    @property
    def num_bytes(self) -> int: ...


class DenseProduct:
    """In one sum."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight = weight.contiguous()
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        out = torch.empty(1, x.shape[0], self._weight.shape[0], dtype=torch.float32, device=x.device)
        dense_linear(x, self._weight, self._bias, out=out[0])
        return out

    @property
    def num_bytes(self) -> int:
        return self._weight.numel() * self._weight.element_size()


class Nf4Product:
    """In the partial sums of its plan."""

    def __init__(self, weight: PackedNf4, plan: Nf4Plan, variant: Nf4Variant) -> None:
        self._weight = weight
        self._plan = plan
        self._variant = variant

    @classmethod
    def of(cls, weight: PackedNf4, dtype: torch.dtype, *, max_partials: int = 8) -> Self:
        """dtype: of the rows that come. max_partials: 1 for a product that is read as it is."""
        plan = plan_nf4(weight.num_row_blocks, weight.num_input_blocks, max_partials=max_partials)
        return cls(weight, plan, default_variant(weight.words.device, dtype))

    def __call__(self, x: Tensor) -> Tensor:
        return nf4_linear(x, self._weight, self._plan, variant=self._variant)

    @property
    def num_bytes(self) -> int:
        return self._weight.num_bytes


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
    def pack(
        cls, head: EagleHead, projection: DenseLinear, *, four_bit: bool, four_bit_projection: bool = False
    ) -> Self:
        """projection: the backbone's lm_head, of the tokens that are drafted. four_bit: the layer in NF4, where its
        matrices' input sizes are multiples of 64 (the others stay dense); four_bit_projection: the projection likewise.
        Weights that are packed are freed. Everything stays on its device, and has the dtype of the head.
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
                four_bit=four_bit_projection,
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
    return Nf4Product.of(packed, dtype, max_partials=max_partials)


def quantize_nf4(weight: Tensor) -> Nf4Tensor:
    """weight: [out, in] floating, `in` a multiple of 64, on any device, where the result stays.

    The nearest value of the code for weight / absmax (QLoRA, 2305.14314, section 3), as bitsandbytes does it, without
    needing its kernels for the GPU. Raises `ModelError` for another input size.
    """
    out_features, in_features = weight.shape
    if in_features % GROUP:
        raise ModelError(f"NF4 needs matrices whose input size is a multiple of {GROUP}, not {in_features}")
    code = torch.tensor(_CODE, device=weight.device)
    middles = (code[1:] + code[:-1]) / 2
    packed, absmax = [], []
    for rows in weight.split(_ROWS_AT_A_TIME):
        blocks = rows.float().reshape(-1, GROUP)
        largest = blocks.abs().amax(dim=1)
        scaled = blocks / torch.where(largest > 0, largest, 1.0)[:, None]
        indices = torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8).view(-1, 2)
        packed.append((indices[:, 0] << 4) | indices[:, 1])
        absmax.append(largest)
    return Nf4Tensor(torch.cat(packed), torch.cat(absmax), code, out_features, in_features)
