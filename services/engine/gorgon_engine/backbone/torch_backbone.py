"""The forward pass in torch operations: every device, every quantisation, and what faster kernels are checked against.

The published Llama block (2302.13971; RMSNorm 1910.07467, RoPE 2104.09864, SwiGLU 2002.05202, grouped-query attention
2305.13245) over the flat KV cache, with a tree in place of the causal mask.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gorgon_engine.backbone.base import ForwardInputs, ForwardOutput, LogitsFor, RowLogits, rows_for_logits
from gorgon_engine.kernels.tree_attention import attention_mask, tree_attention
from gorgon_engine.kv_cache import KVCache
from gorgon_engine.models.config import BackboneConfig
from gorgon_engine.models.linear import Linear
from gorgon_engine.models.loading import BackboneWeights, LayerWeights


class TorchBackbone:
    """A Llama-architecture model. Rows of one call may influence each other's last bits (library GEMMs choose their
    kernel by the number of rows), so speculation is exact up to near-ties only: `row_invariant` is False."""

    row_invariant = False

    def __init__(
        self, weights: BackboneWeights, *, device: torch.device, dtype: torch.dtype, quantization: str
    ) -> None:
        self._weights = weights
        self.config: BackboneConfig = weights.config
        self.device = device
        self.dtype = dtype
        self.cache_dtype = dtype
        self._fused_attention = _fused_attention(self.config, device, dtype)
        self.kernels = f"torch-{str(dtype).removeprefix('torch.') if quantization == 'none' else quantization}"

    def project(self, hidden: Tensor) -> Tensor:
        return self._weights.lm_head(hidden.to(self.dtype))

    def project_to(self, tokens: Tensor) -> Callable[[Tensor], Tensor]:
        linear = self.lm_head.select_outputs(tokens)
        return lambda hidden: linear(hidden.to(self.dtype))

    @property
    def lm_head(self) -> Linear:
        return self._weights.lm_head

    def embed(self, tokens: Tensor) -> Tensor:
        return self._weights.embedding[tokens]

    @torch.inference_mode()
    def forward(self, inputs: ForwardInputs, cache: KVCache, *, logits_for: LogitsFor = LogitsFor.ALL) -> ForwardOutput:
        weights = self._weights
        x = weights.embedding[inputs.tokens]  # [B, N, C]
        cos, sin = weights.rope.cos_sin(inputs.positions, inputs.prompt_lengths[:, None])  # [B, N, D/2]
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        windows = set() if self._fused_attention else set(self.config.sliding_windows)
        masks = {
            window: attention_mask(
                inputs.lengths,
                inputs.depths,
                inputs.ancestors,
                num_positions=inputs.max_positions,
                sliding_window=window,
            )
            for window in windows
        }
        for number, layer in enumerate(weights.layers):
            attended = self._attention(number, layer, x, cos, sin, inputs, cache, masks.get(layer.sliding_window))
            x = x + layer.o(attended)
            x = x + _mlp(layer, rms_norm(x, layer.post_norm, self.config.rms_norm_eps))
        hidden = rms_norm(x, weights.final_norm, self.config.rms_norm_eps)
        logits = weights.lm_head(rows_for_logits(hidden, inputs, logits_for))
        return ForwardOutput(hidden=hidden, row_logits=RowLogits.of(logits))

    def _attention(
        self,
        number: int,
        layer: LayerWeights,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        inputs: ForwardInputs,
        cache: KVCache,
        mask: Tensor | None,
    ) -> Tensor:
        config = self.config
        batch, num_rows, _ = x.shape
        qkv = layer.qkv(rms_norm(x, layer.input_norm, config.rms_norm_eps))
        qkv = qkv.view(batch, num_rows, config.num_heads + 2 * config.num_kv_heads, config.head_dim)
        q, k, v = qkv.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=2)  # [B, N, H or G, D]
        if layer.q_norm is not None and layer.k_norm is not None:
            q = rms_norm(q, layer.q_norm, config.rms_norm_eps)
            k = rms_norm(k, layer.k_norm, config.rms_norm_eps)
            rotated = apply_rope(torch.cat([q, k], dim=2), cos, sin)
        else:
            rotated = apply_rope(qkv[:, :, : config.num_heads + config.num_kv_heads], cos, sin)
        q, k = rotated.split([config.num_heads, config.num_kv_heads], dim=2)
        cache.write(number, inputs.slots, inputs.lengths, k, v)
        keys, values = cache.keys[number], cache.values[number]
        if self._fused_attention is not None:
            out = self._fused_attention(q, keys, values, inputs.slots, inputs.lengths, inputs.ancestors)
        else:
            assert mask is not None
            out = tree_attention(q, keys, values, inputs.slots, mask)
        return out.reshape(batch, num_rows, -1)


FusedAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def _fused_attention(config: BackboneConfig, device: torch.device, dtype: torch.dtype) -> FusedAttention | None:
    """The Triton kernel, where it runs what this model needs."""
    head_dim = config.head_dim
    fits = head_dim >= 16 and head_dim & (head_dim - 1) == 0 and not any(config.sliding_windows)
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or not fits:
        return None
    from gorgon_engine.kernels.triton.attention import attention

    return attention


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, the mean square in float32."""
    if x.device.type == "cuda":
        # One kernel instead of seven: a GPU waits for the host here.
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + D/2) of x [B, N, H, D] by the angles of cos, sin [B, N, D/2]."""
    low, high = x.chunk(2, dim=-1)
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)  # nothing to do where the caller did it once
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def _mlp(layer: LayerWeights, x: Tensor) -> Tensor:
    gate, up = layer.gate_up(x).chunk(2, dim=-1)
    return layer.down(torch.nn.functional.silu(gate) * up)
