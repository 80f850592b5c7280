"""Builders against brute force over all rank paths, in the same float32 sums."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon_engine.tree.builders import (
    RankPath,
    Topology,
    cartesian,
    cartesian_paths,
    dynamic,
    sparse_paths,
    static_sparse,
)
from gorgon_engine.tree.candidates import CandidateTree
from gorgon_engine.tree.tree import merge_candidates
from gorgon_protocol.errors import BadRequestError

Choices = tuple[torch.Tensor, torch.Tensor]


@st.composite
def choices(draw: st.DrawFn) -> Choices:
    """Distinct tokens and descending log-probabilities, with ties, certainties (0) and padding (-inf)."""
    batch, depths, num = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    log_probs = -torch.rand(batch, depths, num, generator=generator) * 4
    if draw(st.booleans()):  # few distinct values: ties within and across depths
        log_probs = log_probs.round()
    if draw(st.booleans()):
        log_probs[torch.rand(log_probs.shape, generator=generator) < 0.2] = -torch.inf
    log_probs = log_probs.sort(dim=2, descending=True).values
    tokens = torch.stack([torch.randperm(1000, generator=generator)[:num] for _ in range(batch * depths)])
    return tokens.view(batch, depths, num), log_probs


def all_paths(depths: int, num: int) -> list[RankPath]:
    return [path for depth in range(1, depths + 1) for path in itertools.product(range(num), repeat=depth)]


def path_log_prob(log_probs: torch.Tensor, path: RankPath) -> float:
    total = torch.zeros(())
    for depth, rank in enumerate(path):
        total = total + log_probs[depth, rank]
    return float(total)


def rank_paths(tree: CandidateTree, row: int) -> list[RankPath]:
    paths: list[RankPath] = []
    for node, parent in enumerate(tree.parents[row].tolist()):
        assert parent < node, "a parent precedes its children"
        paths.append((*(paths[parent] if parent >= 0 else ()), int(tree.ranks[row, node])))
    return paths


def check_against_choices(tree: CandidateTree, tokens: torch.Tensor, log_probs: torch.Tensor) -> None:
    """Every node says what its rank path says: token, path log-probability, never above its parent's."""
    for row in range(tokens.shape[0]):
        paths = rank_paths(tree, row)
        assert len(set(paths)) == len(paths)
        for node, path in enumerate(paths):
            assert int(tree.tokens[row, node]) == int(tokens[row, len(path) - 1, path[-1]])
            assert float(tree.log_probs[row, node]) == path_log_prob(log_probs[row], path)
            parent = int(tree.parents[row, node])
            assert parent < 0 or tree.log_probs[row, parent] >= tree.log_probs[row, node]


def same(first: CandidateTree, second: CandidateTree) -> bool:
    names = ("tokens", "parents", "log_probs", "ranks")
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in names)


@settings(max_examples=150, deadline=None)
@given(drawn=choices(), max_nodes=st.integers(1, 40))
def test_dynamic_takes_the_likeliest_of_all_paths(drawn: Choices, max_nodes: int) -> None:
    tokens, log_probs = drawn
    batch, depths, num = tokens.shape
    tree = dynamic(tokens, log_probs, max_nodes)
    check_against_choices(tree, tokens, log_probs)
    for row in range(batch):
        every = [path_log_prob(log_probs[row], path) for path in all_paths(depths, num)]
        assert tree.log_probs[row].tolist() == sorted(every, reverse=True)[:max_nodes]
        single = dynamic(tokens[row : row + 1], log_probs[row : row + 1], max_nodes)
        assert torch.equal(single.tokens[0], tree.tokens[row])
        assert torch.equal(single.parents[0], tree.parents[row])


@settings(max_examples=60, deadline=None)
@given(drawn=choices(), max_nodes=st.integers(1, 60), data=st.data())
def test_cartesian_is_the_product_cut_breadth_first(drawn: Choices, max_nodes: int, data: st.DataObject) -> None:
    tokens, log_probs = drawn
    _, depths, num = tokens.shape
    widths = data.draw(st.lists(st.integers(1, num), min_size=1, max_size=depths))
    tree = cartesian(tokens, log_probs, widths, max_nodes)
    check_against_choices(tree, tokens, log_probs)
    product = [p for d in range(1, len(widths) + 1) for p in itertools.product(*map(range, widths[:d]))]
    for row in range(tokens.shape[0]):
        assert rank_paths(tree, row) == product[:max_nodes]


@settings(max_examples=60, deadline=None)
@given(drawn=choices(), max_nodes=st.integers(1, 30), data=st.data())
def test_static_sparse_is_the_given_topology(drawn: Choices, max_nodes: int, data: st.DataObject) -> None:
    """Random prefix-closed trees: grown one node at a time below what is there."""
    tokens, log_probs = drawn
    _, depths, num = tokens.shape
    chosen: list[RankPath] = []
    for _ in range(max_nodes):
        grown = [p for p in all_paths(depths, num) if p not in chosen and (len(p) == 1 or p[:-1] in chosen)]
        if not grown:
            break
        chosen.append(data.draw(st.sampled_from(grown)))
    tree = static_sparse(tokens, log_probs, chosen)
    check_against_choices(tree, tokens, log_probs)
    assert rank_paths(tree, 0) == chosen
    kept = Topology.of(chosen, tokens.device)
    assert same(tree, kept.place(tokens, log_probs))
    fewer = data.draw(st.integers(1, len(chosen)))
    assert same(static_sparse(tokens, log_probs, chosen[:fewer]), kept.place(tokens, log_probs, max_nodes=fewer))
    for row in range(tokens.shape[0]):
        single = kept.place(tokens[row : row + 1], log_probs[row : row + 1])
        assert torch.equal(single.log_probs[0], tree.log_probs[row])


@settings(max_examples=80, deadline=None)
@given(
    accuracies=st.lists(
        st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5, 0.7, 1.0]), min_size=1, max_size=4), min_size=1, max_size=3
    ),
    max_nodes=st.integers(1, 40),
)
def test_sparse_paths_are_the_best_products(accuracies: list[list[float]], max_nodes: int) -> None:
    paths = sparse_paths(accuracies, max_nodes)

    def value(path: RankPath) -> float:
        product = 1.0
        for depth, rank in enumerate(path):
            product *= accuracies[depth][rank]
        return product

    possible = (p for d in range(1, len(accuracies) + 1) for p in itertools.product(*(range(len(row)) for row in
                                                                                      accuracies[:d])))  # fmt: skip
    every = sorted((v for p in possible if (v := value(p)) > 0), reverse=True)
    assert [value(path) for path in paths] == every[:max_nodes]
    assert len(set(paths)) == len(paths)
    for place, path in enumerate(paths):  # every prefix of the list is a tree
        assert len(path) == 1 or path[:-1] in paths[:place]
    assert paths == sparse_paths(accuracies, max_nodes + 5)[: len(paths)]


def test_ties_of_sparse_paths_go_to_the_shallower_and_lower_ranked() -> None:
    assert sparse_paths([[0.5, 0.5], [1.0, 0.0]], 4) == [(0,), (1,), (0, 0), (1, 0)]


def test_a_dynamic_tree_passes_through_merging_unchanged() -> None:
    """Best first already: pruning to fewer nodes takes a prefix."""
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.log_softmax(torch.randn(2, 3, 6, generator=generator), dim=2).sort(descending=True).values
    tokens = torch.arange(36).view(2, 3, 6)
    tree = dynamic(tokens, log_probs, 20)
    merged = merge_candidates([tree], max_nodes=13, max_depth=3)
    assert torch.equal(merged.tokens, tree.tokens[:, :12])
    assert torch.equal(merged.parents, tree.parents[:, :12])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t, p: dynamic(t, p, 0), "at least 1 node"),
        (lambda t, p: cartesian(t, p, [2], 0), "at least 1 node"),
        (lambda t, p: cartesian(t, p, [], 4), "widths must be positive"),
        (lambda t, p: cartesian(t, p, [2, 0], 4), r"widths must be positive, one a depth: got \[2, 0\]"),
        (lambda t, p: cartesian(t, p, [4], 9), "there are 2 depths of 3 choices"),
        (lambda t, p: static_sparse(t, p, [(0,), (0, 0), (0, 0, 0)]), "3 deep .* there are 2 depths"),
        (lambda t, p: static_sparse(t, p, [(0, 0), (0,)]), r"\[0, 0\] comes before its parent \[0\]"),
        (lambda t, p: static_sparse(t, p, [(0,), (0,)]), "given twice"),
        (lambda t, p: static_sparse(t, p, [(-1,)]), "not a list of ranks"),
        (lambda t, p: static_sparse(t, p, [()]), "not a list of ranks"),
        (lambda t, p: static_sparse(t, p, []), "at least one path"),
        (lambda t, p: sparse_paths([[1.2]], 4), "between 0 and 1"),
        (lambda t, p: sparse_paths([], 4), "at least one depth"),
        (lambda t, p: cartesian_paths([2], -1), "at least 1 node"),
    ],
)
def test_what_cannot_be_built_is_refused(call, message) -> None:
    with pytest.raises(BadRequestError, match=message):
        call(torch.zeros(1, 2, 3, dtype=torch.int64), torch.zeros(1, 2, 3))
