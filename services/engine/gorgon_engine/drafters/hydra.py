"""Drafting with sequentially dependent heads (Hydra, 2402.05109): depth by depth, each guess seeing those above it.

A beam of the likeliest paths goes down the depths; every path in it proposes its likeliest next tokens, and the
likeliest paths of all depths are the tree (EAGLE-2, 2406.16858, section 4; OPT-Tree, 2406.17276).

Letters: B sequences, W paths in the beam, M choices a path, C hidden size, V tokens that can be drafted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gorgon_engine.drafters.base import DraftContext
from gorgon_engine.drafters.choices import top_log_probs
from gorgon_engine.heads.hydra import HydraHeads, Projection
from gorgon_engine.tree.builders import RankPath, Topology, best_first
from gorgon_engine.tree.candidates import CandidateTree
from gorgon_protocol.errors import BadRequestError


@dataclass(frozen=True, slots=True)
class BeamLimits:
    """How much of a dynamic tree is looked for. A path outside the beam is still proposed, only nothing below it."""

    num_choices: int = 8  # tokens that a path proposes
    width: int = 16  # paths that go on to the next depth
    # On a CPU, where every row costs, less likely paths do not go on, and where none is left the search ends.
    min_path_prob: float = 0.0


@dataclass(frozen=True, slots=True)
class _Level:
    """The nodes found at one depth."""

    tokens: Tensor  # [B, n] int64
    parents: Tensor  # [B, n] int64, index into all nodes, -1 = the root
    log_probs: Tensor  # [B, n] float32, of the path
    ranks: Tensor  # [B, n] int64


@dataclass(frozen=True, slots=True)
class _FixedLevel:
    """The n nodes of one depth of a fixed topology; E of the depth above have children and were looked below."""

    places: Tensor  # [n] int64 in the list of paths
    parents: Tensor  # [n] int64 in the list of paths, -1 = the root
    rows: Tensor  # [n] int64: which of the E nodes is the parent
    ranks: Tensor  # [n] int64
    looked_below: Tensor  # [E'] int64: which of the n nodes have children
    num_ranks: int


def _plan(paths: Sequence[RankPath], device: torch.device) -> list[_FixedLevel]:
    place = {path: number for number, path in enumerate(paths)}
    with_children = {path[:-1] for path in paths}
    above: list[RankPath] = [()]
    plan = []
    for depth in range(1, max(map(len, paths)) + 1):
        level = [path for path in paths if len(path) == depth]
        row = {path: number for number, path in enumerate(above)}
        below = [number for number, path in enumerate(level) if path in with_children]

        def tensor(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        plan.append(
            _FixedLevel(
                places=tensor([place[path] for path in level]),
                parents=tensor([place.get(path[:-1], -1) for path in level]),
                rows=tensor([row[path[:-1]] for path in level]),
                ranks=tensor([path[-1] for path in level]),
                looked_below=tensor(below),
                num_ranks=1 + max(path[-1] for path in level),
            )
        )
        above = [level[number] for number in below]
    return plan


class HydraDrafter:
    """A tree of the heads' likeliest continuations: this step's likeliest paths, or a fixed topology."""

    name = "head"
    is_costly = True

    def __init__(
        self,
        heads: HydraHeads,
        *,
        embed: Callable[[Tensor], Tensor],
        project: Projection | None = None,
        draft_vocabulary: Tensor | None = None,
        paths: Sequence[RankPath] | None = None,
        limits: BeamLimits | None = None,
    ) -> None:
        """embed: tokens [...] -> embeddings [..., C]. project: features [..., C] -> logits [..., V], for heads that
        share the backbone's projection. draft_vocabulary: [V] int64, the token of each row of the projections; None =
        all tokens. paths: the rank paths of a fixed topology, parents first, best first; None = dynamic.

        Raises `BadRequestError` for paths that are no tree or deeper than there are heads.
        """
        self._heads = heads
        self._embed = embed
        self._project = project
        self._draft_vocabulary = draft_vocabulary
        self._limits = limits or BeamLimits()
        # Packed for the native kernels, they have no parameters of their own and take float32.
        self._dtype = next((parameter.dtype for parameter in heads.heads.parameters()), torch.float32)
        self._paths = None if paths is None else [tuple(path) for path in paths]
        self._plans: dict[int, list[_FixedLevel]] = {}
        if paths is not None:
            depth = Topology.of(paths, torch.device("cpu")).max_depth
            if depth > heads.num_heads:
                raise BadRequestError(
                    f"the tree is {depth} deep: the heads guess {heads.num_heads} tokens beyond the next"
                )

    @torch.inference_mode()
    def propose(self, context: DraftContext, max_nodes: int) -> CandidateTree:
        if self._paths is None:
            return self._dynamic(context, max_nodes)
        if max_nodes not in self._plans:  # made once: a constant made during a step is a synchronising copy on a GPU
            self._plans[max_nodes] = _plan(self._paths[:max_nodes], context.hidden.device)
        return self._fixed(context, self._plans[max_nodes])

    def _dynamic(self, context: DraftContext, max_nodes: int) -> CandidateTree:
        limits = self._limits
        hidden, conditions = self._start(context)
        beam = torch.zeros_like(context.root_tokens, dtype=torch.float32)[:, None]  # [B, W] log-probabilities
        index = torch.full_like(context.root_tokens, -1)[:, None]  # [B, W] the beam's places among all nodes
        levels: list[_Level] = []
        found = 0
        for depth in range(1, self._heads.num_heads + 1):
            log_probs, tokens = self._choices(depth, hidden, conditions, limits.num_choices)  # [B, W, M]
            num_choices = tokens.shape[2]
            scores = (beam[:, :, None] + log_probs).flatten(1)
            kept, picked = best_first(scores, max_nodes)
            parent = torch.div(picked, num_choices, rounding_mode="floor")  # [B, n] place in the beam
            level = _Level(
                tokens=tokens.flatten(1).gather(1, picked),
                parents=index.gather(1, parent),
                log_probs=kept,
                ranks=picked % num_choices,
            )
            levels.append(level)
            beam = self._beam(level)
            width = beam.shape[1]
            if depth == self._heads.num_heads or width == 0:
                break
            conditions = self._extend(conditions, parent[:, :width], level.tokens[:, :width])
            index = (found + torch.arange(width, device=beam.device)).expand(beam.shape[0], -1)
            found += kept.shape[1]
        return self._join(levels, max_nodes)

    def _beam(self, level: _Level) -> Tensor:
        """Log-probabilities [B, W] of the paths that go on; -inf where a row has fewer of them than another."""
        limits = self._limits
        beam = level.log_probs[:, : limits.width]
        if limits.min_path_prob == 0.0 or beam.device.type != "cpu":
            return beam
        likely = beam.exp() >= limits.min_path_prob
        width = int(likely.sum(dim=1).max())
        # What is looked at for another row's sake is no guess of this one: it must not depend on its neighbours.
        return beam[:, :width].masked_fill(~likely[:, :width], -torch.inf)

    def _join(self, levels: list[_Level], max_nodes: int) -> CandidateTree:
        """The likeliest nodes of all depths. Depth by depth and stable, so that parents stay before children."""
        log_probs, order = best_first(torch.cat([level.log_probs for level in levels], dim=1), max_nodes)
        count = order.shape[1]
        total = sum(level.tokens.shape[1] for level in levels)
        place = order.new_full((order.shape[0], total + 1), -1)
        place.scatter_(1, order + 1, torch.arange(count, device=order.device).expand_as(order))
        parents = torch.cat([level.parents for level in levels], dim=1).gather(1, order)
        tree = CandidateTree(
            tokens=torch.cat([level.tokens for level in levels], dim=1).gather(1, order),
            parents=place.gather(1, parents + 1),
            log_probs=log_probs,
            ranks=torch.cat([level.ranks for level in levels], dim=1).gather(1, order),
            source=self.name,
        )
        return _padded(tree, max_nodes - count)

    def _fixed(self, context: DraftContext, plan: "list[_FixedLevel]") -> CandidateTree:
        hidden, conditions = self._start(context)
        above = torch.zeros_like(context.root_tokens, dtype=torch.float32)[:, None]  # [B, E] of the nodes looked below
        levels: list[_Level] = []
        for depth, fixed in enumerate(plan, start=1):
            log_probs, tokens = self._choices(depth, hidden, conditions, fixed.num_ranks)  # [B, E, M]
            if tokens.shape[2] < fixed.num_ranks:
                raise BadRequestError(
                    f"the tree asks for choice {fixed.num_ranks - 1} of {tokens.shape[2]} tokens that can be drafted"
                )
            choice = fixed.rows * tokens.shape[2] + fixed.ranks
            level = _Level(
                tokens=tokens.flatten(1)[:, choice],
                parents=fixed.parents.expand(tokens.shape[0], -1),
                log_probs=above[:, fixed.rows] + log_probs.flatten(1)[:, choice],
                ranks=fixed.ranks.expand(tokens.shape[0], -1),
            )
            levels.append(level)
            if depth < len(plan):
                below = fixed.looked_below
                parents = fixed.rows[below].expand(tokens.shape[0], -1)
                conditions = self._extend(conditions, parents, level.tokens[:, below])
                above = level.log_probs[:, below]
        order = torch.cat([fixed.places for fixed in plan]).argsort()

        def in_order(name: str) -> Tensor:
            return torch.cat([getattr(level, name) for level in levels], dim=1)[:, order]

        return CandidateTree(
            tokens=in_order("tokens"),
            parents=in_order("parents"),
            log_probs=in_order("log_probs"),
            ranks=in_order("ranks"),
            source=self.name,
        )

    def _start(self, context: DraftContext) -> tuple[Tensor, Tensor]:
        """The hidden states [B, 1, C], and what the first head reads [B, 1, 2 C]."""
        hidden = context.hidden[:, None].to(self._dtype)
        return hidden, torch.cat(
            [self._heads.condition(hidden), self._condition_of(context.root_tokens[:, None])], dim=2
        )

    def _extend(self, conditions: Tensor, parents: Tensor, tokens: Tensor) -> Tensor:
        """The parents' inputs with one token more. conditions [B, W, n C]; parents, tokens [B, W'] -> [B, W', n' C]."""
        upper = conditions.gather(1, parents[:, :, None].expand(-1, -1, conditions.shape[2]))
        return torch.cat([upper, self._condition_of(tokens)], dim=2)

    def _condition_of(self, tokens: Tensor) -> Tensor:
        return self._heads.condition(self._embed(tokens).to(self._dtype))

    def _choices(self, depth: int, hidden: Tensor, conditions: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The likeliest tokens below each path, both [B, W, M]."""
        wide = hidden.expand(-1, conditions.shape[1], -1)
        logits = self._heads.project(depth, self._heads.features(depth, wide, conditions), self._project)
        log_probs, places = top_log_probs(logits, count)
        return log_probs, places if self._draft_vocabulary is None else self._draft_vocabulary[places]


def _padded(tree: CandidateTree, count: int) -> CandidateTree:
    """The tree with `count` invalid nodes behind it: sequences that join a batch have trees of one size."""
    if count <= 0:
        return tree

    def pad(values: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(values, (0, count), value=value)

    return replace(
        tree,
        tokens=pad(tree.tokens, 0),
        parents=pad(tree.parents, -1),
        log_probs=pad(tree.log_probs, -torch.inf),
        ranks=pad(tree.ranks, 0),
    )
