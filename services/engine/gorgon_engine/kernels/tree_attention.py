"""Tree attention: every node attends to its sequence's committed prefix and to its own ancestors in the tree.

    out[b, n, h] = softmax(q[b, n, h] . K^T * D^-1/2 + mask) V

with K, V = the slot's positions 0..lengths[b]+N-1, of which the last N are the tree's own rows. Masked scaled dot
product attention; what a fused kernel has to equal. Sources: SpecInfer 2305.09781 (tree masks), Medusa 2401.10774.

Letters: B sequences, N nodes, H query heads, G KV heads, D head dimension, S slots, P positions, W words a node.
"""

import torch
from torch import Tensor


def attention_mask(
    lengths: Tensor, depths: Tensor, ancestors: Tensor | None, *, num_positions: int, sliding_window: int
) -> Tensor:
    """[B, N, num_positions] bool: which KV positions each row may see.

    lengths: [B] committed; depths: [B, N]; ancestors: [B, N, W] words, or None for a causal chain. A window of w leaves
    the last w positions of the row's own history, itself included; 0 = all.
    """
    num_rows = depths.shape[1]
    position = torch.arange(num_positions, device=lengths.device)
    offset = position - lengths[:, None]  # [B, P]: < 0 in the prefix, else the row's number
    in_tree = (offset >= 0) & (offset < num_rows)
    row = offset.clamp(0, num_rows - 1)  # [B, P]
    if ancestors is None:
        sees = row[:, None, :] <= torch.arange(num_rows, device=lengths.device)[:, None]  # [B, N, P]
    else:
        word = ancestors.gather(2, (row // 64)[:, None, :].expand(-1, num_rows, -1))
        sees = ((word >> (row % 64)[:, None, :]) & 1).bool()
    mask = torch.where(in_tree[:, None, :], sees, (offset < 0)[:, None, :])
    if sliding_window:
        # Where a position lies in the sequence: a tree row's depth, not its place in the scratch.
        logical = torch.where(in_tree, lengths[:, None] + depths.gather(1, row), position)  # [B, P]
        own = (lengths[:, None] + depths)[:, :, None]
        mask = mask & (own - logical[:, None, :] < sliding_window)
    return mask


def tree_attention(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
    """query: [B, N, H, D]; keys, values: [S, G, P, D]; slots: [B]; mask: [B, N, P'] over the first P' positions.

    Returns [B, N, H, D].
    """
    num_positions = mask.shape[2]
    key = keys[slots, :, :num_positions]  # [B, G, P', D]
    value = values[slots, :, :num_positions]
    out = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), key.to(query.dtype), value.to(query.dtype), attn_mask=mask[:, None], enable_gqa=True
    )
    return out.transpose(1, 2)


def reference(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
    """The same, one row and head at a time, in float64: slow and plain."""
    batch, num_rows, num_heads, head_dim = query.shape
    group = num_heads // keys.shape[1]
    out = torch.zeros_like(query, dtype=torch.float64)
    for b in range(batch):
        for n in range(num_rows):
            seen = mask[b, n].nonzero().flatten()
            for h in range(num_heads):
                key = keys[slots[b], h // group, seen].double()
                weights = torch.softmax(key @ query[b, n, h].double() * head_dim**-0.5, dim=0)
                out[b, n, h] = weights @ values[slots[b], h // group, seen].double()
    return out
