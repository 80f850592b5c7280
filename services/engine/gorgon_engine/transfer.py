"""Transfers between host and device: one read a step, and writes that do not wait."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Host integers as an int64 tensor. Through pinned memory on a GPU: a plain copy would synchronise the stream."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64)
    return torch.tensor(values, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)


def pack(tensors: Mapping[str, Tensor]) -> Tensor:
    """Tensors [B, ...] side by side: [B, n] float64.

    Exact for float32 values and for integers below 2^53 (token ids, node indices, counts).
    """
    batch = next(iter(tensors.values())).shape[0]
    return torch.cat([t.reshape(batch, -1).double() for t in tensors.values()], dim=1)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """What `Reading` needs to take packed tensors apart: each one's shape without the batch."""
    return {name: t.shape[1:] for name, t in tensors.items()}


class Reading:
    """Packed tensors on their way to the host. What follows on the device may overwrite them there: the copy is in the
    stream before it."""

    def __init__(self, packed: Tensor, shapes: Mapping[str, torch.Size]) -> None:
        """packed: [B, n] as `pack` gives it; shapes: as `shapes_of` gives them."""
        self._shapes = shapes
        self._arrived: torch.cuda.Event | None = None
        self._host = packed
        if packed.is_cuda:
            self._host = packed.to("cpu", non_blocking=True)  # to pinned memory
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self, batch: int | None = None) -> dict[str, Tensor]:
        """The tensors on the host, in float64. batch: of the first rows alone; None = all."""
        if self._arrived is not None:
            self._arrived.synchronize()
        rows = self._host[:batch]
        columns = rows.split([shape.numel() for shape in self._shapes.values()], dim=1)
        return {
            name: part.view(rows.shape[0], *shape)
            for (name, shape), part in zip(self._shapes.items(), columns, strict=True)
        }


def read_back(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors [B, ...] on the host, in float64, in one transfer. As exact as `pack`."""
    return Reading(pack(tensors), shapes_of(tensors)).wait()
