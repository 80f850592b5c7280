"""The attention of one pass, the same in each of its layers: trees as they are, prompts in pieces that count as trees.

`tree_attention` sums what a token attends to in an order that follows from its position alone, if it stands no deeper
in its tree than the plan's tail is long. So a prompt's rows are cut into chains of that many, each a tree behind all
that comes before it: as fast as a causal kernel of the same tiles, and bit for bit what decoding its tokens one by one
gives, however it was cut into chunks.

Letters: B sequences, N rows of each, E rows of a piece, W words a row, H query heads, G KV heads, D head dimension,
S slots, P positions of a slot.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from gorgon_engine.backbone.base import ForwardInputs
from gorgon_engine.kernels.triton.tree_attention import tree_attention
from gorgon_engine.kernels.triton.tree_attention_plan import TreeAttentionPlan, TreeAttentionWorkspace, tail_length
from gorgon_engine.models.config import BackboneConfig

_MAX_PIECE = 64  # one ancestor word


@dataclass(frozen=True, slots=True, eq=False)
class PassAttention:
    """Made once a pass; the workspace serves one layer after the other."""

    batch: int
    num_rows: int
    slots: Tensor  # [pieces] int64
    lengths: Tensor  # [pieces] int64: positions in front of each
    ancestors: Tensor  # [pieces, E, W] int64
    plan: TreeAttentionPlan
    workspace: TreeAttentionWorkspace

    @classmethod
    def of(cls, inputs: ForwardInputs, config: BackboneConfig, *, max_depth: int) -> Self:
        """max_depth: of a tree's node, the same in every pass. Looks at no value: a CUDA graph can hold it."""
        batch, num_rows = inputs.tokens.shape
        slots, lengths, ancestors = inputs.slots, inputs.lengths, inputs.ancestors
        max_length = inputs.max_positions - num_rows
        if ancestors is None:
            size = min(num_rows, tail_length(max_depth), _MAX_PIECE)
            count = -(-num_rows // size)
            first = torch.arange(count, device=slots.device) * size
            ancestors = _chains(first, size, num_rows).repeat(batch, 1, 1)
            slots = slots[:, None].expand(-1, count).flatten()
            lengths = (lengths[:, None] + first).flatten()
            max_length += (count - 1) * size
        plan = TreeAttentionPlan.exact(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            batch=slots.shape[0],
            num_nodes=ancestors.shape[1],
            max_length=max_length,
            max_depth=max_depth,
            device=slots.device,
        )
        return cls(
            batch=batch,
            num_rows=num_rows,
            slots=slots.contiguous(),
            lengths=lengths.contiguous(),
            ancestors=ancestors.contiguous(),
            plan=plan,
            workspace=plan.workspace(slots.device),
        )

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """query: [B N, H, D]; keys, values: [S, G, P, D] -> [B N, H D]."""
        pieces, size, _ = self.ancestors.shape
        missing = pieces // self.batch * size - self.num_rows
        rows = query.view(self.batch, self.num_rows, *query.shape[1:])
        if missing:
            rows = functional.pad(rows, (0, 0, 0, 0, 0, missing))
        out = tree_attention(
            rows.view(pieces, size, *query.shape[1:]), keys, values, self.slots, self.lengths, self.ancestors,
            plan=self.plan, workspace=self.workspace,
        )  # fmt: skip
        out = out.view(self.batch, -1, query.shape[1] * query.shape[2])[:, : self.num_rows]
        return out.reshape(query.shape[0], -1)


def _chains(first: Tensor, size: int, num_rows: int) -> Tensor:
    """The words [pieces, size, 1] of chains that begin at the rows `first` [pieces]; none for rows past the last."""
    place = torch.arange(size, device=first.device)
    words = (torch.ones_like(place) << place) * 2 - 1  # of place 63: all bits, by wrapping around
    return torch.where(first[:, None] + place < num_rows, words, 0)[:, :, None]
