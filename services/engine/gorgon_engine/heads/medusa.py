"""Medusa heads (2401.10774, section 2.1): independent guesses of the next few tokens from one hidden state.

    feature_k = block_n(... block_1(hidden)),   block(x) = x + SiLU(W x + b)
    logits_k  = feature_k P_k^T

W and b start at zero, so that a new head is a pass-through to its projection, which starts as the backbone's lm_head
(*own*) or is the backbone's (*shared*: not a part of these heads, given to every call). Own projections multiply the
lm_head's memory by the number of heads for no measured gain (FasterDecoding/Medusa#97).

Letters: B hidden states, K heads, J blocks a head, C hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Projection = Callable[[Tensor], Tensor]  # [..., C] -> [..., V]


class MedusaHeads(nn.Module):
    """K heads as stacked weights: one batched product a block for all of them. Trainable; no state beside weights."""

    weight: Tensor  # [K, J, C, C]
    bias: Tensor  # [K, J, C]
    projection: Tensor | None  # [K, V, C], None where shared

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 4,
        num_blocks: int = 1,
        lm_head: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """lm_head: [V, C], the weight that every head's own projection starts as; None = a shared projection."""
        super().__init__()
        assert num_heads >= 1, num_heads
        assert num_blocks >= 1, num_blocks
        self.weight = nn.Parameter(
            torch.zeros((num_heads, num_blocks, hidden_size, hidden_size), dtype=dtype, device=device)
        )
        self.bias = nn.Parameter(torch.zeros((num_heads, num_blocks, hidden_size), dtype=dtype, device=device))
        projection = None
        if lm_head is not None:
            assert lm_head.shape[1] == hidden_size, (lm_head.shape, hidden_size)
            copies = lm_head.detach().to(device=device, dtype=dtype).expand(num_heads, -1, -1)
            projection = nn.Parameter(copies.clone(memory_format=torch.contiguous_format))
        self.register_parameter("projection", projection)
        self.dropout = nn.Dropout(0.0)  # of what the first blocks read; training may set another share

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "MedusaHeads":
        """Heads that are the given tensors: `weight`, `bias` and, for own projections, `projection`."""
        heads = cls.__new__(cls)
        nn.Module.__init__(heads)
        for name in ("weight", "bias", "projection"):
            tensor = tensors.get(name)
            heads.register_parameter(name, None if tensor is None else nn.Parameter(tensor))
        heads.dropout = nn.Dropout(0.0)
        return heads

    @property
    def num_heads(self) -> int:
        return self.weight.shape[0]

    @property
    def num_blocks(self) -> int:
        return self.weight.shape[1]

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[2]

    @property
    def shares_projection(self) -> bool:
        return self.projection is None

    def select(self, heads: Sequence[int]) -> "MedusaHeads":
        """A copy of the given heads, in that order: what is left out can be freed."""
        index = torch.tensor(list(heads), dtype=torch.int64, device=self.weight.device)
        chosen = self.from_tensors({name: tensor.detach()[index] for name, tensor in self.named_parameters()})
        return chosen.requires_grad_(self.weight.requires_grad)

    def features(self, hidden: Tensor) -> Tensor:
        """What the projections read: hidden [B, C] -> [B, K, C]."""
        x = hidden.to(self.weight.dtype).expand(self.num_heads, -1, -1)  # [K, B, C]
        for block in range(self.num_blocks):
            read = self.dropout(x) if block == 0 else x
            change = torch.baddbmm(self.bias[:, block, None], read, self.weight[:, block].transpose(1, 2))
            x = x + nn.functional.silu(change)
        return x.transpose(0, 1)

    def forward(self, hidden: Tensor, project: Projection | None = None) -> Tensor:
        """hidden [B, C] -> logits [B, K, V]. `project`: the backbone's projection, for heads that share it."""
        features = self.features(hidden)
        if self.projection is not None:
            return torch.bmm(features.transpose(0, 1), self.projection.transpose(1, 2)).transpose(0, 1)
        assert project is not None, "heads without projections of their own need the backbone's"
        return project(features)
