"""Predictions against arithmetic by hand, against brute force over all trees, and against simulation."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon_engine.tree.builders import Topology
from gorgon_protocol.errors import BadRequestError
from gorgon_trainer.evaluation.predicted import (
    predicted_acceptance_length,
    predicted_acceptance_lengths,
    recommended_tree,
)

HEADS = [[0.5, 0.2], [0.4, 0.1]]


def test_by_hand() -> None:
    # Paths: (0)=.5, (0,0)=.2 and (1)=.2, (1,0)=.08, (0,1)=.05, (1,1)=.02.
    assert recommended_tree(HEADS, 7) == [(0,), (1,), (0, 0), (1, 0), (0, 1), (1, 1)]
    assert [predicted_acceptance_length(HEADS, n) for n in range(1, 9)] == pytest.approx(
        [1.0, 1.5, 1.7, 1.9, 1.98, 2.03, 2.05, 2.05]
    )


shares = st.lists(st.floats(0.0, 0.5), min_size=1, max_size=2)  # few enough to try every tree


@settings(deadline=None)
@given(accuracies=st.lists(shares, min_size=1, max_size=3), num_nodes=st.integers(2, 6))
def test_no_other_tree_of_that_size_promises_more(accuracies: list[list[float]], num_nodes: int) -> None:
    value = {
        path: _product(accuracies, path)
        for depth in range(1, len(accuracies) + 1)
        for path in itertools.product(*(range(len(row)) for row in accuracies[:depth]))
    }
    best = max(
        sum(value[path] for path in chosen)
        for size in range(min(num_nodes - 1, len(value)) + 1)
        for chosen in itertools.combinations(value, size)
        if all(len(path) == 1 or path[:-1] in chosen for path in chosen)
    )
    assert predicted_acceptance_length(accuracies, num_nodes) == pytest.approx(1.0 + best)


def _product(accuracies: list[list[float]], path: tuple[int, ...]) -> float:
    value = 1.0
    for depth, rank in enumerate(path):
        value *= accuracies[depth][rank]
    return value


def test_the_reported_sizes_rise_and_their_trees_are_prefixes_of_one() -> None:
    accuracies = [[0.4 / (1 + rank) ** 2 for rank in range(10)] for _ in range(4)]
    lengths = predicted_acceptance_lengths(accuracies)
    assert list(lengths) == [4, 8, 16, 32, 64]
    assert list(lengths.values()) == sorted(set(lengths.values()))
    whole = recommended_tree(accuracies)
    assert len(whole) == 63
    for num_nodes in lengths:
        assert recommended_tree(accuracies, num_nodes) == whole[: num_nodes - 1]
    Topology.of(whole, torch.device("cpu"))  # raises unless parents come first


def test_what_was_never_right_is_not_in_the_tree() -> None:
    assert recommended_tree([[0.5, 0.0], [0.0, 0.0]], 64) == [(0,)]


@pytest.mark.parametrize(
    ("accuracies", "num_nodes", "message"),
    [
        ([], 4, "at least one depth"),
        ([[1.5]], 4, "between 0 and 1"),
        ([[-0.1]], 4, "between 0 and 1"),
        ([[0.5]], 0, "at least one node"),
    ],
)
def test_bad_input(accuracies: list[list[float]], num_nodes: int, message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        predicted_acceptance_length(accuracies, num_nodes)
