"""What a search for likely paths should have found: plain loops over one sequence, and the paths of a tree."""

from collections.abc import Callable
from itertools import product

import pytest
import torch

from gorgon_engine.drafters.beam import BeamLimits
from gorgon_engine.tree.candidates import CandidateTree

Tokens = tuple[int, ...]  # of a path, below the root
Following = Callable[[Tokens], dict[int, float]]  # the log-probability of every token below a path


def nodes_of(tree: CandidateTree, row: int) -> dict[Tokens, float]:
    """Path -> log-probability of the real nodes, in the tree's order. Checks that they are a tree."""
    paths: list[Tokens] = []
    found: dict[Tokens, float] = {}
    columns = (tree.tokens[row].tolist(), tree.parents[row].tolist(), tree.log_probs[row].tolist())
    for place, (token, parent, log_prob) in enumerate(zip(*columns, strict=True)):
        assert -1 <= parent < place, "parents come first"
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
        if log_prob > -torch.inf:
            assert paths[-1] not in found, "no path is given twice"
            assert parent < 0 or log_prob <= tree.log_probs[row, parent], "a child is never likelier than its parent"
            found[paths[-1]] = log_prob
    return found


def assert_same_nodes(
    found: dict[Tokens, float], expected: dict[Tokens, float], *, tolerance: float = 1e-4, absolute: float = 1e-4
) -> None:
    """Equal but for rounding, which may change the places of paths that almost tie, the last one's as well."""
    values = list(expected.values())
    assert list(found.values()) == pytest.approx(values, rel=tolerance, abs=absolute)
    for path, value in found.items():
        assert value == pytest.approx(expected.get(path, values[-1]), rel=tolerance, abs=absolute)


def by_trying_all(following: Following, tokens: list[int], num_depths: int) -> dict[Tokens, float]:
    """Every path of every length, best first."""
    every = [path for depth in range(1, num_depths + 1) for path in product(tokens, repeat=depth)]
    values = {path: sum(following(path[:depth])[path[depth]] for depth in range(len(path))) for path in every}
    return dict(sorted(values.items(), key=lambda item: -item[1]))


def by_beam(following: Following, limits: BeamLimits, num_depths: int, max_nodes: int) -> dict[Tokens, float]:
    """What the limits leave of it."""
    found: dict[Tokens, float] = {}
    beam: dict[Tokens, float] = {(): 0.0}
    for _ in range(num_depths):
        level: dict[Tokens, float] = {}
        for path, value in beam.items():
            choices = sorted(following(path).items(), key=lambda item: -item[1])[: limits.num_choices]
            level |= {(*path, token): value + log_prob for token, log_prob in choices}
        level = dict(sorted(level.items(), key=lambda item: -item[1])[:max_nodes])
        found |= level
        likely = {path: value for path, value in level.items() if value >= torch.tensor(limits.min_path_prob).log()}
        beam = dict(list(likely.items())[: limits.width])
    return dict(sorted(found.items(), key=lambda item: -item[1])[:max_nodes])


def by_ranks(following: Following, paths: list[tuple[int, ...]]) -> dict[Tokens, float]:
    """The nodes of a fixed topology, in its order."""
    expected = {}
    for path in paths:
        tokens: Tokens = ()
        value = 0.0
        for rank in path:
            token, log_prob = sorted(following(tokens).items(), key=lambda item: -item[1])[rank]
            tokens, value = (*tokens, token), value + log_prob
        expected[tokens] = value
    return expected
