"""Prompt lookup against a plain-Python search of the history, in C++ and in torch."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon_engine.drafters import ngram
from gorgon_engine.drafters.base import DraftContext
from gorgon_engine.drafters.ngram import NgramDrafter, match_lengths
from gorgon_engine.tree.tree import merge_candidates

# Few tokens, so that suffixes occur again; ragged lengths, in one history tensor with leftovers behind the ends.
histories = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=30), min_size=1, max_size=4)
MAX_MATCH = 5


@pytest.fixture(scope="module", autouse=True, params=["native", "torch"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """What this machine chooses, and what one without a compiler does."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(ngram, "available_library", lambda: None)
        yield


def make_context(rows: list[list[int]], *, junk: int = 0) -> DraftContext:
    """`junk` fills the positions behind each row's end: what an earlier, longer sequence may have left there."""
    width = max(map(len, rows)) + 3
    history = torch.tensor([row + [junk] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return DraftContext(
        root_tokens=torch.tensor([row[-1] for row in rows]),
        hidden=torch.zeros(len(rows), 1),
        history=history,
        history_lengths=lengths,
        seeds=torch.zeros_like(lengths),
    )


def plain_match(row: list[int], end: int, max_match: int) -> int:
    """How many tokens up to `end` equal those up to the row's own end."""
    length = 0
    while length < max_match and length <= end and row[end - length] == row[len(row) - 1 - length]:
        length += 1
    return length


def plain_chains(row: list[int], num_chains: int, depth: int) -> list[tuple[int, list[int]]]:
    """(match length, continuation) of the best earlier places: the longest match first, then the most recent."""
    places = [(plain_match(row, end, MAX_MATCH), end) for end in range(len(row) - 1)]
    best = sorted((place for place in places if place[0] > 0), reverse=True)[:num_chains]
    return [(length, row[end + 1 : end + 1 + depth]) for length, end in best]


def chains_of(drafter: NgramDrafter, context: DraftContext, max_nodes: int, row: int) -> list[list[int]]:
    """The real nodes of one sequence as chains, each hanging below the root."""
    tree = drafter.propose(context, max_nodes)
    chains: list[list[int]] = []
    for node in range(tree.tokens.shape[1]):
        if tree.log_probs[row, node] == -torch.inf:
            continue
        parent = int(tree.parents[row, node])
        assert parent in (-1, node - 1)
        if parent < 0:
            assert int(tree.ranks[row, node]) == len(chains)
            chains.append([])
        else:
            assert tree.log_probs[row, parent] >= tree.log_probs[row, node]
        chains[-1].append(int(tree.tokens[row, node]))
    return chains


@settings(max_examples=150, deadline=None)
@given(rows=histories, junk=st.integers(0, 3))
def test_match_lengths_are_those_of_a_search(rows: list[list[int]], junk: int) -> None:
    context = make_context(rows, junk=junk)
    matched = match_lengths(context.history, context.history_lengths, MAX_MATCH)
    for row, lengths in zip(rows, matched.tolist(), strict=True):
        expected = [plain_match(row, end, MAX_MATCH) for end in range(len(row) - 1)]
        assert lengths == expected + [0] * (len(lengths) - len(expected))


@settings(max_examples=150, deadline=None)
@given(rows=histories, junk=st.integers(0, 3), num_chains=st.integers(1, 4), depth=st.integers(1, 6))
def test_drafts_are_what_followed_the_best_earlier_places(
    rows: list[list[int]], junk: int, num_chains: int, depth: int
) -> None:
    drafter = NgramDrafter(max_match=MAX_MATCH, num_chains=num_chains, depth=depth)
    context = make_context(rows, junk=junk)
    for row, tokens in enumerate(rows):
        expected = [chain for _, chain in plain_chains(tokens, num_chains, depth)]
        assert chains_of(drafter, context, num_chains * depth, row) == expected


@settings(max_examples=60, deadline=None)
@given(rows=histories, max_nodes=st.integers(1, 40))
def test_a_batch_is_its_sequences_one_by_one_within_the_budget(rows: list[list[int]], max_nodes: int) -> None:
    drafter = NgramDrafter(max_match=MAX_MATCH, num_chains=3, depth=5)
    context = make_context(rows)
    together = drafter.propose(context, max_nodes)
    assert together.tokens.shape[1] <= max_nodes
    for row, tokens in enumerate(rows):
        single = make_context([tokens])
        alone = chains_of(drafter, single, max_nodes, 0)
        assert chains_of(drafter, context, max_nodes, row) == alone


@settings(max_examples=60, deadline=None)
@given(rows=histories)
def test_a_longer_match_is_trusted_more(rows: list[list[int]]) -> None:
    drafter = NgramDrafter(max_match=MAX_MATCH, num_chains=4, depth=1)
    tree = drafter.propose(make_context(rows), 4)
    for row, tokens in enumerate(rows):
        found = plain_chains(tokens, 4, 1)
        trust = tree.log_probs[row, : len(found)].tolist()
        assert trust == sorted(trust, reverse=True)
        if len(found) > 1:
            assert trust[0] > trust[1]


def test_nothing_found_is_all_padding() -> None:
    tree = NgramDrafter().propose(make_context([[1, 2, 3, 4], [7], [5, 5, 5]]), 24)
    assert (tree.log_probs[:2] == -torch.inf).all()
    assert (tree.log_probs[2] > -torch.inf).any()
    merged = merge_candidates([tree], max_nodes=25, max_depth=8)
    assert (merged.log_probs[:2] == -torch.inf).all()


def test_copying_stops_where_the_known_text_ends() -> None:
    """The end of the text is one place behind its last copy: only what is known can be copied."""
    drafter = NgramDrafter(num_chains=1, depth=6)
    context = make_context([[9, 1, 2, 3, 1, 2]], junk=8)
    assert chains_of(drafter, context, 6, 0) == [[3, 1, 2]]
