"""The search of drafters that see what they have drafted: depth by depth, each guess below those above it.

A beam of the likeliest paths goes down the depths; every path in it proposes its likeliest next tokens, and the
likeliest paths of all depths are the tree (EAGLE-2, 2406.16858, section 4; OPT-Tree, 2406.17276). Or the paths of a
fixed topology are followed, whatever they are worth.

Letters: B sequences, W paths in the beam, M choices a path, n nodes of a depth.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

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


class Beam(Protocol):
    """W paths of every sequence, all of one length; to begin with the empty one."""

    def choices(self, count: int) -> tuple[Tensor, Tensor]:
        """The `count` likeliest (or all) tokens below each path, descending: log-probabilities float32 and tokens
        int64, [B, W, M]."""
        ...

    def extend(self, parents: Tensor, tokens: Tensor) -> Self:
        """Paths one token longer: parents [B, W'] are places in this beam, tokens [B, W'] int64."""
        ...


@dataclass(frozen=True, slots=True)
class _Level:
    """The nodes found at one depth."""

    tokens: Tensor  # [B, n] int64
    parents: Tensor  # [B, n] int64, index into all nodes, -1 = the root
    log_probs: Tensor  # [B, n] float32, of the path
    ranks: Tensor  # [B, n] int64


def likeliest_tree(beam: Beam, *, num_depths: int, limits: BeamLimits, max_nodes: int, source: str) -> CandidateTree:
    """The likeliest paths of this step, `max_nodes` wide: what was not found is padding, so that sequences that join a
    batch have trees of one size. beam: the empty paths, W = 1.

    Static-shaped on a GPU; on a CPU unlikely paths are left out as `limits` say.
    """
    levels: list[_Level] = []
    found = 0
    values = index = None  # [B, W] log-probabilities of the paths in the beam, and their places among all nodes
    for depth in range(1, num_depths + 1):
        log_probs, tokens = beam.choices(limits.num_choices)  # [B, W, M]
        if values is None or index is None:
            values, index = torch.zeros_like(log_probs[:, :, 0]), torch.full_like(tokens[:, :, 0], -1)
        num_choices = tokens.shape[2]
        kept, picked = best_first((values[:, :, None] + log_probs).flatten(1), max_nodes)
        parent = torch.div(picked, num_choices, rounding_mode="floor")  # [B, n] place in the beam
        drafted = tokens.flatten(1).gather(1, picked)
        levels.append(_Level(drafted, index.gather(1, parent), kept, picked % num_choices))
        values = _going_on(kept, limits)
        width = values.shape[1]
        if depth == num_depths or width == 0:
            break
        beam = beam.extend(parent[:, :width], drafted[:, :width])
        index = (found + torch.arange(width, device=kept.device)).expand_as(values)
        found += kept.shape[1]
    return _join(levels, max_nodes, source)


def _going_on(log_probs: Tensor, limits: BeamLimits) -> Tensor:
    """Log-probabilities [B, W] of the paths that go on; -inf where a row has fewer of them than another."""
    beam = log_probs[:, : limits.width]
    if limits.min_path_prob == 0.0 or beam.device.type != "cpu":
        return beam
    likely = beam.exp() >= limits.min_path_prob
    width = int(likely.sum(dim=1).max())
    # What is looked at for another row's sake is no guess of this one: it must not depend on its neighbours.
    return beam[:, :width].masked_fill(~likely[:, :width], -torch.inf)


def _join(levels: Sequence[_Level], max_nodes: int, source: str) -> CandidateTree:
    """The likeliest nodes of all depths. Depth by depth and stable, so that parents stay before children."""
    log_probs, order = best_first(torch.cat([level.log_probs for level in levels], dim=1), max_nodes)
    count = order.shape[1]
    total = sum(level.tokens.shape[1] for level in levels)
    place = order.new_full((order.shape[0], total + 1), -1)
    place.scatter_(1, order + 1, torch.arange(count, device=order.device).expand_as(order))
    parents = torch.cat([level.parents for level in levels], dim=1).gather(1, order)
    padding = log_probs == -torch.inf  # of rows whose search ended before their neighbours'
    tree = CandidateTree(
        tokens=torch.cat([level.tokens for level in levels], dim=1).gather(1, order).masked_fill(padding, 0),
        parents=place.gather(1, parents + 1).masked_fill(padding, -1),
        log_probs=log_probs,
        ranks=torch.cat([level.ranks for level in levels], dim=1).gather(1, order).masked_fill(padding, 0),
        source=source,
    )
    return _padded(tree, max_nodes - count)


def _padded(tree: CandidateTree, count: int) -> CandidateTree:
    """The tree with `count` invalid nodes behind it."""
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


@dataclass(frozen=True, slots=True)
class _FixedLevel:
    """The n nodes of one depth of a fixed topology; E of the depth above have children and were looked below."""

    places: Tensor  # [n] int64 in the list of paths
    parents: Tensor  # [n] int64 in the list of paths, -1 = the root
    rows: Tensor  # [n] int64: which of the E nodes is the parent
    ranks: Tensor  # [n] int64
    looked_below: Tensor  # [E'] int64: which of the n nodes have children
    num_ranks: int


class FixedTree:
    """A topology that is followed in every step."""

    def __init__(self, paths: Sequence[RankPath], *, num_depths: int) -> None:
        """paths: rank paths, parents first, best first. Raises `BadRequestError` for paths that are no tree or deeper
        than `num_depths`."""
        depth = Topology.of(paths, torch.device("cpu")).max_depth
        if depth > num_depths:
            raise BadRequestError(f"the tree is {depth} deep: the heads guess {num_depths} tokens beyond the next")
        self._paths = [tuple(path) for path in paths]
        self._plans: dict[int, list[_FixedLevel]] = {}

    def follow(self, beam: Beam, root_tokens: Tensor, *, max_nodes: int, source: str) -> CandidateTree:
        """The first `max_nodes` paths, in their order. beam: the empty paths, W = 1; root_tokens [B].

        Raises `BadRequestError` where fewer tokens can be drafted than the tree has ranks.
        """
        if max_nodes not in self._plans:  # made once: a constant made during a step is a synchronising copy on a GPU
            self._plans[max_nodes] = _plan(self._paths[:max_nodes], root_tokens.device)
        plan = self._plans[max_nodes]
        above = torch.zeros_like(root_tokens, dtype=torch.float32)[:, None]  # [B, E] of the nodes looked below
        levels: list[_Level] = []
        for depth, fixed in enumerate(plan, start=1):
            log_probs, tokens = beam.choices(fixed.num_ranks)  # [B, E, M]
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
                beam = beam.extend(fixed.rows[below].expand(tokens.shape[0], -1), level.tokens[:, below])
                above = level.log_probs[:, below]
        order = torch.cat([fixed.places for fixed in plan]).argsort()

        def in_order(name: str) -> Tensor:
            return torch.cat([getattr(level, name) for level in levels], dim=1)[:, order]

        return CandidateTree(
            tokens=in_order("tokens"),
            parents=in_order("parents"),
            log_probs=in_order("log_probs"),
            ranks=in_order("ranks"),
            source=source,
        )


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
