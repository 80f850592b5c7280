"""Flattening, merging and masks against plain-Python restatements, in C++ and in torch."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon_engine.tree import tree as tree_module
from gorgon_engine.tree.candidates import CandidateTree
from gorgon_engine.tree.tree import (
    MAX_NODES,
    ancestor_words,
    flatten,
    merge_candidates,
    pack_mask,
    tree_mask,
    unpack_mask,
)

Path = tuple[int, ...]


@pytest.fixture(scope="module", autouse=True, params=["native", "torch"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """What this machine chooses, and what one without a compiler does."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(tree_module, "available_library", lambda: None)
        yield


@st.composite
def forests(draw, batch: int, max_candidates: int = 24, vocab: int = 6) -> CandidateTree:
    """Random candidates, parents first, with many equal paths (a small vocabulary) and some padding."""
    count = draw(st.integers(1, max_candidates))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    parents = torch.tensor(
        [
            [int(torch.randint(-1, m, (1,), generator=generator)) if m else -1 for m in range(count)]
            for _ in range(batch)
        ]
    )
    log_probs = torch.zeros(batch, count)
    for b in range(batch):
        for m in range(count):
            above = log_probs[b, parents[b, m]] if parents[b, m] >= 0 else 0.0
            # Equal probabilities of parent and child happen: a drafter may be certain.
            step = float(torch.rand((), generator=generator)) if torch.rand((), generator=generator) > 0.2 else 0.0
            padding = m > 0 and float(torch.rand((), generator=generator)) < 0.1
            log_probs[b, m] = -torch.inf if padding else above - step
    tokens = torch.randint(vocab, (batch, count), generator=generator)
    return CandidateTree(tokens, parents, log_probs, torch.zeros_like(tokens), source="test")


def paths_of(tokens: torch.Tensor, parents: torch.Tensor, log_probs: torch.Tensor) -> dict[Path, float]:
    """Every real node's token path with the best log-probability that any copy of it has."""
    best: dict[Path, float] = {}
    for node in range(tokens.shape[0]):
        if log_probs[node] == -torch.inf:
            continue
        path: list[int] = []
        at = node
        while at >= 0:
            path.append(int(tokens[at]))
            at = int(parents[at])
        key = tuple(reversed(path))
        best[key] = max(best.get(key, -torch.inf), float(log_probs[node]))
    return best


@settings(max_examples=60, deadline=None)
@given(data=st.data(), max_depth=st.integers(1, 16), max_nodes=st.integers(2, 64))
def test_merging_keeps_the_best_distinct_paths(data: st.DataObject, max_depth: int, max_nodes: int) -> None:
    batch = 2
    first, second = data.draw(forests(batch)), data.draw(forests(batch))
    merged = merge_candidates([first, second], max_nodes=max_nodes, max_depth=max_depth)
    for b in range(batch):
        expected: dict[Path, float] = {}
        for forest in (first, second):
            for path, value in paths_of(forest.tokens[b], forest.parents[b], forest.log_probs[b]).items():
                if len(path) <= max_depth:
                    expected[path] = max(expected.get(path, -torch.inf), value)
        got = paths_of(merged.tokens[b], merged.parents[b], merged.log_probs[b])
        kept = int((merged.log_probs[b] > -torch.inf).sum())
        assert len(got) == kept == min(len(expected), max_nodes - 1)
        for path, value in got.items():
            assert expected[path] == pytest.approx(value)
            assert len(path) == 1 or path[:-1] in got
        assert sorted(got.values(), reverse=True) == pytest.approx(sorted(expected.values(), reverse=True)[:kept])
        assert (merged.log_probs[b, :kept].diff() <= 0).all()
        assert all(int(merged.parents[b, m]) < m for m in range(kept))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), width=st.integers(1, 40))
def test_flattening_is_breadth_first_and_masks_are_the_ancestors(data: st.DataObject, width: int) -> None:
    batch = 2
    forest = data.draw(forests(batch, max_candidates=48))
    merged = merge_candidates([forest], max_nodes=MAX_NODES, max_depth=48)
    sizes = [data.draw(st.integers(1, width)) for _ in range(batch)]
    tree = flatten(torch.tensor([9, 8]), merged, torch.tensor(sizes), width)
    mask = unpack_mask(tree.ancestors, tree.tokens.shape[1])
    for b in range(batch):
        real = int(tree.num_nodes[b])
        assert real == 1 + min(sizes[b] - 1, int((merged.log_probs[b] > -torch.inf).sum()))
        depths = tree.depths[b, :real].tolist()
        assert depths == sorted(depths)
        assert depths[0] == 0
        assert int(tree.parents[b, 0]) == -1
        assert [int(t) for t in tree.tokens[:, 0]] == [9, 8]
        for node in range(real):
            ancestors, at = set(), node
            while at >= 0:
                ancestors.add(at)
                at = int(tree.parents[b, at])
            assert set(mask[b, node].nonzero().flatten().tolist()) == ancestors
            assert len(ancestors) == depths[node] + 1
        best = paths_of(merged.tokens[b, : real - 1], merged.parents[b, : real - 1], merged.log_probs[b, : real - 1])
        flat = paths_of(tree.tokens[b, :real], tree.parents[b, :real], tree.log_probs[b, :real])
        root = int(tree.tokens[b, 0])
        assert {path[1:]: v for path, v in flat.items() if len(path) > 1} == pytest.approx(best)
        assert all(path[0] == root for path in flat)


def test_the_flattening_example_of_medusa() -> None:
    """Two candidates at depth 1, three below each: 1 + 2 + 6 nodes, each seeing its own branch only."""
    parents = torch.tensor([[-1, -1, 0, 0, 0, 1, 1, 1]])
    log_probs = torch.tensor([[-1.0, -1.0, -2.0, -2.0, -2.0, -2.0, -2.0, -2.0]])
    tokens = torch.arange(8)[None] + 100
    forest = CandidateTree(tokens, parents, log_probs, torch.zeros_like(tokens), source="test")
    merged = merge_candidates([forest], max_nodes=9, max_depth=2)
    tree = flatten(torch.tensor([7]), merged, torch.tensor([9]), 9)
    assert tree.tokens.tolist() == [[7, 100, 101, 102, 103, 104, 105, 106, 107]]
    assert tree.parents.tolist() == [[-1, 0, 0, 1, 1, 1, 2, 2, 2]]
    assert tree.depths.tolist() == [[0, 1, 1, 2, 2, 2, 2, 2, 2]]
    assert tree.ancestors[0, :, 0].tolist() == [0b1, 0b11, 0b101, *(0b1011 + (1 << n) - 8 for n in (3, 4, 5)),
                                                *(0b101 + (1 << n) for n in (6, 7, 8))]  # fmt: skip


@pytest.mark.parametrize("num_nodes", [1, 2, 63, 64, 65, 127, 128])
def test_masks_of_chains_fill_every_word(num_nodes: int) -> None:
    parents = torch.arange(num_nodes)[None] - 1
    mask = tree_mask(parents)
    assert torch.equal(mask[0], torch.ones(num_nodes, num_nodes, dtype=torch.bool).tril())
    assert torch.equal(pack_mask(mask), ancestor_words(parents))
    assert ancestor_words(parents).shape == (1, num_nodes, (num_nodes + 63) // 64)


def test_no_candidates_is_plain_decoding() -> None:
    tree = flatten(torch.tensor([5, 6]), None, torch.tensor([1, 1]), 1)
    assert tree.tokens.tolist() == [[5], [6]]
    assert tree.num_nodes.tolist() == [1, 1]
    assert tree.ancestors.tolist() == [[[1]], [[1]]]
