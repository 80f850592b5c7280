"""Linear layers in bitsandbytes' NF4: 4-bit indices into a 16-value code, one float32 scale per 64 weights.

    W[n, k] = code[q[n, k]] * absmax[(n * in + k) // 64],   byte i of `packed` = q[2i] << 4 | q[2i + 1]

Quantising and the products are bitsandbytes' own. It is imported on first use only: that costs seconds. `quantize_nf4`
does without, for what is made on a device that it may not be there for.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor

from gorgon_protocol.errors import ModelError

BLOCK_SIZE = 64
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_ROWS_AT_A_TIME = 4096  # of a matrix that is quantised: bounds what it needs beside
_STATE_SUFFIX = ".quant_state.bitsandbytes__"


@cache
def _bitsandbytes() -> Any:
    # On some CPUs it warns at import that an optional kernel, for a packing not used here, could not be downloaded.
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes
        import bitsandbytes.functional
    except ImportError as error:
        raise ModelError(f"NF4 needs the package bitsandbytes, which cannot be imported: {error}") from error
    finally:
        logger.setLevel(level)
    return bitsandbytes


@dataclass(frozen=True, slots=True)
class Nf4Tensor:
    """One quantised matrix [out, in]; `in` is a multiple of 64, so that no scale spans two rows."""

    packed: Tensor  # [out * in / 2] uint8
    absmax: Tensor  # [out * in / 64] float32
    code: Tensor  # [16] float32
    out_features: int
    in_features: int

    def __post_init__(self) -> None:
        num_weights = self.out_features * self.in_features
        if self.in_features % BLOCK_SIZE:
            raise ModelError(
                f"NF4 needs matrices whose input size is a multiple of {BLOCK_SIZE}, not {self.in_features}"
            )
        if self.packed.shape != (num_weights // 2,) or self.absmax.shape != (num_weights // BLOCK_SIZE,):
            raise ModelError(
                f"NF4 matrix [{self.out_features}, {self.in_features}] with {self.packed.numel()} bytes "
                f"and {self.absmax.numel()} scales: expected {num_weights // 2} and {num_weights // BLOCK_SIZE}"
            )

    @classmethod
    def quantize(cls, weight: Tensor) -> Self:
        """weight: [out, in] floating, on a CPU or a GPU."""
        out_features, in_features = weight.shape
        if in_features % BLOCK_SIZE:
            raise ModelError(f"NF4 needs matrices whose input size is a multiple of {BLOCK_SIZE}, not {in_features}")
        packed, state = _bitsandbytes().functional.quantize_4bit(
            weight.contiguous(), blocksize=BLOCK_SIZE, quant_type="nf4"
        )
        return cls(packed.reshape(-1), state.absmax.float(), state.code.float(), out_features, in_features)

    @classmethod
    def concat(cls, tensors: Sequence[Self]) -> Self:
        """One matrix out of several of the same input size, stacked along `out`."""
        first = tensors[0]
        assert all(tensor.in_features == first.in_features for tensor in tensors)
        if any(not torch.equal(tensor.code, first.code) for tensor in tensors):
            raise ModelError("NF4 matrices with different codes cannot be fused")
        return cls(
            packed=torch.cat([tensor.packed for tensor in tensors]),
            absmax=torch.cat([tensor.absmax for tensor in tensors]),
            code=first.code,
            out_features=sum(tensor.out_features for tensor in tensors),
            in_features=first.in_features,
        )

    def to(self, device: torch.device) -> "Nf4Tensor":
        return Nf4Tensor(
            self.packed.to(device), self.absmax.to(device), self.code.to(device), self.out_features, self.in_features
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out, in]: code times scale in float32, rounded once to `dtype`."""
        return _bitsandbytes().functional.dequantize_4bit(self.packed.view(-1, 1), self.quant_state(dtype))

    def quant_state(self, dtype: torch.dtype) -> Any:
        """bitsandbytes' own description of this matrix."""
        return _bitsandbytes().functional.QuantState(
            absmax=self.absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            code=self.code,
            blocksize=BLOCK_SIZE,
            quant_type="nf4",
            dtype=dtype,
        )


def quantize_nf4(weight: Tensor) -> Nf4Tensor:
    """weight: [out, in] floating, `in` a multiple of 64, on any device, where the result stays.

    The nearest value of the code for weight / absmax (QLoRA, 2305.14314, section 3), as bitsandbytes does it, but for
    ties. Raises `ModelError` for another input size.
    """
    out_features, in_features = weight.shape
    if in_features % BLOCK_SIZE:
        raise ModelError(f"NF4 needs matrices whose input size is a multiple of {BLOCK_SIZE}, not {in_features}")
    code = torch.tensor(NF4_CODE, device=weight.device)
    middles = (code[1:] + code[:-1]) / 2
    packed, absmax = [], []
    for rows in weight.split(_ROWS_AT_A_TIME):
        blocks = rows.float().contiguous().view(-1, BLOCK_SIZE)
        largest = blocks.abs().amax(dim=1)
        scaled = blocks / torch.where(largest > 0, largest, 1.0)[:, None]
        indices = torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8).view(-1, 2)
        packed.append((indices[:, 0] << 4) | indices[:, 1])
        absmax.append(largest)
    return Nf4Tensor(torch.cat(packed), torch.cat(absmax), code, out_features, in_features)


class Nf4Linear:
    """x [..., in] in any floating dtype -> [..., out] in the same, through bitsandbytes."""

    def __init__(self, weight: Nf4Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias  # [out]
        self._states: dict[torch.dtype, Any] = {}

    @classmethod
    def quantize(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        return cls(Nf4Tensor.quantize(weight), bias)

    @property
    def in_features(self) -> int:
        return self.weight.in_features

    @property
    def out_features(self) -> int:
        return self.weight.out_features

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.weight.dequantize(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype not in self._states:
            self._states[x.dtype] = self.weight.quant_state(x.dtype)
        # The transposed view is the calling convention that all of its releases share.
        packed = self.weight.packed.view(-1, 1).t()
        return _bitsandbytes().matmul_4bit(x, packed, quant_state=self._states[x.dtype], bias=self.bias)

    def select_outputs(self, rows: Tensor) -> "Nf4Linear":
        weight, size = self.weight, self.in_features
        chosen = Nf4Tensor(
            packed=weight.packed.view(-1, size // 2)[rows].reshape(-1),
            absmax=weight.absmax.view(-1, size // BLOCK_SIZE)[rows].reshape(-1),
            code=weight.code,
            out_features=rows.numel(),
            in_features=size,
        )
        return Nf4Linear(chosen, None if self.bias is None else self.bias[rows])


def saved_state_name(name: str, names: Mapping[str, Any]) -> str | None:
    """The key of the quantisation state beside the saved tensor `name`, None if it is saved unquantised."""
    return next((key for kind in ("nf4", "fp4") if (key := f"{name}{_STATE_SUFFIX}{kind}") in names), None)


def from_saved(name: str, weight: Tensor, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Nf4Tensor:
    """A matrix as bitsandbytes saves it.

    name: of the weight; weight: its bytes, viewed as any dtype (`quant_storage`), any shape; parts: the tensors saved
    beside it (`absmax`, `quant_map`, `quant_state.bitsandbytes__nf4` and, double-quantised, `nested_absmax` and
    `nested_quant_map`); shape: what the model expects. Double-quantised scales are resolved to float32.
    Raises `ModelError` naming the weight.
    """
    description = _description(name, parts)
    if description.get("quant_type") != "nf4" or description.get("blocksize") != BLOCK_SIZE:
        raise ModelError(
            f"{name}: saved in 4-bit type {description.get('quant_type')!r} with blocks of "
            f"{description.get('blocksize')!r}: only nf4 with blocks of {BLOCK_SIZE} is supported"
        )
    if tuple(description.get("shape") or ()) != shape:
        raise ModelError(f"{name}: shape {list(description.get('shape') or ())}, expected {list(shape)}")
    missing = [part for part in ("absmax", "quant_map") if part not in parts]
    if missing:
        raise ModelError(f"{name}: the saved 4-bit weight lacks {', '.join(f'{name}.{part}' for part in missing)}")
    absmax = parts["absmax"]
    if "nested_absmax" in parts:
        absmax = _resolve_nested(name, parts, description)
    packed = weight.contiguous().reshape(-1).view(torch.uint8)
    try:
        return Nf4Tensor(packed, absmax.float(), parts["quant_map"].float(), *shape)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error


def _description(name: str, parts: Mapping[str, Tensor]) -> dict[str, Any]:
    state = next((tensor for key, tensor in parts.items() if key.startswith(_STATE_SUFFIX[1:])), None)
    if state is None:
        raise ModelError(f"{name}: the saved 4-bit weight lacks its quantisation state")
    try:
        description = json.loads(bytes(state.tolist()))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{name}: its quantisation state is not valid JSON: {error}") from error
    if not isinstance(description, dict):
        raise ModelError(f"{name}: its quantisation state is not a JSON object")
    return description


def _resolve_nested(name: str, parts: Mapping[str, Tensor], description: Mapping[str, Any]) -> Tensor:
    """absmax[i] = nested_quant_map[u8[i]] * nested_absmax[i // nested_blocksize] + nested_offset, in float32."""
    try:
        block_size, offset = int(description["nested_blocksize"]), float(description["nested_offset"])
        values = parts["nested_quant_map"].float()[parts["absmax"].long()]
        scales = parts["nested_absmax"].float().repeat_interleave(block_size)[: values.numel()]
        return values * scales + torch.tensor(offset, dtype=torch.float32)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise ModelError(f"{name}: its double-quantised scales cannot be read: {error}") from error
