"""Trees of the draft heads' choices: every head guesses one depth, whatever stands above, and a builder picks which
combinations are worth a row of the verification pass.

- `cartesian`: the full product of the first choices of every depth.
- `static_sparse`: a topology fixed beforehand; `sparse_paths` grows one from measured accuracies (Medusa, 2401.10774,
  section 2.3.3).
- `dynamic`: the likeliest paths of this very step, best first (OPT-Tree, 2406.17276).

A node of a topology is a *rank path*: (2, 0) = the first choice of depth 2 below the third choice of depth 1.

Letters: B sequences, K depths, M choices a depth, N nodes (the root not counted).
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from gorgon_engine.tree.candidates import CandidateTree
from gorgon_protocol.errors import BadRequestError

RankPath = tuple[int, ...]

_SOURCE = "head"


@dataclass(frozen=True, slots=True)
class Topology:
    """A fixed tree as tensors on the drafter's device: made once, used every step."""

    parents: Tensor  # [N] int64, parents before children, -1 = child of the root
    levels: Tensor  # [N] int64: depth - 1
    ranks: Tensor  # [N] int64
    lineages: Tensor  # [N, max_depth] int64: 1 + the node's ancestors and itself, outermost first; 0 = none that deep
    max_depth: int
    num_ranks: int  # choices a depth that it needs

    @classmethod
    def of(cls, paths: Sequence[Sequence[int]], device: torch.device) -> "Topology":
        """Raises `BadRequestError` unless every path is given once, behind its parent's."""
        index: dict[RankPath, int] = {}
        for path in map(tuple, paths):
            if not path or min(path) < 0:
                raise BadRequestError(f"tree path {list(path)} is not a list of ranks from 0 up")
            if path in index:
                raise BadRequestError(f"tree path {list(path)} is given twice")
            if len(path) > 1 and path[:-1] not in index:
                raise BadRequestError(f"tree path {list(path)} comes before its parent {list(path[:-1])}")
            index[path] = len(index)
        if not index:
            raise BadRequestError("a tree needs at least one path")
        max_depth = max(map(len, index))
        lineages = [
            [1 + index[path[: depth + 1]] if depth < len(path) else 0 for depth in range(max_depth)] for path in index
        ]

        def tensor(values: Sequence[object]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return cls(
            parents=tensor([index.get(path[:-1], -1) for path in index]),
            levels=tensor([len(path) - 1 for path in index]),
            ranks=tensor([path[-1] for path in index]),
            lineages=tensor(lineages),
            max_depth=max_depth,
            num_ranks=1 + max(map(max, index)),
        )

    def place(
        self, tokens: Tensor, log_probs: Tensor, *, max_nodes: int | None = None, source: str = _SOURCE
    ) -> CandidateTree:
        """The tree of per-depth choices: tokens [B, K, M] int64, log_probs [B, K, M] float32, choices in rank order.

        max_nodes: take the first so many paths. Raises `BadRequestError` where the topology asks for more depths or
        choices than there are.
        """
        batch, num_depths, num_choices = tokens.shape
        if self.max_depth > num_depths or self.num_ranks > num_choices:
            raise BadRequestError(
                f"the tree is {self.max_depth} deep with {self.num_ranks} ranks: "
                f"there are {num_depths} depths of {num_choices} choices"
            )
        ranks, levels = self.ranks[:max_nodes], self.levels[:max_nodes]
        choice = levels * num_choices + ranks  # [N]
        own = torch.nn.functional.pad(log_probs.flatten(1)[:, choice], (1, 0))  # [B, 1 + N]
        on_path = own[:, self.lineages[:max_nodes]]  # [B, N, max_depth]
        # Summed outermost first: rounding is monotone, so no child ends above its parent.
        total = on_path[:, :, 0]
        for depth in range(1, self.max_depth):
            total = total + on_path[:, :, depth]
        return CandidateTree(
            tokens=tokens.flatten(1)[:, choice],
            parents=self.parents[:max_nodes].expand(batch, -1),
            log_probs=total,
            ranks=ranks.expand(batch, -1),
            source=source,
        )


def cartesian(
    tokens: Tensor, log_probs: Tensor, widths: Sequence[int], max_nodes: int, *, source: str = _SOURCE
) -> CandidateTree:
    """All combinations of the first `widths[d]` choices of each depth, cut breadth-first to `max_nodes`.

    tokens: [B, K, M] int64; log_probs: [B, K, M] float32. Raises `BadRequestError` for widths that do not fit.
    """
    return static_sparse(tokens, log_probs, cartesian_paths(widths, max_nodes), source=source)


def static_sparse(
    tokens: Tensor, log_probs: Tensor, paths: Sequence[Sequence[int]], *, source: str = _SOURCE
) -> CandidateTree:
    """The tree of given rank paths. Makes the `Topology` anew: callers with many steps keep one.

    tokens: [B, K, M] int64; log_probs: [B, K, M] float32. Raises `BadRequestError` for paths that are no tree or do
    not fit.
    """
    return Topology.of(paths, tokens.device).place(tokens, log_probs, source=source)


def dynamic(tokens: Tensor, log_probs: Tensor, max_nodes: int, *, source: str = _SOURCE) -> CandidateTree:
    """The `max_nodes` likeliest paths over the product of all depths' choices, best first; ties by depth.

    tokens: [B, K, M] int64; log_probs: [B, K, M] float32, at most 0. Fewer nodes where there are fewer paths.
    """
    _check_budget(max_nodes)
    batch, num_depths, num_choices = tokens.shape
    # A beam of max_nodes a depth is exact: a path beaten by max_nodes others of its own length is not among the best
    # max_nodes of all lengths, and neither is anything below it, since going deeper never raises a probability.
    beam = torch.zeros((batch, 1), dtype=log_probs.dtype, device=tokens.device)
    scores, above, choices = [], [], []
    start = 0  # column of the level's first node; the root is column 0
    for depth in range(num_depths):
        grown = (beam[:, :, None] + log_probs[:, depth, None]).flatten(1)  # [B, beam * M]
        beam, picked = best_first(grown, max_nodes)
        scores.append(beam)
        above.append(torch.div(picked, num_choices, rounding_mode="floor").add_(start))
        choices.append(picked.remainder_(num_choices).add_(depth * num_choices))
        start = 1 + sum(level.shape[1] for level in scores[:-1])
    # Stable: a level's nodes come behind those above them, so a parent precedes its children also where they tie.
    best, order = best_first(torch.cat(scores, dim=1), max_nodes)
    num_nodes = best.shape[1]
    place = order.new_full((batch, start + beam.shape[1]), -1)
    place.scatter_(1, order + 1, torch.arange(num_nodes, device=tokens.device).expand(batch, -1))
    choice = torch.cat(choices, dim=1).gather(1, order)
    return CandidateTree(
        tokens=tokens.flatten(1).gather(1, choice),
        parents=place.gather(1, torch.cat(above, dim=1).gather(1, order)),
        log_probs=best,
        ranks=choice % num_choices,
        source=source,
    )


def cartesian_paths(widths: Sequence[int], max_nodes: int) -> list[RankPath]:
    """Rank paths of the product of `widths` choices, breadth-first, at most `max_nodes`."""
    _check_budget(max_nodes)
    if not widths or min(widths) < 1:
        raise BadRequestError(f"tree widths must be positive, one a depth: got {list(widths)}")
    paths: list[RankPath] = []
    level: list[RankPath] = [()]
    for width in widths:
        level = list(islice(_below(level, width), max_nodes - len(paths)))
        paths += level
    return paths


def sparse_paths(accuracies: Sequence[Sequence[float]], max_nodes: int) -> list[RankPath]:
    """The `max_nodes` rank paths most often right, taken for independent, best first; every prefix of the list is a
    tree. Paths that were never right are left out.

    accuracies: [K][M], the share of held-out positions where the depth's choice of that rank was the right token.
    """
    _check_budget(max_nodes)
    if not accuracies or any(not 0 <= value <= 1 for row in accuracies for value in row):
        raise BadRequestError("accuracies must be shares between 0 and 1, at least one depth of them")
    # A heap of (-value, depth, path): of equal paths the shallower, then the lower-ranked comes first.
    heap: list[tuple[float, int, RankPath]] = []

    def push_children(path: RankPath, value: float) -> None:
        depth = len(path)
        for rank, accuracy in enumerate(accuracies[depth] if depth < len(accuracies) else ()):
            if value * accuracy > 0:
                heapq.heappush(heap, (-value * accuracy, depth + 1, (*path, rank)))

    push_children((), 1.0)
    paths: list[RankPath] = []
    while heap and len(paths) < max_nodes:
        value, _, path = heapq.heappop(heap)
        paths.append(path)
        push_children(path, -value)
    return paths


def _below(level: Sequence[RankPath], width: int) -> Iterator[RankPath]:
    return ((*path, rank) for path in level for rank in range(width))


def best_first(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and columns of the `count` largest of scores [B, n], descending, the lower column first among equals."""
    values, order = torch.sort(scores, dim=1, descending=True, stable=True)
    return values[:, :count], order[:, :count]


def _check_budget(max_nodes: int) -> None:
    if max_nodes < 1:
        raise BadRequestError(f"a drafted tree needs at least 1 node beside the root: got max_nodes {max_nodes}")
