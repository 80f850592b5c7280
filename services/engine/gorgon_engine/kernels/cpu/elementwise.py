"""The steps between the products of a network on a CPU. A row's result depends on that row only, to the bit.

rms_norm(x) = x / sqrt(mean(x^2) + eps) * weight;  add_silu(x, residual) = residual + x / (1 + exp(-x)).

torch says the same up to rounding, but rounds by the number of rows. Letters: leading dimensions ..., C channels.
"""

import torch
from torch import Tensor

from gorgon_engine.kernels.cpu.library import NativeLibrary, check


def rms_norm(library: NativeLibrary, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x [..., C] and weight [C] (None: all ones), float32 and contiguous -> [..., C]. Raises ValueError for others."""
    size = x.shape[-1]
    address = check("x", x, x.shape, torch.float32)
    weights = None if weight is None else check("weight", weight, (size,), torch.float32)
    out = torch.empty_like(x)
    library.handle.gorgon_rms_norm(address, weights, x.numel() // size, size, eps, out.data_ptr())
    return out


def add_silu(library: NativeLibrary, x: Tensor, residual: Tensor) -> Tensor:
    """x and residual [..., C], float32 and contiguous -> [..., C]. Raises ValueError for others."""
    address = check("x", x, x.shape, torch.float32)
    out = torch.empty_like(x)
    library.handle.gorgon_add_silu(
        address, check("residual", residual, x.shape, torch.float32), x.numel(), out.data_ptr()
    )
    return out


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps=eps)


def add_silu_reference(x: Tensor, residual: Tensor) -> Tensor:
    return residual + torch.nn.functional.silu(x)
