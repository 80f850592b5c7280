"""A whole backbone forward in one native call, in fp32, bf16 or int8 weights.

R rows, C hidden size, I intermediate size, H query heads, G kv heads, D head dim, V vocabulary, M rows with logits,
L layers, S slots, P positions of a slot, W words of ancestors.

A row's hidden state and logits are the same bits whatever the other rows, their order and the number of threads, and
whether a key is reached through the contiguous prefix or through the ancestors (src/linear.h and src/attention.h say
how). With a bf16 cache the scaled query and the attention weights are rounded to bf16 too, as their factors are.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gorgon_engine.kernels.cpu.library import (
    ForwardArgs,
    LayerWeights,
    ModelConfig,
    PackedLinear,
    check,
    describe,
    gather_in_arena,
)

MAX_HEAD_DIM = 512
MAX_TREE_WORDS = 2
CACHE_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class NativeLayer:
    input_norm: Tensor  # fp32 [C]
    post_norm: Tensor  # fp32 [C]
    q_norm: Tensor | None  # fp32 [D]
    k_norm: Tensor | None  # fp32 [D]
    qkv: PackedLinear  # [(H + 2 G) D, C]
    o: PackedLinear  # [C, H D]
    gate_up: PackedLinear  # [2 I, C]
    down: PackedLinear  # [C, I]
    sliding_window: int = 0  # 0: none


class NativeModel:
    """A Llama-style backbone. It owns its workspace, so forwards of one model run one at a time (a lock sees to it)."""

    def __init__(
        self,
        layers: Sequence[NativeLayer],
        final_norm: Tensor,
        lm_head: PackedLinear,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rms_norm_eps: float,
    ) -> None:
        if not layers:
            raise ValueError("a model needs at least one layer")
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}")
        if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
            raise ValueError(f"head_dim must be even and at most {MAX_HEAD_DIM}, not {head_dim}")
        self.layers = tuple(layers)
        self.final_norm = final_norm
        self.lm_head = lm_head
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.hidden_size = lm_head.in_features
        self.intermediate_size = self.layers[0].down.in_features
        self.vocab_size = lm_head.out_features
        self._check_weights()
        self._library = lm_head.library
        self._arena = gather_in_arena(self.linears(), self._library)
        self._lock = threading.Lock()
        descriptions = (LayerWeights * len(self.layers))(*(describe_layer(layer) for layer in self.layers))
        config = ModelConfig(
            len(self.layers),
            self.hidden_size,
            self.intermediate_size,
            num_heads,
            num_kv_heads,
            head_dim,
            rms_norm_eps,
            descriptions,
            final_norm.data_ptr(),
            ctypes.pointer(lm_head.matrix),
        )
        handle = self._library.handle.gorgon_model_create(ctypes.byref(config))
        if not handle:
            raise MemoryError("no memory for the native model")
        self._handle = ctypes.c_void_p(handle)
        weakref.finalize(self, self._library.handle.gorgon_model_destroy, self._handle)

    def linears(self) -> list[PackedLinear]:
        return [linear for x in self.layers for linear in (x.qkv, x.o, x.gate_up, x.down)] + [self.lm_head]

    def _check_weights(self) -> None:
        hidden, inner, dim = self.hidden_size, self.intermediate_size, self.head_dim
        check("final_norm", self.final_norm, (hidden,), torch.float32)
        for index, layer in enumerate(self.layers):
            shapes = {
                "qkv": (layer.qkv, (self.num_heads + 2 * self.num_kv_heads) * dim, hidden),
                "o": (layer.o, hidden, self.num_heads * dim),
                "gate_up": (layer.gate_up, 2 * inner, hidden),
                "down": (layer.down, hidden, inner),
            }
            for name, (linear, rows, columns) in shapes.items():
                actual = [linear.out_features, linear.in_features]
                if actual != [rows, columns]:
                    raise ValueError(f"layer {index}: {name} must be {[rows, columns]}, not {actual}")
            check(f"layer {index}: input_norm", layer.input_norm, (hidden,), torch.float32)
            check(f"layer {index}: post_norm", layer.post_norm, (hidden,), torch.float32)
            for name, norm in (("q_norm", layer.q_norm), ("k_norm", layer.k_norm)):
                if norm is not None:
                    check(f"layer {index}: {name}", norm, (dim,), torch.float32)
            if layer.sliding_window < 0:
                raise ValueError(f"layer {index}: sliding_window must not be negative, not {layer.sliding_window}")

    def forward(
        self,
        *,
        embeddings: Tensor,  # fp32 [R, C]
        cos: Tensor,  # fp32 [R, D / 2], rotate-half RoPE of each row's position
        sin: Tensor,  # fp32 [R, D / 2]
        slots: Tensor,  # int32 [R]
        write_positions: Tensor,  # int32 [R]: the row's key and value go here
        prefix_lengths: Tensor,  # int32 [R]: the row attends to positions [0, prefix) of its slot
        tree_base: Tensor,  # int32 [R]
        ancestors: Tensor,  # int64 [R, W]: and to tree_base + bit for each set bit, ascending; itself included
        keys: Tensor,  # bf16 or fp32 [L, S, G, P, D]
        values: Tensor,  # as keys
        logits_rows: Tensor | None,  # int32 [M]; None: all rows; empty: none
        out_hidden: Tensor,  # fp32 [R, C], after the final norm
        out_logits: Tensor,  # fp32 [M, V]
    ) -> None:
        """All rows' keys and values of a layer are written before any row of that layer attends."""
        rows, half = embeddings.shape[0], self.head_dim // 2
        if keys.dtype not in CACHE_DTYPES or keys.ndim != 5:
            raise ValueError(f"keys must be bf16 or fp32 [L, S, G, P, D], not {describe(keys)}")
        slots_in_cache, positions = keys.shape[1], keys.shape[3]
        cache_shape = (len(self.layers), slots_in_cache, self.num_kv_heads, positions, self.head_dim)
        words = ancestors.shape[-1] if ancestors.ndim == 2 else 0
        if not 1 <= words <= MAX_TREE_WORDS:
            raise ValueError(f"ancestors must be int64 [R, 1 or {MAX_TREE_WORDS}], not {describe(ancestors)}")
        num_logits = rows if logits_rows is None else logits_rows.numel()
        args = ForwardArgs(
            rows,
            check("embeddings", embeddings, (rows, self.hidden_size), torch.float32),
            check("cos", cos, (rows, half), torch.float32),
            check("sin", sin, (rows, half), torch.float32),
            check("slots", slots, (rows,), torch.int32),
            check("write_positions", write_positions, (rows,), torch.int32),
            check("prefix_lengths", prefix_lengths, (rows,), torch.int32),
            check("tree_base", tree_base, (rows,), torch.int32),
            check("ancestors", ancestors, (rows, words), torch.int64),
            words,
            check("keys", keys, cache_shape, keys.dtype),
            check("values", values, cache_shape, keys.dtype),
            int(keys.dtype == torch.bfloat16),
            slots_in_cache,
            positions,
            None if logits_rows is None else check("logits_rows", logits_rows, (num_logits,), torch.int32),
            num_logits,
            check("out_hidden", out_hidden, (rows, self.hidden_size), torch.float32),
            check("out_logits", out_logits, (num_logits, self.vocab_size), torch.float32),
        )
        with self._lock:
            problem = self._library.handle.gorgon_model_forward(self._handle, ctypes.byref(args))
        if problem is not None:
            raise ValueError(problem.decode())


def describe_layer(layer: NativeLayer) -> LayerWeights:
    def address(norm: Tensor | None) -> int | None:
        return None if norm is None else norm.data_ptr()

    return LayerWeights(
        address(layer.input_norm),
        address(layer.post_norm),
        address(layer.q_norm),
        address(layer.k_norm),
        *(ctypes.pointer(linear.matrix) for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)),
        layer.sliding_window,
    )
