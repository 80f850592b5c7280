"""The tree that one verification pass checks: merged candidates, flattened breadth-first.

Flattening (Medusa, 2401.10774, section 2.1; the masks are SpecInfer's, 2305.09781): node 0 is the root, the token
that the backbone itself gave; every other node is a guess below its parent. A node may see itself and its ancestors,
which is one bit per ancestor in its row of 64-bit words.

Letters: B sequences, M candidates (root not counted), N nodes (root counted), W words a node.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gorgon_engine.kernels import dispatch
from gorgon_engine.kernels.cpu import NativeLibrary, trees
from gorgon_engine.kernels.cpu.library import available_library
from gorgon_engine.tree.candidates import CandidateTree

MAX_NODES = 128  # two 64-bit ancestor words

_NO_PARENT = -1
# Odd 64-bit constants of splitmix64: token -> well-mixed integer, and the base of the polynomial path hash.
_MIX = -7046029254386353131
_BASE = -4658895280553007687


@dataclass(frozen=True, slots=True)
class MergedCandidates:
    """Distinct candidates of all drafters, best first: the first n of them are a tree for every n."""

    tokens: Tensor  # [B, M] int64
    parents: Tensor  # [B, M] int64, -1 = child of the root
    log_probs: Tensor  # [B, M] float32, descending; -inf = padding
    ranks: Tensor  # [B, M] int64
    sources: Tensor  # [B, M] int64 index into source_names
    source_names: tuple[str, ...]
    draft_probs: Tensor | None = None  # [B, Q, V] float32
    draft_rows: Tensor | None = None  # [B, M] int64

    def path_probs(self) -> Tensor:
        """[B, M] float32, descending: the chance that each node is accepted, by the drafters' own estimate."""
        return self.log_probs.exp()


@dataclass(frozen=True, slots=True)
class TreeBatch:
    """One flattened tree a sequence. Rows past `num_nodes[b]` are padding: leaves that nothing descends from."""

    tokens: Tensor  # [B, N] int64, breadth-first, root at 0
    parents: Tensor  # [B, N] int64, -1 for the root
    depths: Tensor  # [B, N] int64
    ancestors: Tensor  # [B, N, W] int64: bit n % 64 of word n // 64 = "attends to node n", itself included
    log_probs: Tensor  # [B, N] float32 of the path, 0 for the root
    ranks: Tensor  # [B, N] int64
    sources: Tensor  # [B, N] int64
    num_nodes: Tensor  # [B] int64, root included
    source_names: tuple[str, ...] = ()
    draft_probs: Tensor | None = None
    draft_rows: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """[B, N] bool: real nodes, as opposed to padding."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.num_nodes[:, None]


def num_words(num_nodes: int) -> int:
    """64-bit words that the ancestor mask of one node takes."""
    return (num_nodes + 63) // 64


def merge_candidates(forests: Sequence[CandidateTree], *, max_nodes: int, max_depth: int) -> MergedCandidates:
    """Join the drafters' guesses: equal paths become one node, the best `max_nodes - 1` nodes stay, best first.

    A node that several drafters propose keeps the highest of their probabilities and the first drafter's source. Nodes
    deeper than `max_depth` are dropped.
    """
    drawn = [f for f in forests if f.draft_probs is not None]
    assert not drawn or len(forests) == 1, "drawn candidates cannot be merged: their rule needs their own order"
    if dispatch.uses_triton(forests[0].tokens) and not drawn:
        from gorgon_engine.kernels.triton import tree_build

        if tree_build.can_merge(forests):
            merged = tree_build.merge(forests, max_nodes=max_nodes, max_depth=max_depth)
            return MergedCandidates(**merged._asdict(), source_names=tuple(f.source for f in forests))
    library = _library_for(forests[0].tokens)
    if library is None:
        return merge_reference(forests, max_nodes=max_nodes, max_depth=max_depth)
    with_rows = bool(drawn) and drawn[0].draft_rows is not None
    merged = trees.merge(library, forests, max_nodes=max_nodes, max_depth=max_depth, drawn=with_rows)
    return MergedCandidates(
        **merged._asdict(),
        source_names=tuple(f.source for f in forests),
        draft_probs=drawn[0].draft_probs if drawn else None,
    )


def flatten(root_tokens: Tensor, candidates: MergedCandidates | None, num_nodes: Tensor, width: int) -> TreeBatch:
    """The tree of the root and each sequence's best `num_nodes[b] - 1` candidates, breadth-first, `width` rows wide.

    root_tokens: [B]; num_nodes: [B] int64, root included, at most `width`. A width of 1 is plain decoding.
    """
    if dispatch.uses_triton(root_tokens) and (candidates is None or candidates.draft_probs is None):
        return _flatten_in_one_launch(root_tokens, candidates, num_nodes, width)
    library = _library_for(root_tokens)
    if library is None or candidates is None or width == 1:
        return flatten_reference(root_tokens, candidates, num_nodes, width)
    c = candidates
    merged = trees.Merged(c.tokens, c.parents, c.log_probs, c.ranks, c.sources, c.draft_rows)
    flat = trees.flatten(library, root_tokens, merged, num_nodes, columns=min(width - 1, c.tokens.shape[1]))
    draft_probs = c.draft_probs if c.draft_rows is not None else None
    return TreeBatch(**flat._asdict(), source_names=c.source_names, draft_probs=draft_probs)


def _flatten_in_one_launch(
    root_tokens: Tensor, candidates: MergedCandidates | None, num_nodes: Tensor, width: int
) -> TreeBatch:
    from gorgon_engine.kernels.triton import tree_build

    names = candidates.source_names if candidates is not None else ()
    if candidates is None or width == 1:
        flat = tree_build.flatten(root_tokens, None, num_nodes, columns=0)
    else:
        c = candidates
        merged = trees.Merged(c.tokens, c.parents, c.log_probs, c.ranks, c.sources, None)
        flat = tree_build.flatten(root_tokens, merged, num_nodes, columns=min(width - 1, c.tokens.shape[1]))
    return TreeBatch(**flat._asdict(), source_names=names)


def _library_for(tensor: Tensor) -> NativeLibrary | None:
    """On a CPU a call of its own does what dozens of small tensor operations do elsewhere, in a tenth of the time."""
    return available_library() if tensor.device.type == "cpu" else None


def merge_reference(forests: Sequence[CandidateTree], *, max_nodes: int, max_depth: int) -> MergedCandidates:
    """`merge_candidates` in static-shaped tensor operations, on any device."""
    offsets = [0]
    for forest in forests[:-1]:
        offsets.append(offsets[-1] + forest.tokens.shape[1])
    tokens = torch.cat([f.tokens for f in forests], dim=1)  # [B, M]
    parents = torch.cat(
        [torch.where(f.parents < 0, f.parents, f.parents + o) for f, o in zip(forests, offsets, strict=True)], dim=1
    )
    log_probs = torch.cat([f.log_probs for f in forests], dim=1)
    ranks = torch.cat([f.ranks for f in forests], dim=1)
    sources = torch.cat([torch.full_like(f.tokens, i) for i, f in enumerate(forests)], dim=1)
    num_candidates = tokens.shape[1]

    path_keys, depths = _hash_paths(tokens, parents, max_depth)
    log_probs = log_probs.masked_fill(depths > max_depth, -torch.inf)
    same = path_keys[:, :, None] == path_keys[:, None, :]  # [B, M, M]
    same &= (log_probs > -torch.inf)[:, None, :]  # padding joins nothing
    index = torch.arange(num_candidates, device=tokens.device)
    first = torch.where(same, index, num_candidates).amin(dim=2)  # [B, M]: num_candidates for padding
    joined = torch.where(same, log_probs[:, None, :], -torch.inf).amax(dim=2)
    joined = joined.masked_fill(first != index, -torch.inf)

    # Stable: a parent precedes its children in the input, so it does among equals in the output.
    keep = min(max_nodes - 1, num_candidates)
    joined, order = torch.sort(joined, dim=1, descending=True, stable=True)
    joined, order = joined[:, :keep], order[:, :keep]
    place = torch.full_like(tokens, keep).scatter_(1, order, index[:keep].expand_as(order))
    old_parents = parents.gather(1, order)
    # A duplicate's children hang below the copy that was kept.
    kept_parents = first.gather(1, old_parents.clamp(min=0)).clamp(max=num_candidates - 1)
    new_parents = torch.where(old_parents < 0, _NO_PARENT, place.gather(1, kept_parents))

    drawn = [f for f in forests if f.draft_probs is not None]
    return MergedCandidates(
        tokens=tokens.gather(1, order),
        parents=new_parents,
        log_probs=joined,
        ranks=ranks.gather(1, order),
        sources=sources.gather(1, order),
        source_names=tuple(f.source for f in forests),
        draft_probs=drawn[0].draft_probs if drawn else None,
        draft_rows=drawn[0].draft_rows.gather(1, order) if drawn and drawn[0].draft_rows is not None else None,
    )


def flatten_reference(
    root_tokens: Tensor, candidates: MergedCandidates | None, num_nodes: Tensor, width: int
) -> TreeBatch:
    """`flatten` in static-shaped tensor operations, on any device."""
    batch = root_tokens.shape[0]
    device = root_tokens.device
    zero = torch.zeros((batch, 1), dtype=torch.int64, device=device)
    if candidates is None or width == 1:
        return TreeBatch(
            tokens=root_tokens[:, None],
            parents=zero - 1,
            depths=zero,
            ancestors=torch.ones((batch, 1, 1), dtype=torch.int64, device=device),
            log_probs=zero.float(),
            ranks=zero,
            sources=zero,
            num_nodes=torch.ones_like(root_tokens),
            source_names=candidates.source_names if candidates is not None else (),
        )
    columns = min(width - 1, candidates.tokens.shape[1])
    log_probs = candidates.log_probs[:, :columns]
    index = torch.arange(columns + 1, device=device)
    real = (log_probs > -torch.inf) & (index[1:] < num_nodes[:, None])
    real = torch.cat([torch.ones_like(zero, dtype=torch.bool), real], dim=1)  # [B, N]
    parents = torch.cat([zero - 1, candidates.parents[:, :columns] + 1], dim=1).masked_fill(~real, _NO_PARENT)
    tokens = torch.cat([root_tokens[:, None], candidates.tokens[:, :columns]], dim=1)

    depths = _depths(parents)
    # Breadth-first, padding last; stable, so that within a depth the best node comes first.
    order = torch.argsort(torch.where(real, depths, columns + 1), dim=1, stable=True)  # [B, N]
    place = torch.empty_like(order).scatter_(1, order, index.expand_as(order))
    old_parents = parents.gather(1, order)
    new_parents = torch.where(old_parents < 0, _NO_PARENT, place.gather(1, old_parents.clamp(min=0)))

    def with_root(values: Tensor, root: float) -> Tensor:
        head = torch.full((batch, 1), root, dtype=values.dtype, device=device)
        return torch.cat([head, values[:, :columns]], dim=1).gather(1, order)

    tree = TreeBatch(
        tokens=tokens.gather(1, order),
        parents=new_parents,
        depths=depths.gather(1, order),
        ancestors=ancestor_words(new_parents),
        log_probs=with_root(candidates.log_probs, 0.0),
        ranks=with_root(candidates.ranks, 0),
        sources=with_root(candidates.sources, 0),
        num_nodes=real.sum(dim=1),
        source_names=candidates.source_names,
    )
    if candidates.draft_rows is None:
        return tree
    return replace(tree, draft_probs=candidates.draft_probs, draft_rows=with_root(candidates.draft_rows, 0))


def ancestor_words(parents: Tensor) -> Tensor:
    """[B, N, W] int64 of parents [B, N] (-1 = none): each node's ancestors and itself, by pointer doubling."""
    batch, num_nodes = parents.shape
    index = torch.arange(num_nodes, device=parents.device)
    own = torch.ones_like(index) << (index % 64)
    columns = torch.arange(num_words(num_nodes), device=parents.device)
    own = torch.where(columns == (index // 64)[:, None], own[:, None], 0)  # [N, W]
    words = torch.nn.functional.pad(own, (0, 0, 0, 1)).expand(batch, -1, -1)  # row N: no ancestors at all
    jump = torch.nn.functional.pad(torch.where(parents < 0, num_nodes, parents), (0, 1), value=num_nodes)
    for _ in range((num_nodes - 1).bit_length()):
        words = words | words.gather(1, jump[:, :, None].expand_as(words))
        jump = jump.gather(1, jump)
    return words[:, :-1]


def tree_mask(parents: Tensor) -> Tensor:
    """The boolean TreeMask [B, N, N] of parents [B, N]: `mask[b, i, j]` = node i attends to node j."""
    return unpack_mask(ancestor_words(parents), parents.shape[1])


def pack_mask(mask: Tensor) -> Tensor:
    """A boolean mask [B, N, N] as ancestor words [B, N, W] int64, bit j % 64 of word j // 64 for column j."""
    batch, rows, columns = mask.shape
    words = num_words(columns)
    padded = torch.nn.functional.pad(mask, (0, words * 64 - columns))
    bits = torch.ones((), dtype=torch.int64, device=mask.device) << torch.arange(64, device=mask.device)
    return (padded.view(batch, rows, words, 64) * bits).sum(dim=3)


def unpack_mask(ancestors: Tensor, num_nodes: int) -> Tensor:
    """The inverse of `pack_mask`: [B, N, W] words -> [B, N, num_nodes] bool."""
    bits = torch.arange(64, device=ancestors.device)
    mask = (ancestors[..., None] >> bits) & 1  # [B, N, W, 64]
    return mask.flatten(2)[:, :, :num_nodes].bool()


def _depths(parents: Tensor) -> Tensor:
    """[B, N] of parents [B, N]: steps to the root, by pointer doubling."""
    num_nodes = parents.shape[1]
    jump = torch.nn.functional.pad(torch.where(parents < 0, num_nodes, parents), (0, 1), value=num_nodes)
    depths = (jump < num_nodes).long()
    for _ in range((num_nodes - 1).bit_length()):
        depths = depths + depths.gather(1, jump)
        jump = jump.gather(1, jump)
    return depths[:, :-1]


def _hash_paths(tokens: Tensor, parents: Tensor, max_depth: int) -> tuple[Tensor, Tensor]:
    """A 64-bit hash of each candidate's token path, and its depth (root's children: 1), by pointer doubling.

    A collision would merge two different guesses: a lost guess, never a wrong output, since the merged tree is still
    verified node by node.
    """
    batch, num_candidates = tokens.shape
    nowhere = num_candidates  # an extra column stands for the root: hash 0, factor 1, depth 0
    pad = torch.zeros((batch, 1), dtype=torch.int64, device=tokens.device)
    keys = (tokens + 1) * _MIX
    keys = torch.cat([keys ^ (keys >> 29), pad], dim=1)
    factors = torch.cat([torch.full_like(tokens, _BASE), pad + 1], dim=1)
    depths = torch.cat([torch.ones_like(tokens), pad], dim=1)
    jump = torch.cat([torch.where(parents < 0, nowhere, parents), pad + nowhere], dim=1)
    for _ in range(max_depth.bit_length() + 1):
        keys = keys + factors * keys.gather(1, jump)
        factors = factors * factors.gather(1, jump)
        depths = depths + depths.gather(1, jump)
        jump = jump.gather(1, jump)
    # Chains longer than the doubling covers keep an unfinished jump: they are deeper than max_depth by construction.
    return keys[:, :-1], depths[:, :-1]
