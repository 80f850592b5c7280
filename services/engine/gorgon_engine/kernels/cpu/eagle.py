"""Drafting with an EAGLE head in one native call: the layer, the search below the root and the tree at its end; and in
another the keys and values of what is committed.

`drafters/eagle.py` (the dynamic search) and `heads/eagle.py` say in tensor operations what comes out. The tree is the
same up to the rounding of SiLU, norms, softmax and sums. A sequence's result depends on that sequence only, to the bit,
whatever the others, their order and the number of threads.

Letters: B sequences, E rows of a sequence, S slots, G KV heads, P positions of a slot, D head dimension, H query heads,
I intermediate size, C hidden size, V tokens that can be drafted, M nodes of a tree.
"""

import ctypes
import threading
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from gorgon_engine.kernels.cpu.draft_search import (
    DraftedTrees,
    DraftVocabulary,
    LimitsFields,
    TreesFields,
    VocabularyFields,
    limits_fields,
)
from gorgon_engine.kernels.cpu.library import (
    LayerWeights,
    PackedLinear,
    PackedMatrix,
    check,
    describe,
    gather_in_arena,
)
from gorgon_engine.kernels.cpu.model import CACHE_DTYPES, MAX_HEAD_DIM


class EagleConfig(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("hidden_size", "intermediate_size")),
        *((name, ctypes.c_int64) for name in ("num_heads", "num_kv_heads", "head_dim", "max_depth")),
        ("rms_norm_eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("feature_norm", "embedding_norm", "norm")),
        ("fc", ctypes.POINTER(PackedMatrix)),
        ("layer", LayerWeights),
        ("projection", ctypes.POINTER(PackedMatrix)),
        ("vocabulary", VocabularyFields),
    )


class MemoryFields(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((name, ctypes.c_int64) for name in ("is_bf16", "num_slots", "num_positions")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin")),
    )


class EagleCommitted(ctypes.Structure):
    _fields_ = (
        ("memory", MemoryFields),
        *((name, ctypes.c_int64) for name in ("batch", "max_rows")),
        *((name, ctypes.c_void_p) for name in ("slots", "starts", "counts", "hidden", "next_tokens")),
    )


class EagleArgs(ctypes.Structure):
    _fields_ = (
        ("memory", MemoryFields),
        ("batch", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("slots", "lengths", "hidden", "root_tokens")),
        ("limits", LimitsFields),
        ("out", TreesFields),
    )


@dataclass(frozen=True, eq=False, slots=True)
class NativeEagleLayer:
    """The weights of the layer, in the order of use. Norms are gains, float32 [C]."""

    feature_norm: Tensor
    embedding_norm: Tensor
    fc: PackedLinear  # [C, 2 C]
    attention_norm: Tensor
    qkv: PackedLinear  # [(H + 2 G) D, C]
    o: PackedLinear  # [C, H D]
    mlp_norm: Tensor
    gate_up: PackedLinear  # [2 I, C]
    down: PackedLinear  # [C, I]
    norm: Tensor
    projection: PackedLinear  # [V, C]

    def linears(self) -> list[PackedLinear]:
        """In the order of use."""
        return [self.fc, self.qkv, self.o, self.gate_up, self.down, self.projection]


class NativeEagle:
    """An EAGLE head and what it reads. It owns its workspace, so calls run one at a time (a lock sees to it)."""

    def __init__(
        self,
        layer: NativeEagleLayer,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        max_depth: int,
        norm_eps: float,
        embeddings: Tensor,
        vocabulary: Tensor | None,
    ) -> None:
        """max_depth: of a tree below its root.

        embeddings: the backbone's, float32 or bfloat16 [E, C], held and not copied. vocabulary: int64 [V], the token of
        each row of the projection; None: the row itself. Raises ValueError for what does not fit together.
        """
        self._layer = layer
        self._vocabulary = DraftVocabulary(embeddings, vocabulary)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.max_depth = max_depth
        self.hidden_size = layer.fc.out_features
        self.intermediate_size = layer.down.in_features
        self.vocab_size = layer.projection.out_features
        self._check()
        self.library = layer.fc.library
        self._arena = gather_in_arena(layer.linears(), self.library)
        self.lock = threading.Lock()
        config = EagleConfig(
            self.hidden_size,
            self.intermediate_size,
            num_heads,
            num_kv_heads,
            head_dim,
            max_depth,
            norm_eps,
            *(gain.data_ptr() for gain in (layer.feature_norm, layer.embedding_norm, layer.norm)),
            ctypes.pointer(layer.fc.matrix),
            LayerWeights(
                layer.attention_norm.data_ptr(),
                layer.mlp_norm.data_ptr(),
                None,
                None,
                *(ctypes.pointer(linear.matrix) for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)),
                0,
            ),
            ctypes.pointer(layer.projection.matrix),
            self._vocabulary.fields(),
        )
        handle = self.library.handle.gorgon_eagle_create(ctypes.byref(config))
        if not handle:
            raise MemoryError("no memory for the native head")
        self.handle = ctypes.c_void_p(handle)
        weakref.finalize(self, self.library.handle.gorgon_eagle_destroy, self.handle)

    def _check(self) -> None:
        layer, size, inner, dim = self._layer, self.hidden_size, self.intermediate_size, self.head_dim
        if self.max_depth < 1:
            raise ValueError(f"max_depth must be at least 1, not {self.max_depth}")
        if self.num_kv_heads < 1 or self.num_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if dim % 2 or not 2 <= dim <= MAX_HEAD_DIM:
            raise ValueError(f"head_dim must be even and at most {MAX_HEAD_DIM}, not {dim}")
        shapes = {
            "fc": (size, 2 * size),
            "qkv": ((self.num_heads + 2 * self.num_kv_heads) * dim, size),
            "o": (size, self.num_heads * dim),
            "gate_up": (2 * inner, size),
            "down": (size, inner),
            "projection": (self.vocab_size, size),
        }
        for name, shape in shapes.items():
            linear: PackedLinear = getattr(layer, name)
            actual = (linear.out_features, linear.in_features)
            if actual != shape:
                raise ValueError(f"{name} must be {list(shape)}, not {list(actual)}")
        for name in ("feature_norm", "embedding_norm", "attention_norm", "mlp_norm", "norm"):
            check(name, getattr(layer, name), (size,), torch.float32)
        self._vocabulary.check(size, self.vocab_size)

    @property
    def memory_dtype(self) -> torch.dtype:
        """As of a backbone's cache beside weights of the same kind."""
        return torch.float32 if self._layer.qkv.kind == "fp32" else torch.bfloat16


class NativeEagleMemory:
    """What a head remembers of the texts in S slots, and drafts with. Texts that are not observed cost nothing."""

    def __init__(self, head: NativeEagle, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor) -> None:
        """keys and values: float32 or bfloat16 [S, G, P, D], both written to. cos and sin:
        float32 [P + max_depth, D / 2], rotate-half RoPE of each position. Raises ValueError for other shapes and
        dtypes.
        """
        if keys.dtype not in CACHE_DTYPES or keys.ndim != 4:
            raise ValueError(f"keys must be bf16 or fp32 [S, G, P, D], not {describe(keys)}")
        num_slots, _, num_positions, _ = keys.shape
        shape = (num_slots, head.num_kv_heads, num_positions, head.head_dim)
        angles = (num_positions + head.max_depth, head.head_dim // 2)
        self._head = head
        self._tensors = (keys, values, cos, sin)  # kept alive
        self._fields = MemoryFields(
            check("keys", keys, shape, keys.dtype),
            check("values", values, shape, keys.dtype),
            int(keys.dtype == torch.bfloat16),
            num_slots,
            num_positions,
            check("cos", cos, angles, torch.float32),
            check("sin", sin, angles, torch.float32),
        )

    def observe(self, *, slots: Tensor, starts: Tensor, counts: Tensor, hidden: Tensor, next_tokens: Tensor) -> None:
        """Remember positions that became certain, no place twice; the fields of `drafters.base.Committed`.

        slots, starts and counts: int64 [B]; hidden: float32 [B, E, C]; next_tokens: int64 [B, E]. Raises ValueError for
        other shapes and dtypes, places outside the memory and tokens without an embedding.
        """
        batch, rows = next_tokens.shape if next_tokens.ndim == 2 else (0, 0)
        committed = EagleCommitted(
            self._fields,
            batch,
            rows,
            check("slots", slots, (batch,), torch.int64),
            check("starts", starts, (batch,), torch.int64),
            check("counts", counts, (batch,), torch.int64),
            check("hidden", hidden, (batch, rows, self._head.hidden_size), torch.float32),
            check("next_tokens", next_tokens, (batch, rows), torch.int64),
        )
        with self._head.lock:
            problem = self._head.library.handle.gorgon_eagle_observe(self._head.handle, ctypes.byref(committed))
        if problem is not None:
            raise ValueError(problem.decode())

    def draft(
        self,
        *,
        slots: Tensor,
        lengths: Tensor,
        hidden: Tensor,
        root_tokens: Tensor,
        max_nodes: int,
        num_choices: int,
        width: int,
        min_path_prob: float,
    ) -> DraftedTrees:
        """The `max_nodes` likeliest paths below each root, as far as the search finds that many.

        slots: int64 [B]; lengths: int64 [B], of the texts, the root included; hidden: float32 [B, C], at the position
        before the root; root_tokens: int64 [B]. num_choices, width and min_path_prob: as in `drafters.beam.BeamLimits`.
        Raises ValueError for other shapes and dtypes, places outside the memory and a root without an embedding.
        """
        head = self._head
        limits = limits_fields(
            head.vocab_size, max_nodes=max_nodes, num_choices=num_choices, width=width, min_path_prob=min_path_prob
        )
        batch = root_tokens.shape[0] if root_tokens.ndim else 0
        trees = DraftedTrees.empty(batch, max_nodes)
        args = EagleArgs(
            self._fields,
            batch,
            check("slots", slots, (batch,), torch.int64),
            check("lengths", lengths, (batch,), torch.int64),
            check("hidden", hidden, (batch, head.hidden_size), torch.float32),
            check("root_tokens", root_tokens, (batch,), torch.int64),
            limits,
            trees.fields(),
        )
        with head.lock:
            problem = head.library.handle.gorgon_eagle_draft(head.handle, ctypes.byref(args))
        if problem is not None:
            raise ValueError(problem.decode())
        return trees
