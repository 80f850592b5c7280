"""Transfers between host and device: one read a step, and writes that do not wait."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Host integers as an int64 tensor. Through pinned memory on a GPU: a plain copy would synchronise the stream."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64)
    return torch.tensor(values, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)


def read_back(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A step's only device-to-host transfer: copies of tensors [B, ...] on the host, in float64.

    Exact for float32 values and for integers below 2^53 (token ids, node indices, counts).
    """
    batch = next(iter(tensors.values())).shape[0]
    packed = torch.cat([t.reshape(batch, -1).double() for t in tensors.values()], dim=1).cpu()
    columns = packed.split([t.numel() // batch for t in tensors.values()], dim=1)
    return {name: part.view(t.shape) for (name, t), part in zip(tensors.items(), columns, strict=True)}
