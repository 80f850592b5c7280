"""Which kernels serve a model here: the choice, and what a person should know about it."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.backbone.native_backbone import NativeBackbone
from gorgon_engine.backbone.torch_backbone import TorchBackbone
from gorgon_engine.kernels.cpu import Kind, NativeKernelsUnavailable, PackedLinear, load_library
from gorgon_engine.memory_plan import check_weights_fit, free_bytes
from gorgon_engine.models.config import BackboneConfig
from gorgon_engine.models.linear import Int8Linear, Linear, LinearRole
from gorgon_engine.models.loading import BackboneWeights, Quantization, load_weights
from gorgon_engine.models.nf4 import Nf4Linear
from gorgon_protocol.errors import BadRequestError

if TYPE_CHECKING:
    from gorgon_engine.kernels.triton.nf4_linear import Nf4Variant

DEFAULT_MAX_DEPTH = 16
_MIN_CAPABILITY = (8, 0)  # products in bfloat16


class Kernels(StrEnum):
    """`native`: the project's own CPU kernels, `triton`: its GPU kernels, both row-invariant. `torch`: library
    operations, on any device."""

    AUTO = "auto"
    NATIVE = "native"
    TRITON = "triton"
    TORCH = "torch"


@dataclass(frozen=True, slots=True)
class BackboneOptions:
    """None means "what is best here": int8 on a CPU, NF4 on a GPU or where the folder is saved so, bfloat16
    activations. An explicit dtype without a quantization asks for unquantised weights of that dtype."""

    quantization: Quantization | None = None
    dtype: torch.dtype | None = None
    device: str | None = None
    kernels: Kernels = Kernels.AUTO


def load_backbone(
    folder: Path, options: BackboneOptions, *, max_depth: int = DEFAULT_MAX_DEPTH
) -> tuple[Backbone, list[str]]:
    """The model of a folder, ready to run, and notices for the person who asked.

    max_depth: of the trees that are verified. Raises `GorgonError` subclasses.
    """
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
    if not can_be_native or options.kernels in (Kernels.TORCH, Kernels.TRITON):
        return _load_torch_or_triton(folder, quantization, dtype, device, options.kernels, max_depth)
    try:
        load_library()
    except NativeKernelsUnavailable as reason:
        if options.kernels is Kernels.NATIVE:
            raise BadRequestError(f"the native kernels cannot be used: {reason}") from reason
        backbone, _ = _load_torch_or_triton(folder, quantization, dtype, device, Kernels.TORCH, max_depth)
        return backbone, [f"native CPU kernels unavailable ({reason}): using torch operations, several times slower"]
    return _load_native(folder, _native_kind(quantization, dtype)), []


def serve_weights(
    weights: BackboneWeights,
    *,
    device: torch.device,
    dtype: torch.dtype,
    kernels: Kernels = Kernels.AUTO,
    max_depth: int = DEFAULT_MAX_DEPTH,
) -> tuple[Backbone, list[str]]:
    """What runs weights that lie on `device`: the Triton kernels on a GPU where they can, else torch's operations; and
    notices for the person who asked.

    dtype: of the activations. Raises `BadRequestError` where `triton` is asked for and cannot be.
    """
    quantization = _quantization_of(weights)
    refusal = triton_refusal(weights.config, device, dtype, quantization)
    if kernels is Kernels.TRITON and refusal is not None:
        raise _no_triton(refusal)
    if kernels is Kernels.TORCH or refusal is not None:
        backbone = TorchBackbone(weights, device=device, dtype=dtype, quantization=quantization)
        is_news = device.type == "cuda" and kernels is not Kernels.TORCH
        notice = f"the Triton kernels cannot be used ({refusal}): using torch operations, several times slower"
        return backbone, [notice] if is_news else []
    # Here: torch for CPUs comes without Triton.
    from gorgon_engine.backbone.triton_backbone import TritonBackbone

    variant, notices = _nf4_variant(weights, device, dtype)
    return TritonBackbone(weights, device=device, dtype=dtype, max_depth=max_depth, variant=variant), notices


def triton_refusal(
    config: BackboneConfig, device: torch.device, dtype: torch.dtype, quantization: Quantization
) -> str | None:
    """Why the Triton kernels cannot run a model, as the end of a sentence; None where they can."""
    if device.type != "cuda":
        return f"they need a GPU, and the device is {device}"
    if torch.version.hip is not None:
        return "they need an NVIDIA GPU, and this torch is one for AMD's"
    try:
        from gorgon_engine.kernels.triton.tree_attention_plan import HEAD_DIMS
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < _MIN_CAPABILITY:
        least = ".".join(map(str, _MIN_CAPABILITY))
        return f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, they need {least}"
    if quantization is Quantization.INT8:
        return "they run NF4 and unquantised models, not int8"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"they run bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if config.head_dim not in HEAD_DIMS:
        return f"the model's head dim is {config.head_dim}, they know {' and '.join(map(str, HEAD_DIMS))}"
    if any(config.sliding_windows):
        return "the model has sliding windows, which they do not know"
    return None


def _no_triton(refusal: str) -> BadRequestError:
    return BadRequestError(f"the Triton kernels cannot be used: {refusal}: choose `auto`")


def _load_native(folder: Path, kind: Kind) -> NativeBackbone:
    def pack(weight: Tensor, bias: Tensor | None, role: LinearRole) -> Linear:
        return PackedLinear.pack(weight, bias, kind)

    # The embedding rows of an fp32 run stay exact; elsewhere bf16 is what the checkpoints hold.
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    return NativeBackbone(load_weights(folder, dtype=dtype, norm_dtype=torch.float32, make_linear=pack), kind=kind)


def _load_torch_or_triton(
    folder: Path,
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
    max_depth: int,
) -> tuple[Backbone, list[str]]:
    # int8 linears speak float32: so does the rest of that forward.
    dtype = torch.float32 if quantization is Quantization.INT8 else dtype
    config = BackboneConfig.from_folder(folder)
    if kernels is Kernels.TRITON:
        refusal = triton_refusal(config, device, dtype, quantization)
        if refusal is not None:
            raise _no_triton(refusal)
    if device.type == "cuda":
        is_nf4 = quantization is Quantization.NF4
        check_weights_fit(config, nf4=is_nf4, element_size=dtype.itemsize, free_bytes=free_bytes(device))
    weights = load_weights(folder, quantization=quantization, dtype=dtype, device=device)
    return serve_weights(weights, device=device, dtype=dtype, kernels=kernels, max_depth=max_depth)


def _nf4_variant(
    weights: BackboneWeights, device: torch.device, dtype: torch.dtype
) -> tuple["Nf4Variant | None", list[str]]:
    """Which kernel multiplies in NF4, None = the best; and a notice where that is not to be had."""
    from gorgon_engine.kernels.triton.nf4_linear import Nf4Variant, default_variant

    is_nf4 = _quantization_of(weights) == Quantization.NF4
    if not is_nf4 or default_variant(device, dtype) is Nf4Variant.PORTABLE:
        return None, []
    try:
        import gorgon_engine.kernels.triton.nf4_gluon  # noqa: F401
    except ImportError as error:
        notice = f"the NF4 kernel for Hopper GPUs needs Triton 3.6 ({error}): using the portable one, slower"
        return Nf4Variant.PORTABLE, [notice]
    return None, []


def _quantization_of(weights: BackboneWeights) -> Quantization:
    """As the layers' matrices are held; any in NF4 or int8 counts for all."""
    linears = [linear for one in weights.layers for linear in (one.qkv, one.o, one.gate_up, one.down)]
    if any(isinstance(linear, Nf4Linear) for linear in linears):
        return Quantization.NF4
    return Quantization.INT8 if any(isinstance(linear, Int8Linear) for linear in linears) else Quantization.NONE


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
