"""The likeliest nodes of all depths of a search, as a tree: what `beam._join` does, in one launch.

A node's place is the number of nodes that are likelier, or as likely and before it. Every program counts for the nodes
of its block and for their parents, so that programs need nothing of each other. Parents lie before their children and
are as likely at least: they stay before them. OPT-Tree, 2406.17276.

Letters: B sequences, T nodes of all depths, N nodes of the tree.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gorgon_engine.kernels.triton.eagle_beam import FoundNodes

_BLOCK = 32
_BLOCK_J = tl.constexpr(64)


@triton.jit(do_not_specialize=["num_found", "num_nodes"])
def _eagle_tree_kernel(  # type: ignore[no-untyped-def]
    tokens_ptr, parents_ptr, log_probs_ptr, ranks_ptr,
    tree_tokens_ptr, tree_parents_ptr, tree_log_probs_ptr, tree_ranks_ptr,
    num_found, num_nodes, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    node = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = node < num_found
    base = sequence * num_found
    score = tl.load(log_probs_ptr + base + node, mask=inside, other=float("-inf"))
    parent = tl.load(parents_ptr + base + node, mask=inside, other=-1)
    parent_score = tl.load(log_probs_ptr + base + parent, mask=parent >= 0, other=float("inf"))
    place = tl.zeros([BLOCK], tl.int32)
    parent_place = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_found, _BLOCK_J):
        lane = start + tl.arange(0, _BLOCK_J)
        there = (lane < num_found)[None, :]
        other = tl.load(log_probs_ptr + base + lane, mask=lane < num_found, other=float("-inf"))[None, :]
        tie = (other == score[:, None]) & (lane[None, :] < node[:, None])
        place += tl.sum((((other > score[:, None]) | tie) & there).to(tl.int32), 1)
        tie = (other == parent_score[:, None]) & (lane[None, :] < parent[:, None])
        parent_place += tl.sum((((other > parent_score[:, None]) | tie) & there).to(tl.int32), 1)
    # Where fewer nodes were found than the tree has room for, the rest is padding.
    place = tl.where(inside, place, node)
    real = score > float("-inf")
    token = tl.load(tokens_ptr + base + node, mask=inside, other=0)
    rank = tl.load(ranks_ptr + base + node, mask=inside, other=0)
    at = sequence * num_nodes + place
    kept = place < num_nodes
    above = tl.where(real & (parent >= 0), parent_place, -1).to(tl.int64)
    tl.store(tree_tokens_ptr + at, tl.where(real, token, 0), mask=kept)
    tl.store(tree_parents_ptr + at, above, mask=kept)
    tl.store(tree_log_probs_ptr + at, score, mask=kept)
    tl.store(tree_ranks_ptr + at, tl.where(real, rank, 0), mask=kept)


def eagle_tree(found: FoundNodes, num_nodes: int) -> FoundNodes:
    """The `num_nodes` likeliest, best first; log-probabilities -inf, tokens and ranks 0 and parents -1 are padding.

    found: T nodes a sequence, parents before children and never less likely. All contiguous, on one device.
    """
    batch, num_found = found.tokens.shape
    for tensor in (found.tokens, found.parents, found.log_probs, found.ranks):
        assert tensor.shape == (batch, num_found), (tensor.shape, found.tokens.shape)
        assert tensor.is_contiguous(), tensor.stride()
    tree = FoundNodes.empty(batch, num_nodes, found.tokens.device)
    _eagle_tree_kernel[(batch, triton.cdiv(max(num_found, num_nodes), _BLOCK))](
        found.tokens, found.parents, found.log_probs, found.ranks,
        tree.tokens, tree.parents, tree.log_probs, tree.ranks, num_found, num_nodes, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return tree


def reference(found: FoundNodes, num_nodes: int) -> FoundNodes:
    """The same in torch operations."""
    log_probs, order = found.log_probs.sort(dim=1, descending=True, stable=True)
    log_probs, order = log_probs[:, :num_nodes], order[:, :num_nodes]
    place = order.new_full((order.shape[0], found.tokens.shape[1] + 1), -1)
    place.scatter_(1, order + 1, torch.arange(order.shape[1], device=order.device).expand_as(order))
    padding = log_probs == -torch.inf
    missing = num_nodes - order.shape[1]

    def pad(values: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(values.masked_fill(padding, value), (0, missing), value=value)

    return FoundNodes(
        tokens=pad(found.tokens.gather(1, order), 0),
        parents=pad(place.gather(1, found.parents.gather(1, order) + 1), -1),
        log_probs=pad(log_probs, -torch.inf),
        ranks=pad(found.ranks.gather(1, order), 0),
    )
