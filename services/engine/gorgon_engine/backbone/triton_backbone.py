"""The forward pass of a GPU through the project's own Triton kernels: nine launches a layer.

The residual stream is float32; between the kernels rows are 16-bit. A product leaves partial sums [S, R, out], which
the kernel behind it adds up: no pass over them of their own. The products and the small kernels are made to give a
row's bits whatever the other rows; the shapes depend on (B, N) alone: a CUDA graph can hold it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gorgon_engine.backbone.base import ForwardInputs, ForwardOutput, LogitsFor, RowLogits, rows_for_logits
from gorgon_engine.kernels.triton.attention import attention
from gorgon_engine.kernels.triton.dense_linear import dense_linear
from gorgon_engine.kernels.triton.rms_norm import add_rms_norm
from gorgon_engine.kernels.triton.rope_append import rope_append
from gorgon_engine.kernels.triton.silu_mul import silu_mul
from gorgon_engine.kv_cache import KVCache
from gorgon_engine.models.config import BackboneConfig
from gorgon_engine.models.linear import DenseLinear, Linear
from gorgon_engine.models.loading import BackboneWeights


class PartialProduct(Protocol):
    """A matrix on the GPU: x [R, in] contiguous -> partial sums [S, R, out] floating, S and their order fixed by the
    matrix alone."""

    def __call__(self, x: Tensor) -> Tensor: ...


class DenseProduct:
    """A dense matrix in one sum."""

    def __init__(self, linear: DenseLinear) -> None:
        self._linear = linear

    def __call__(self, x: Tensor) -> Tensor:
        out = torch.empty(1, x.shape[0], self._linear.out_features, dtype=torch.float32, device=x.device)
        dense_linear(x, self._linear.weight, self._linear.bias, out=out[0])
        return out


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Tensor  # [C]
    post_norm: Tensor  # [C]
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    qkv: PartialProduct
    o: PartialProduct
    gate_up: PartialProduct
    down: PartialProduct


class TritonBackbone:
    """A Llama-architecture model without sliding windows, its head dimension a power of two."""

    row_invariant = False  # what it is made for, but `attention` still tiles by the number of rows

    def __init__(
        self,
        weights: BackboneWeights,
        *,
        device: torch.device,
        dtype: torch.dtype,
        kernels: str,
        pack: Callable[[Linear], PartialProduct],
    ) -> None:
        """pack: makes of each of the layers' matrices what the kernels read; the lm_head is dense."""
        config = weights.config
        assert not any(config.sliding_windows)
        assert isinstance(weights.lm_head, DenseLinear)
        self.config: BackboneConfig = config
        self.device = device
        self.dtype = dtype
        self.cache_dtype = dtype
        self.kernels = kernels
        self.lm_head = weights.lm_head
        self._embedding = weights.embedding
        self._final_norm = weights.final_norm
        self._rope = weights.rope
        self._layers = tuple(
            _Layer(
                input_norm=layer.input_norm,
                post_norm=layer.post_norm,
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
                qkv=pack(layer.qkv),
                o=pack(layer.o),
                gate_up=pack(layer.gate_up),
                down=pack(layer.down),
            )
            for layer in weights.layers
        )

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
        config, eps = self.config, self.config.rms_norm_eps
        residual = self._embedding[inputs.tokens.flatten()].float()  # [R, C]
        cos, sin = self._rope.cos_sin(inputs.positions, inputs.prompt_lengths[:, None])
        cos, sin = cos.flatten(0, 1).contiguous(), sin.flatten(0, 1).contiguous()  # [R, D/2]
        total = batch * num_rows

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=self.dtype, device=residual.device)

        normed = empty(total, config.hidden_size)
        query = empty(total, config.num_heads, config.head_dim)
        gated = empty(total, config.intermediate_size)
        partials = None
        for number, layer in enumerate(self._layers):
            add_rms_norm(residual, partials, layer.input_norm, eps, normed)
            keys, values = cache.keys[number], cache.values[number]
            rope_append(
                layer.qkv(normed),
                cos,
                sin,
                slots=inputs.slots,
                lengths=inputs.lengths,
                keys=keys,
                values=values,
                query=query,
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
                eps=eps,
            )
            rows = query.view(batch, num_rows, config.num_heads, config.head_dim)
            attended = attention(rows, keys, values, inputs.slots, inputs.lengths, inputs.ancestors)
            add_rms_norm(residual, layer.o(attended.view(total, -1)), layer.post_norm, eps, normed)
            silu_mul(layer.gate_up(normed), gated)
            partials = layer.down(gated)
        add_rms_norm(residual, partials, self._final_norm, eps, normed)
        hidden = normed.view(batch, num_rows, -1)
        return ForwardOutput(
            hidden=hidden, row_logits=RowLogits.of(self.project(rows_for_logits(hidden, inputs, logits_for)))
        )
