"""ctypes bindings of the CPU kernels: every shape, stride, dtype and device is checked here, before C++ sees a pointer.

The numerics are in src/: linear.h, attention.h and elementwise.h say what makes a row's bits its own.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gorgon_engine.kernels.cpu.build import NativeKernelsUnavailable, build_library

Kind = Literal["fp32", "bf16", "int8"]

KIND_CODES: dict[Kind, int] = {"fp32": 0, "bf16": 1, "int8": 2}
VALUES_PER_WORD: dict[Kind, int] = {"fp32": 1, "bf16": 2, "int8": 4}  # a 32-bit word of packed weights
PANEL = 32
HUGE_PAGE = 2 << 20


class PackedMatrix(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("has_bias", ctypes.c_int32),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class LayerWeights(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        *((name, ctypes.POINTER(PackedMatrix)) for name in ("qkv", "o", "gate_up", "down")),
        ("sliding_window", ctypes.c_int64),
    )


class ModelConfig(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_layers", "hidden_size", "intermediate_size")),
        *((name, ctypes.c_int64) for name in ("num_heads", "num_kv_heads", "head_dim")),
        ("rms_norm_eps", ctypes.c_float),
        ("layers", ctypes.POINTER(LayerWeights)),
        ("final_norm", ctypes.c_void_p),
        ("lm_head", ctypes.POINTER(PackedMatrix)),
    )


class ForwardArgs(ctypes.Structure):
    _fields_ = (
        ("num_rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("embeddings", "cos", "sin", "slots", "write_positions")),
        *((name, ctypes.c_void_p) for name in ("prefix_lengths", "tree_base", "ancestors")),
        ("num_words", ctypes.c_int64),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("cache_is_bf16", ctypes.c_int32),
        ("num_slots", ctypes.c_int64),
        ("num_positions", ctypes.c_int64),
        ("logits_rows", ctypes.c_void_p),
        ("num_logits", ctypes.c_int64),
        ("out_hidden", ctypes.c_void_p),
        ("out_logits", ctypes.c_void_p),
    )


class NativeLibrary:
    """The loaded shared library. Its thread pool is one per library and shared by all models."""

    def __init__(self, path: Path) -> None:
        try:
            self.handle = ctypes.CDLL(str(path))
        except OSError as error:
            raise NativeKernelsUnavailable(f"cannot load {path}: {error}") from error
        pointer = ctypes.c_void_p
        self._declare("gorgon_instruction_set", ctypes.c_char_p)
        self._declare("gorgon_set_num_threads", None, ctypes.c_int)
        self._declare("gorgon_get_num_threads", ctypes.c_int)
        self._declare("gorgon_advise_huge_pages", None, pointer, ctypes.c_int64)
        self._declare("gorgon_linear", ctypes.c_int, ctypes.POINTER(PackedMatrix), pointer, ctypes.c_int64, pointer)
        shape = (ctypes.c_int64, ctypes.c_int64)
        self._declare("gorgon_gumbel_argmax", ctypes.c_int, pointer, *shape, pointer, pointer, ctypes.c_int32, pointer)
        self._declare("gorgon_top_log_probs", ctypes.c_int, pointer, *shape, ctypes.c_int64, pointer, pointer)
        self._declare("gorgon_rms_norm", None, pointer, pointer, *shape, ctypes.c_float, pointer)
        self._declare("gorgon_add_silu", None, pointer, pointer, ctypes.c_int64, pointer)
        for name in ("gorgon_lookup", "gorgon_merge_candidates", "gorgon_flatten"):
            self._declare(name, ctypes.c_char_p, pointer)
        for family in ("hydra", "eagle"):
            self._declare(f"gorgon_{family}_create", pointer, pointer)
            self._declare(f"gorgon_{family}_destroy", None, pointer)
            self._declare(f"gorgon_{family}_draft", ctypes.c_char_p, pointer, pointer)
        self._declare("gorgon_eagle_observe", ctypes.c_char_p, pointer, pointer)
        self._declare("gorgon_model_create", pointer, ctypes.POINTER(ModelConfig))
        self._declare("gorgon_model_destroy", None, pointer)
        self._declare("gorgon_model_forward", ctypes.c_char_p, pointer, ctypes.POINTER(ForwardArgs))
        self.set_num_threads(default_num_threads())

    def _declare(self, name: str, result: type | None, *arguments: type) -> None:
        function = getattr(self.handle, name)
        function.restype = result
        function.argtypes = arguments

    @property
    def instruction_set(self) -> str:
        return bytes(self.handle.gorgon_instruction_set()).decode()

    @property
    def num_threads(self) -> int:
        return int(self.handle.gorgon_get_num_threads())

    def set_num_threads(self, count: int) -> None:
        """Speed only: results do not depend on it."""
        if count < 1:
            raise ValueError(f"num_threads must be at least 1, not {count}")
        self.handle.gorgon_set_num_threads(count)


@cache
def load_library(extra_flags: tuple[str, ...] = ()) -> NativeLibrary:
    """Compiles if needed and loads. Raises NativeKernelsUnavailable."""
    return NativeLibrary(build_library(extra_flags))


@cache
def available_library() -> NativeLibrary | None:
    """The library, or None for good where it cannot be used: for work that torch can do as well, only slower."""
    try:
        return load_library()
    except NativeKernelsUnavailable:
        return None


def set_num_threads(count: int) -> None:
    load_library().set_num_threads(count)


def default_num_threads() -> int:
    """Physical cores this process may use: a second hardware thread of a core adds nothing to full vector units."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


def describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device.type}"


def check(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> int:
    """The address of a tensor that is exactly what a kernel will take it for."""
    if tensor.dtype != dtype or tensor.shape != tuple(shape) or not tensor.is_cpu:
        raise ValueError(f"{name} must be {dtype} {list(shape)} on cpu, not {describe(tensor)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, not strided {tensor.stride()}")
    return tensor.data_ptr()


class PackedLinear:
    """One weight matrix [out, in] in the kernels' layout, with its bias. Calling it is row-invariant."""

    def __init__(
        self,
        kind: Kind,
        in_features: int,
        out_features: int,
        data: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        library: NativeLibrary,
    ) -> None:
        self.kind: Kind = kind
        self.in_features = in_features
        self.out_features = out_features
        self._data = data  # [panels, steps, 2, 16, values per word]
        self._scales = scales  # fp32 [panels * 32]; ones unless int8
        self._bias = bias
        self._moved = False
        self.library = library
        self.matrix = self._describe()

    @classmethod
    def pack(
        cls, weight: Tensor, bias: Tensor | None, kind: Kind, *, library: NativeLibrary | None = None
    ) -> PackedLinear:
        """weight [out, in] and bias [out], floating, on the CPU. int8: scale = absmax / 127 of each output channel."""
        if kind not in KIND_CODES:
            raise ValueError(f"kind must be one of {', '.join(KIND_CODES)}, not {kind!r}")
        if weight.ndim != 2 or not weight.is_floating_point() or weight.device.type != "cpu" or 0 in weight.shape:
            raise ValueError(f"weight must be floating [out, in] on the CPU, not {describe(weight)}")
        rows, columns = weight.shape
        if bias is not None and (bias.shape != (rows,) or not bias.is_floating_point() or bias.device.type != "cpu"):
            raise ValueError(f"bias must be floating [{rows}] on the CPU, not {describe(bias)}")
        library = library or load_library()
        per_word = VALUES_PER_WORD[kind]
        panels, steps = math.ceil(rows / PANEL), math.ceil(columns / per_word)
        scales = torch.ones(panels * PANEL)
        stored = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8}[kind]
        # int8 is stored as value + 128: the dot-product instruction takes unsigned x signed.
        padded = torch.full((panels * PANEL, steps * per_word), 128 if kind == "int8" else 0, dtype=stored)
        if kind == "int8":
            values = weight.detach().float()
            scales[:rows] = values.abs().amax(dim=1) / 127
            divisor = torch.where(scales[:rows] > 0, scales[:rows], torch.ones(()))
            padded[:rows, :columns] = ((values / divisor[:, None]).round() + 128).to(torch.uint8)
        else:
            padded[:rows, :columns] = weight.detach()
        data = padded.view(panels, 2, 16, steps, per_word).permute(0, 3, 1, 2, 4).contiguous()
        padded_bias = None
        if bias is not None:
            padded_bias = torch.zeros(panels * PANEL)
            padded_bias[:rows] = bias.detach()
        return cls(kind, columns, rows, data, scales, padded_bias, library)

    def _describe(self) -> PackedMatrix:
        bias = 0 if self._bias is None else self._bias.data_ptr()
        return PackedMatrix(
            KIND_CODES[self.kind],
            int(self._bias is not None),
            self.in_features,
            self.out_features,
            self._data.data_ptr(),
            self._scales.data_ptr(),
            bias,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that one pass streams."""
        return self._data.numel() * self._data.element_size()

    @property
    def is_moved(self) -> bool:
        """Whether `move_to` was called: a model that shares this matrix may be reading it where it is."""
        return self._moved

    def move_to(self, storage: Tensor) -> None:
        """Moves the weights into storage, uint8 [num_bytes], once: an arena has huge pages, small tensors cannot."""
        assert not self._moved
        target = storage.view(self._data.dtype).view(self._data.shape)
        target.copy_(self._data)
        self._data, self._moved = target, True
        self.matrix.data = target.data_ptr()

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., in] fp32 contiguous -> [..., out] fp32. A row's result depends on that row only, to the bit."""
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must be [..., {self.in_features}], not {describe(x)}")
        check("x", x, x.shape, torch.float32)
        out = torch.empty((*x.shape[:-1], self.out_features))
        rows = x.numel() // self.in_features
        code = self.library.handle.gorgon_linear(ctypes.byref(self.matrix), x.data_ptr(), rows, out.data_ptr())
        if code != 0:
            raise MemoryError(f"no memory for {rows} rows of {self.in_features} activations")
        return out

    def select_outputs(self, rows: Tensor) -> PackedLinear:
        """A copy that computes the given outputs [n] int64 only, in their order. Bit for bit the same values."""
        bias = None if self._bias is None else self._bias[rows]
        return PackedLinear.pack(self.dequantized()[rows], bias, self.kind, library=self.library)

    def dequantized(self) -> Tensor:
        """The weights as the product sees them, fp32 [out, in]."""
        panels, steps, _, _, per_word = self._data.shape
        padded = self._data.permute(0, 2, 3, 1, 4).reshape(panels * PANEL, steps * per_word).float()
        if self.kind == "int8":
            padded = (padded - 128) * self._scales[:, None]
        return padded[: self.out_features, : self.in_features].contiguous()


def gather_in_arena(linears: Sequence[PackedLinear], library: NativeLibrary) -> Tensor:
    """The memory that the matrices' weights were moved to, side by side in this order, in huge pages where there are.

    Those that were moved before stay where they are. Each is freed as it moves, so the peak is one matrix over.
    """
    moving = [linear for linear in dict.fromkeys(linears) if not linear.is_moved]
    sizes = [(linear.num_bytes + 63) // 64 * 64 for linear in moving]
    arena = torch.empty(sum(sizes) + HUGE_PAGE, dtype=torch.uint8)
    offset = -arena.data_ptr() % HUGE_PAGE
    library.handle.gorgon_advise_huge_pages(arena.data_ptr() + offset, sum(sizes) // HUGE_PAGE * HUGE_PAGE)
    for linear, size in zip(moving, sizes, strict=True):
        linear.move_to(arena[offset : offset + linear.num_bytes])
        offset += size
    return arena
