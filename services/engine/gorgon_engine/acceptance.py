"""Acceptance: which branch of a verified tree the backbone itself would have said.

Pure functions of (tree, backbone logits, draft distribution, random numbers keyed by position).

- `lossless`: *target sampling*. At each node the next token is drawn from the backbone's own processed distribution; if
  it is one of the node's children the walk goes on there, else it is the bonus token. For children chosen
  deterministically no lossless rule accepts more, and since the draw depends on (seed, position) only, the tokens are
  those of plain decoding. Greedy is its special case (SpecInfer, 2305.09781; EAGLE-2, 2406.16858).
- `rejection`: Leviathan's rule (2211.17192, 2302.01318) child by child, for children that were *drawn* from a draft
  distribution without replacement, the residual renormalised after each rejection (SpecTr 2310.15141, Sequoia
  2402.12374 algorithm 2). Keeps the distribution, not the very tokens of plain decoding.
- `typical`: Medusa's typical acceptance (2401.10774, section 2.3.1). Lossy: opt-in, and reported as such.

Letters: B sequences, N nodes, E = max_depth + 1 places of a path, V vocabulary, Q draft distributions a sequence.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from gorgon_engine.backbone.base import RowLogits
from gorgon_engine.kernels import dispatch
from gorgon_engine.random import Stream, gumbel_noise, uniform
from gorgon_engine.sampling import SamplingBatch, TokenCounts, argmax, process_logits, sample
from gorgon_engine.tree.tree import TreeBatch, tree_mask

# Medusa's defaults (FasterDecoding/Medusa: posterior_threshold, posterior_alpha = sqrt of it).
TYPICAL_THRESHOLD = 0.09
TYPICAL_ALPHA = 0.3

# Drawing behind so many nodes that no walk may reach costs a CPU no more than the small operations of walking on.
_EAGER_DRAWS = 24


class AcceptanceRule(StrEnum):
    LOSSLESS = "lossless"
    REJECTION = "rejection"
    TYPICAL = "typical"


@dataclass(frozen=True, slots=True)
class Acceptance:
    """The branch kept: `path[b, :num_committed[b]]` are its nodes, root first; entries behind are copies in range.

    `tokens[b, :num_committed[b]]` are the tokens emitted: the accepted drafts in path order, then the bonus token.
    """

    path: Tensor  # [B, E] int64 node indices, path[b, d] >= d
    tokens: Tensor  # [B, E] int64
    num_committed: Tensor  # [B] int64 = number of tokens emitted = accepted drafts + 1


def accept(
    tree: TreeBatch,
    logits: RowLogits,
    *,
    positions: Tensor,
    sampling: SamplingBatch,
    counts: TokenCounts | None,
    rule: AcceptanceRule,
    max_depth: int,
) -> Acceptance:
    """Walk every tree to its deepest accepted node. positions: [B] of the roots.

    Static-shaped: every walk takes max_depth + 1 steps on a GPU, those past the end do nothing. `counts` is updated in
    place with the emitted tokens.
    """
    if rule is AcceptanceRule.TYPICAL:
        return _accept_typical(tree, logits.padded(), positions, sampling, counts, max_depth)
    if rule is AcceptanceRule.LOSSLESS and counts is None and _draws_at_once(tree, sampling):
        return _accept_at_once(tree, logits, positions, sampling, max_depth)
    batch, num_nodes = tree.tokens.shape
    device = tree.tokens.device
    node = torch.zeros(batch, dtype=torch.int64, device=device)
    active = torch.ones(batch, dtype=torch.bool, device=device)
    num_committed = torch.zeros(batch, dtype=torch.int64, device=device)
    valid, index = tree.valid, torch.arange(num_nodes, device=device)
    walks = _Walks(tree, logits, positions, sampling, counts, rule)
    path, tokens = [], []
    for depth in range(min(max_depth + 1, num_nodes)):
        is_child = (tree.parents == node[:, None]) & valid  # [B, N]
        token = walks.next_tokens(depth, node, is_child, active)
        if counts is not None:
            counts.add(token, active)
        path.append(node)
        tokens.append(token)
        num_committed = num_committed + active
        hit = is_child & (tree.tokens == token[:, None])
        active = active & hit.any(dim=1)
        # A finished walk points at the last row: in range, not before its depth, and never read again.
        node = torch.where(active, torch.where(hit, index, num_nodes - 1).amin(dim=1), num_nodes - 1)
        if device.type == "cpu" and not bool(active.any()):
            break
    return Acceptance(path=torch.stack(path, dim=1), tokens=torch.stack(tokens, dim=1), num_committed=num_committed)


def _draws_at_once(tree: TreeBatch, sampling: SamplingBatch) -> bool:
    """Whether the kernels of a GPU can draw behind all nodes: what needs no more of a row than its logits as they are
    or at a temperature. The rest is left to tensor operations."""
    is_plain = not (sampling.any_penalty or sampling.any_filter or sampling.bias is not None)
    return is_plain and dispatch.uses_triton(tree.tokens)


def _accept_at_once(
    tree: TreeBatch, logits: RowLogits, positions: Tensor, sampling: SamplingBatch, max_depth: int
) -> Acceptance:
    """Target sampling in three launches: the draws are functions of (seed, position), so those that no walk reaches
    change nothing."""
    from gorgon_engine.kernels.triton.accept_walk import accept_walk
    from gorgon_engine.kernels.triton.gumbel_argmax import draw_behind_nodes

    drawn = draw_behind_nodes(
        logits.flat.contiguous(), logits.starts, tree.depths, temperatures=sampling.temperature,
        seeds=sampling.seeds, positions=positions, all_greedy=sampling.all_greedy,
    )  # fmt: skip
    return Acceptance(**accept_walk(drawn, tree.tokens, tree.parents, tree.num_nodes, max_depth=max_depth)._asdict())


class _Walks:
    """What decides where the walks down B trees go on."""

    def __init__(
        self,
        tree: TreeBatch,
        logits: RowLogits,
        positions: Tensor,
        sampling: SamplingBatch,
        counts: TokenCounts | None,
        rule: AcceptanceRule,
    ) -> None:
        self._tree = tree
        self._logits = logits
        self._positions = positions
        self._sampling = sampling
        self._counts = counts
        self._rule = rule
        self._drawn = self._draw_everywhere() if rule is AcceptanceRule.LOSSLESS else None  # [M]

    def next_tokens(self, depth: int, node: Tensor, is_child: Tensor, active: Tensor) -> Tensor:
        """What follows `node` [B], at `depth`, in the trees whose walk is `active` [B] bool: tokens [B]."""
        rows = torch.arange(node.shape[0], device=node.device)
        if self._drawn is not None:
            return self._drawn[self._logits.places(rows, node)]
        sampling, counts, positions = self._sampling, self._counts, self._positions + depth + 1
        if self._rule is not AcceptanceRule.LOSSLESS:
            target = process_logits(self._logits.at(rows, node), sampling, counts)
            return _reject_children(self._tree, target, is_child, node, sampling, positions)
        if depth == 0:
            return sample(process_logits(self._logits.first(), sampling, counts), sampling, positions)
        # On a CPU, where the flags are at hand, only the walks that go on are looked at; a GPU would have to wait.
        if node.device.type != "cpu" or bool(active.all()):
            return sample(process_logits(self._logits.at(rows, node), sampling, counts), sampling, positions)
        some = active.nonzero()[:, 0]
        sampling, counts = sampling.select(some), None if counts is None else counts.select(some)
        target = process_logits(self._logits.at(some, node[some]), sampling, counts)
        return torch.zeros_like(node).index_copy_(0, some, sample(target, sampling, positions[some]))

    def _draw_everywhere(self) -> Tensor | None:
        """What follows each row of the logits [M], where that is no waste: None else, and where penalties make it
        depend on the walk."""
        tree, logits = self._tree, self._logits
        if self._sampling.is_argmax:
            return argmax(logits.flat)
        batch, num_rows = tree.tokens.shape[0], logits.flat.shape[0]
        is_plain, on_cpu = logits.width == 1, logits.flat.device.type == "cpu"
        if self._counts is not None or is_plain or not on_cpu or num_rows - batch > _EAGER_DRAWS:
            return None
        owners, nodes = tree.valid.nonzero(as_tuple=True)
        if owners.shape[0] != num_rows:  # there is padding
            return None
        sampling = self._sampling.select(owners)
        positions = self._positions[owners] + tree.depths[owners, nodes] + 1
        return sample(process_logits(logits.flat, sampling, None), sampling, positions)


def _reject_children(
    tree: TreeBatch, target: Tensor, is_child: Tensor, node: Tensor, sampling: SamplingBatch, positions: Tensor
) -> Tensor:
    """Leviathan's rule over the children of `node` [B] in the order in which they were drawn -> token [B].

    target: processed logits [B, V]. A returned token that is a child means "accepted", any other is the bonus token.
    """
    if tree.draft_probs is None or tree.draft_rows is None:
        return sample(target, sampling, positions)
    batch, num_nodes = tree.tokens.shape
    rows = torch.arange(batch, device=target.device)
    target_probs = torch.softmax(target, dim=1)
    greedy_probs = torch.nn.functional.one_hot(target.argmax(dim=1), target.shape[1]).float()
    target_probs = torch.where(sampling.greedy[:, None], greedy_probs, target_probs)
    # All children of a node come from one distribution: any child's row will do, row 0 stands in where there is none.
    draft_row = torch.where(is_child, tree.draft_rows, 0).amax(dim=1)
    draft_probs = tree.draft_probs[rows, draft_row]  # [B, V]
    thresholds = uniform(sampling.seeds, positions, num_nodes, Stream.ACCEPT)  # [B, N]
    chosen = torch.full_like(node, -1)
    for rank in range(num_nodes - 1):
        drawn = is_child & (tree.ranks == rank)
        present = drawn.any(dim=1) & (chosen < 0)
        if target.device.type == "cpu" and not bool(present.any()):
            break
        child = torch.where(drawn, tree.tokens, 0).amax(dim=1)
        p, q = target_probs[rows, child], draft_probs[rows, child]
        # Strict: a token that the backbone gives no probability is refused even when the random number is 0.
        accepted = present & (thresholds[:, rank] * q < p)
        chosen = torch.where(accepted, child, chosen)
        rejected = (present & ~accepted)[:, None]
        residual = (target_probs - draft_probs).clamp(min=0)
        mass = residual.sum(dim=1, keepdim=True)
        # No residual mass left is only reachable by rounding (the rule had accepted before): keep the target then.
        target_probs = torch.where(rejected & (mass > 0), residual / mass.clamp(min=1e-38), target_probs)
        without = draft_probs.scatter(1, child[:, None], 0.0)
        without = without / without.sum(dim=1, keepdim=True).clamp(min=1e-38)
        draft_probs = torch.where(rejected, without, draft_probs)
    noise = gumbel_noise(sampling.seeds, positions, target.shape[1])
    residual_logits = target_probs.log()
    drawn_token = torch.where(sampling.greedy[:, None], residual_logits, residual_logits + noise).argmax(dim=1)
    return torch.where(chosen >= 0, chosen, drawn_token)


def _accept_typical(
    tree: TreeBatch,
    logits: Tensor,
    positions: Tensor,
    sampling: SamplingBatch,
    counts: TokenCounts | None,
    max_depth: int,
) -> Acceptance:
    """Medusa's rule: a child passes when the backbone gives it more than min(threshold, alpha * exp(-entropy)).

    Keeps the deepest passing path, the likelier one among equals (the lower node index: nodes come best first within a
    depth). Penalties and filters apply at every node with that node's own history.
    """
    batch, num_nodes, vocab_size = logits.shape
    rows = torch.arange(batch, device=logits.device)
    mask = tree_mask(tree.parents)  # [B, N, N]
    flat, flat_counts = _every_node(tree, sampling, counts, mask)
    target = process_logits(logits.reshape(-1, vocab_size), flat, flat_counts).view(batch, num_nodes, vocab_size)
    probs = torch.softmax(target, dim=2)
    entropy = -(probs * torch.where(probs > 0, probs, 1.0).log()).sum(dim=2)  # [B, N]
    threshold = torch.minimum(torch.full_like(entropy, TYPICAL_THRESHOLD), TYPICAL_ALPHA * torch.exp(-entropy))
    best = target.argmax(dim=2)  # [B, N]

    parents = tree.parents.clamp(min=0)
    parent_probs = probs[rows[:, None], parents, tree.tokens]  # [B, N]
    passes = parent_probs > threshold.gather(1, parents)
    passes = torch.where(sampling.greedy[:, None], tree.tokens == best.gather(1, parents), passes)
    passes = (passes & tree.valid) | (tree.parents < 0)
    whole_path = (passes[:, None, :] | ~mask).all(dim=2) & tree.valid
    score = torch.where(whole_path & (tree.depths <= max_depth), tree.depths, -1)
    last = score.argmax(dim=1)  # the first of the deepest
    num_committed = tree.depths[rows, last] + 1

    # The kept path in order of depth: ancestors have ascending indices.
    places = min(max_depth + 1, num_nodes)
    on_path = mask[rows, last]  # [B, N]
    path = torch.argsort((~on_path).long(), dim=1, stable=True)[:, :places]
    bonus = sample(target[rows, last], sampling, positions + num_committed)
    tokens = tree.tokens.gather(1, path).roll(-1, dims=1)
    tokens = tokens.scatter(1, (num_committed - 1)[:, None], bonus[:, None])
    path = torch.maximum(path, torch.arange(places, device=path.device))
    if counts is not None:
        for place in range(places):
            counts.add(tokens[:, place], num_committed > place)
    return Acceptance(path=path, tokens=tokens, num_committed=num_committed)


def _every_node(
    tree: TreeBatch, sampling: SamplingBatch, counts: TokenCounts | None, mask: Tensor
) -> tuple[SamplingBatch, TokenCounts | None]:
    """The sampling rows repeated for every node [B * N], and each node's own history as counts."""
    batch, num_nodes = tree.tokens.shape
    flat = sampling.repeat(num_nodes)
    if counts is None:
        return flat, None
    in_output = counts.in_output.repeat_interleave(num_nodes, dim=0).view(batch, num_nodes, -1).clone()
    # The root is already counted: it was emitted by the step before.
    on_path = mask & (tree.depths > 0)[:, None, :]
    tokens = tree.tokens[:, None, :].expand(-1, num_nodes, -1)
    in_output.scatter_add_(2, tokens, on_path.to(torch.int32))
    in_prompt = counts.in_prompt.repeat_interleave(num_nodes, dim=0)
    return flat, TokenCounts(in_prompt=in_prompt, in_output=in_output.flatten(0, 1))
