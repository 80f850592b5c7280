"""The one device-to-host transfer of a step: everything that the host wants to know, packed into one tensor."""

import torch
from torch import Tensor


def read_back(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors [B, ...] on the host, through a single transfer, in float64.

    Exact for float32 values and for integers below 2^53 (token ids, node indices, counts).
    """
    batch = next(iter(tensors.values())).shape[0]
    packed = torch.cat([t.reshape(batch, -1).double() for t in tensors.values()], dim=1).cpu()
    columns = packed.split([t.numel() // batch for t in tensors.values()], dim=1)
    return {name: part.view(t.shape) for (name, t), part in zip(tensors.items(), columns, strict=True)}
