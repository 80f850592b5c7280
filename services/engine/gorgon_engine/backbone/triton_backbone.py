"""The forward pass of a GPU through the project's own Triton kernels: ten launches a layer.

The residual stream is float32; between the kernels rows are 16-bit. A product leaves partial sums [S, R, out], which
the kernel behind it adds up: no pass over them of their own. Every kernel gives a row's bits whatever the other rows,
so a token says the same as a node of any tree, decoded plainly, and as part of a prompt; the shapes depend on (B, N)
and the bound of the positions alone, and no value is looked at: a CUDA graph can hold it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gorgon_engine.backbone.base import ForwardInputs, ForwardOutput, LogitsFor, RowLogits, rows_for_logits
from gorgon_engine.backbone.triton_attention import PassAttention
from gorgon_engine.kernels.triton.dense_linear import dense_linear
from gorgon_engine.kernels.triton.nf4_linear import Nf4Variant, default_variant
from gorgon_engine.kernels.triton.nf4_packing import pack_nf4
from gorgon_engine.kernels.triton.products import DenseProduct, Nf4Product, Product
from gorgon_engine.kernels.triton.rms_norm import add_rms_norm
from gorgon_engine.kernels.triton.rope_append import rope_append
from gorgon_engine.kernels.triton.silu_mul import silu_mul
from gorgon_engine.kv_cache import KVCache
from gorgon_engine.models.config import BackboneConfig
from gorgon_engine.models.linear import DenseLinear, Linear
from gorgon_engine.models.loading import BackboneWeights
from gorgon_engine.models.nf4 import Nf4Linear

# Rows of prompts that one pass multiplies in tiles of 64. Beyond, it costs less to write the weights out first.
MAX_TILED_ROWS = 512


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Tensor  # [C]
    post_norm: Tensor  # [C]
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    qkv: Product
    o: Product
    gate_up: Product
    down: Product


@dataclass(frozen=True, slots=True)
class _Angles:
    """Of rows, or of all positions."""

    cos: Tensor  # [R, D/2] float32
    sin: Tensor  # [R, D/2] float32


class TritonBackbone:
    """A Llama-architecture model without sliding windows, its layers' matrices in NF4 or dense, the lm_head dense.

    A row's bits do not depend on the other rows, in passes over trees and over prompts of up to `MAX_TILED_ROWS` rows.
    What larger chunks of prompts leave in the cache depends on how they are cut, on nothing else.
    """

    row_invariant = True

    def __init__(
        self,
        weights: BackboneWeights,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_depth: int = 16,
        variant: Nf4Variant | None = None,
    ) -> None:
        """max_depth: of a tree's node below the root; deeper ones are verified as well, but not bit by bit as they are
        decoded. variant: of the NF4 products; None = the best one for the device.

        Packs the matrices: whoever holds the weights may drop them.
        """
        config = weights.config
        assert not any(config.sliding_windows)
        assert isinstance(weights.lm_head, DenseLinear)
        variant = variant or default_variant(device, dtype)
        self.config: BackboneConfig = config
        self.device = device
        self.dtype = dtype
        self.cache_dtype = dtype
        self.kernels = _name(weights, dtype, variant)
        self.lm_head = weights.lm_head
        self._max_depth = max_depth
        self._embedding = weights.embedding
        self._final_norm = weights.final_norm
        self._rope = weights.rope
        self._tables: dict[int, _Angles] = {}  # of all positions, by their number
        self._layers = tuple(
            _Layer(
                input_norm=layer.input_norm,
                post_norm=layer.post_norm,
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
                qkv=_product(layer.qkv, variant),
                o=_product(layer.o, variant),
                gate_up=_product(layer.gate_up, variant),
                down=_product(layer.down, variant),
            )
            for layer in weights.layers
        )

    @property
    def num_bytes(self) -> int:
        """Of the layers' matrices."""
        return sum(part.num_bytes for one in self._layers for part in (one.qkv, one.o, one.gate_up, one.down))

    def project(self, hidden: Tensor) -> Tensor:
        return self._projected(hidden, self.lm_head)

    def project_to(self, tokens: Tensor) -> Callable[[Tensor], Tensor]:
        linear = self.lm_head.select_outputs(tokens)
        return lambda hidden: self._projected(hidden, linear)

    def _projected(self, hidden: Tensor, linear: DenseLinear) -> Tensor:
        rows = hidden.to(self.dtype).reshape(-1, hidden.shape[-1]).contiguous()
        return dense_linear(rows, linear.weight, linear.bias).view(*hidden.shape[:-1], linear.out_features)

    def embed(self, tokens: Tensor) -> Tensor:
        return self._embedding[tokens]

    @torch.inference_mode()
    def forward(self, inputs: ForwardInputs, cache: KVCache, *, logits_for: LogitsFor = LogitsFor.ALL) -> ForwardOutput:
        batch, num_rows = inputs.tokens.shape
        hidden = self._hidden(inputs, cache).view(batch, num_rows, -1)
        if logits_for is LogitsFor.NONE:
            logits = hidden.new_empty(batch, 0, self.lm_head.out_features)
        else:
            logits = self.project(rows_for_logits(hidden, inputs, logits_for))
        return ForwardOutput(hidden=hidden, row_logits=RowLogits.of(logits))

    def _hidden(self, inputs: ForwardInputs, cache: KVCache) -> Tensor:
        """[B N, C] after the final norm."""
        config, eps = self.config, self.config.rms_norm_eps
        residual = self._embedding.index_select(0, inputs.tokens.flatten()).float()  # [B N, C]
        total = residual.shape[0]
        angles = self._angles(inputs, cache)
        attend = PassAttention.of(inputs, config, max_depth=self._max_depth)
        is_long = inputs.ancestors is None and total > MAX_TILED_ROWS

        def empty(*shape: int) -> Tensor:
            return torch.empty(total, *shape, dtype=self.dtype, device=self.device)

        def times(product: Product, rows: Tensor) -> Tensor:
            return product.of_many(rows) if is_long else product(rows)

        normed, gated = empty(config.hidden_size), empty(config.intermediate_size)
        query = empty(config.num_heads, config.head_dim)
        partials = None
        for number, layer in enumerate(self._layers):
            keys, values = cache.keys[number], cache.values[number]
            add_rms_norm(residual, partials, layer.input_norm, eps, normed)
            rope_append(
                times(layer.qkv, normed), angles.cos, angles.sin, slots=inputs.slots, lengths=inputs.lengths,
                keys=keys, values=values, query=query, q_norm=layer.q_norm, k_norm=layer.k_norm, eps=eps,
            )  # fmt: skip
            attended = attend(query, keys, values)
            add_rms_norm(residual, times(layer.o, attended), layer.post_norm, eps, normed)
            silu_mul(times(layer.gate_up, normed), gated)
            partials = times(layer.down, gated)
        add_rms_norm(residual, partials, self._final_norm, eps, normed)
        return normed

    def _angles(self, inputs: ForwardInputs, cache: KVCache) -> _Angles:
        """Of every row [B N, D/2]."""
        positions = inputs.positions
        if self._rope.config.depends_on_length:
            cos, sin = self._rope.cos_sin(positions, inputs.prompt_lengths[:, None])
            return _Angles(cos.flatten(0, 1).contiguous(), sin.flatten(0, 1).contiguous())
        table = self._tables.get(cache.num_positions)
        if table is None:
            every = torch.arange(cache.num_positions, device=self.device)
            table = self._tables[cache.num_positions] = _Angles(*self._rope.cos_sin(every, torch.ones_like(every)))
        rows = positions.flatten()
        return _Angles(table.cos.index_select(0, rows), table.sin.index_select(0, rows))


def _product(linear: Linear, variant: Nf4Variant) -> Product:
    if isinstance(linear, Nf4Linear):
        weight = linear.weight
        packed = pack_nf4(weight.packed, weight.absmax, weight.code, weight.out_features, weight.in_features)
        return Nf4Product.of(packed, variant, linear.bias)
    assert isinstance(linear, DenseLinear), linear
    return DenseProduct(linear.weight, linear.bias)


def _name(weights: BackboneWeights, dtype: torch.dtype, variant: Nf4Variant) -> str:
    """`triton-nf4-gluon`, `triton-nf4`, `triton-bfloat16`, ..."""
    linears = (linear for one in weights.layers for linear in (one.qkv, one.o, one.gate_up, one.down))
    if not any(isinstance(linear, Nf4Linear) for linear in linears):
        return f"triton-{str(dtype).removeprefix('torch.')}"
    return "triton-nf4" if variant is Nf4Variant.PORTABLE else "triton-nf4-gluon"
