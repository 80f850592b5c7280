"""Which kernels serve a model here: the choice, and what a person should know about it."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.backbone.native_backbone import NativeBackbone
from gorgon_engine.backbone.torch_backbone import TorchBackbone
from gorgon_engine.kernels.cpu import Kind, NativeKernelsUnavailable, PackedLinear, load_library
from gorgon_engine.models.config import BackboneConfig
from gorgon_engine.models.linear import Linear, LinearRole
from gorgon_engine.models.loading import Quantization, load_weights
from gorgon_protocol.errors import BadRequestError


class Kernels(StrEnum):
    """`native`: the project's own CPU kernels, row-invariant. `torch`: library operations, on any device."""

    AUTO = "auto"
    NATIVE = "native"
    TORCH = "torch"


@dataclass(frozen=True, slots=True)
class BackboneOptions:
    """None means "what is best here": int8 on a CPU, NF4 on a GPU or where the folder is saved so, bfloat16
    activations. An explicit dtype without a quantization asks for unquantised weights of that dtype."""

    quantization: Quantization | None = None
    dtype: torch.dtype | None = None
    device: str | None = None
    kernels: Kernels = Kernels.AUTO


def load_backbone(folder: Path, options: BackboneOptions) -> tuple[Backbone, list[str]]:
    """The model of a folder, ready to run, and notices for the person who asked. Raises `GorgonError` subclasses."""
    device = _device(options.device)
    if device.index is not None:
        # Triton launches on the current device, wherever the tensors are.
        torch.cuda.set_device(device)
    quantization = options.quantization or _best_quantization(folder, options.dtype, device)
    dtype = options.dtype or torch.bfloat16
    can_be_native = device.type == "cpu" and quantization is not Quantization.NF4
    if options.kernels is Kernels.NATIVE and not can_be_native:
        raise BadRequestError(
            f"the native kernels run int8 and unquantised models on a CPU: got {quantization} on {device}"
        )
    if not can_be_native or options.kernels is Kernels.TORCH:
        return _load_torch(folder, quantization, dtype, device), []
    try:
        load_library()
    except NativeKernelsUnavailable as reason:
        if options.kernels is Kernels.NATIVE:
            raise BadRequestError(f"the native kernels cannot be used: {reason}") from reason
        notice = f"native CPU kernels unavailable ({reason}): using torch operations, several times slower"
        return _load_torch(folder, quantization, dtype, device), [notice]
    return _load_native(folder, _native_kind(quantization, dtype)), []


def _load_native(folder: Path, kind: Kind) -> NativeBackbone:
    def pack(weight: Tensor, bias: Tensor | None, role: LinearRole) -> Linear:
        return PackedLinear.pack(weight, bias, kind)

    # The embedding rows of an fp32 run stay exact; elsewhere bf16 is what the checkpoints hold.
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    return NativeBackbone(load_weights(folder, dtype=dtype, norm_dtype=torch.float32, make_linear=pack), kind=kind)


def _load_torch(folder: Path, quantization: Quantization, dtype: torch.dtype, device: torch.device) -> TorchBackbone:
    # int8 linears speak float32: so does the rest of that forward.
    dtype = torch.float32 if quantization is Quantization.INT8 else dtype
    weights = load_weights(folder, quantization=quantization, dtype=dtype, device=device)
    return TorchBackbone(weights, device=device, dtype=dtype, quantization=quantization)


def _native_kind(quantization: Quantization, dtype: torch.dtype) -> Kind:
    if quantization is Quantization.INT8:
        return "int8"
    kinds: dict[torch.dtype, Kind] = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    if dtype not in kinds:
        raise BadRequestError(f"the CPU runs float32 and bfloat16: got {dtype}")
    return kinds[dtype]


def _best_quantization(folder: Path, dtype: torch.dtype | None, device: torch.device) -> Quantization:
    if BackboneConfig.from_folder(folder).saved_quantization is not None:
        return Quantization.NF4
    if dtype is not None:
        return Quantization.NONE
    return Quantization.INT8 if device.type == "cpu" else Quantization.NF4


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadRequestError(f"device {name!r} is not known: give cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise BadRequestError(f"device {name!r} is not supported: give cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadRequestError(
            f"device {name!r} is not there: torch sees no CUDA GPU on this machine; leave --device out"
        )
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise BadRequestError(
            f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA GPUs, the first is cuda:0"
        )
    return torch.device("cpu") if device.type == "cpu" else device
