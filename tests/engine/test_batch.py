"""Batches that join keep every sequence's guesses, whoever drafted them."""

from dataclasses import replace

import pytest
import torch

from gorgon_engine.batch import RunningBatch
from gorgon_engine.sampling import SamplingBatch, SamplingParams, TokenCounts
from gorgon_engine.tree.tree import MergedCandidates, flatten

CPU = torch.device("cpu")


def chain(tokens: list[int], sources: list[int], names: tuple[str, ...]) -> MergedCandidates:
    index = torch.arange(len(tokens))[None]
    return MergedCandidates(
        tokens=torch.tensor([tokens]),
        parents=index - 1,
        log_probs=-(index + 1).float() / 10,
        ranks=torch.zeros_like(index),
        sources=torch.tensor([sources]),
        source_names=names,
    )


def batch(slot: int, candidates: MergedCandidates | None) -> RunningBatch:
    one = torch.tensor([slot])
    sampling = SamplingBatch.of([SamplingParams()], vocab_size=50, device=CPU)
    return RunningBatch(
        slots=one,
        prompt_lengths=one,
        root_tokens=one + 40,
        hidden=torch.zeros(1, 4),
        sampling=sampling,
        counts=None,
        candidates=candidates,
    )


def guesses(joined: RunningBatch, row: int) -> list[tuple[int, str]]:
    """(token, source) of a row's tree, root left out."""
    assert joined.candidates is not None
    tree = flatten(joined.root_tokens, joined.candidates, torch.full((2,), 9), 9)
    count = int(tree.num_nodes[row])
    names = tree.source_names
    return [(int(t), names[s]) for t, s in zip(tree.tokens[row, 1:count], tree.sources[row, 1:count], strict=True)]


LOOKUP = chain([1, 2, 3, 4, 5], [0] * 5, ("lookup",))
BOTH = chain([6, 7, 8], [0, 1, 0], ("head", "lookup"))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (LOOKUP, BOTH),
        (BOTH, LOOKUP),
        (LOOKUP, LOOKUP),
        (BOTH, None),
        (None, BOTH),
    ],
)
def test_each_side_keeps_its_guesses(first: MergedCandidates | None, second: MergedCandidates | None) -> None:
    expected = {
        id(None): [],
        id(LOOKUP): [(t, "lookup") for t in (1, 2, 3, 4, 5)],
        id(BOTH): [(6, "head"), (7, "lookup"), (8, "head")],
    }
    joined = batch(0, first).join(batch(1, second), [SamplingParams(), SamplingParams()])
    assert guesses(joined, 0) == expected[id(first)]
    assert guesses(joined, 1) == expected[id(second)]
    assert joined.root_tokens.tolist() == [40, 41]


def test_two_sides_without_guesses_have_none() -> None:
    assert batch(0, None).join(batch(1, None), [SamplingParams(), SamplingParams()]).candidates is None


def test_who_is_not_penalised_shares_a_batch_with_who_is() -> None:
    penalised = SamplingParams(repetition_penalty=1.3)
    counted = batch(1, None)
    counts = TokenCounts.empty(counted.root_tokens, 50)
    counts.in_prompt[0, 7] = True
    counts.in_output[0, 9] = 2
    counted = replace(counted, counts=counts)
    joined = batch(0, None).join(counted, [SamplingParams(), penalised]).join(batch(2, None), [
        SamplingParams(), penalised, SamplingParams()])  # fmt: skip
    assert joined.counts is not None
    assert joined.counts.in_prompt.nonzero().tolist() == [[1, 7]]
    assert joined.counts.in_output.nonzero().tolist() == [[1, 9]]
    left = joined.select([1, 2], [penalised, SamplingParams()])
    assert left.counts is not None
    assert left.counts.in_prompt.nonzero().tolist() == [[0, 7]]
    assert joined.select([0, 2], [SamplingParams(), SamplingParams()]).counts is None, "nobody needs them any more"
