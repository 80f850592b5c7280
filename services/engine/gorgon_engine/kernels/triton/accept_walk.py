"""Target sampling down every tree, once each node's next token is drawn: one launch, one program a sequence.

    node = 0;  at each depth: say drawn[node], go on to the child of that token, else stop

`gorgon_engine.acceptance` says what comes out (its `lossless` rule without penalties), to the bit, the entries behind
a walk's end included: they point at the last row, which is in range and not before its depth.

Letters: B sequences, N nodes, E places of a path.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Walk(NamedTuple):
    """The fields of an Acceptance."""

    path: Tensor  # [B, E] int64
    tokens: Tensor  # [B, E] int64
    num_committed: Tensor  # [B] int64


@triton.jit
def _accept_walk_kernel(  # type: ignore[no-untyped-def]
    drawn_ptr, tokens_ptr, parents_ptr, num_nodes_ptr, path_ptr, out_tokens_ptr, num_committed_ptr,
    NUM_NODES: tl.constexpr, NUM_PLACES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < NUM_NODES
    at = row * NUM_NODES + lane
    drawn = tl.load(drawn_ptr + at, mask=inside, other=-1)
    token = tl.load(tokens_ptr + at, mask=inside, other=-1)
    # -2: nobody's child, the padding too.
    parent = tl.load(parents_ptr + at, mask=inside & (lane < tl.load(num_nodes_ptr + row)), other=-2).to(tl.int32)
    node = tl.zeros([], tl.int32)
    num_committed = tl.zeros([], tl.int32)
    active = node == 0
    for depth in tl.static_range(NUM_PLACES):
        said = tl.sum(tl.where(lane == node, drawn, 0), 0)
        tl.store(path_ptr + row * NUM_PLACES + depth, node)
        tl.store(out_tokens_ptr + row * NUM_PLACES + depth, said)
        num_committed += active.to(tl.int32)
        child = tl.min(tl.where((parent == node) & (token == said), lane, LANES), 0)
        active = active & (child < LANES)
        node = tl.where(active, child, NUM_NODES - 1)
    tl.store(num_committed_ptr + row, num_committed)


def accept_walk(drawn: Tensor, tokens: Tensor, parents: Tensor, num_nodes: Tensor, *, max_depth: int) -> Walk:
    """drawn: [B, N] int64, what the backbone says behind each node; tokens, parents: [B, N] int64, -1 = no parent;
    num_nodes: [B] int64. E = min(max_depth + 1, N).
    """
    batch, width = tokens.shape
    assert drawn.shape == parents.shape == tokens.shape, (drawn.shape, parents.shape, tokens.shape)
    for tensor in (drawn, tokens, parents, num_nodes):
        assert tensor.dtype == torch.int64, tensor.dtype
    places = min(max_depth + 1, width)
    path, emitted = torch.empty((2, batch, places), dtype=torch.int64, device=tokens.device)
    num_committed = torch.empty(batch, dtype=torch.int64, device=tokens.device)
    _accept_walk_kernel[(batch,)](
        drawn.contiguous(), tokens.contiguous(), parents.contiguous(), num_nodes.contiguous(), path, emitted,
        num_committed, NUM_NODES=width, NUM_PLACES=places, LANES=max(16, triton.next_power_of_2(width)),
        num_warps=1,
    )  # fmt: skip
    return Walk(path, emitted, num_committed)


def reference(drawn: Tensor, tokens: Tensor, parents: Tensor, num_nodes: Tensor, *, max_depth: int) -> Walk:
    """The same in torch operations."""
    width = tokens.shape[1]
    index = torch.arange(width, device=tokens.device)
    node = torch.zeros_like(num_nodes)
    active = torch.ones_like(node, dtype=torch.bool)
    num_committed = torch.zeros_like(node)
    path, emitted = [], []
    for _ in range(min(max_depth + 1, width)):
        said = drawn.gather(1, node[:, None])  # [B, 1]
        path.append(node)
        emitted.append(said[:, 0])
        num_committed = num_committed + active
        hit = (parents == node[:, None]) & (tokens == said) & (index < num_nodes[:, None])
        active = active & hit.any(dim=1)
        node = torch.where(active, torch.where(hit, index, width - 1).amin(dim=1), width - 1)
    return Walk(torch.stack(path, dim=1), torch.stack(emitted, dim=1), num_committed)
