"""Drafting in C++ against the torch code that says what it means, on every instruction set."""

import contextlib
import dataclasses
import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon_engine.drafters import ngram
from gorgon_engine.drafters.base import DraftContext
from gorgon_engine.drafters.ngram import NgramDrafter
from gorgon_engine.kernels.cpu import NativeLibrary, drafting, load_library
from gorgon_engine.kernels.cpu.drafting import top_log_probs
from gorgon_engine.kernels.cpu.lookup import lookup
from gorgon_engine.tree import tree as tree_module
from gorgon_engine.tree.candidates import CandidateTree
from gorgon_engine.tree.tree import (
    MAX_NODES,
    MergedCandidates,
    TreeBatch,
    flatten,
    flatten_reference,
    merge_candidates,
    merge_reference,
)
from support.native import num_threads

# What a machine without the newer instructions would run; the flags only take away.
BUILDS = {
    "native": (),
    "avx2": ("-mno-avx512f", "-mno-avxvnni"),
    "generic": ("-DGORGON_FORCE_GENERIC",),
}


@pytest.fixture(scope="module", params=BUILDS)
def library(request: pytest.FixtureRequest) -> NativeLibrary:
    return load_library(BUILDS[request.param])


@st.composite
def logits_rows(draw: st.DrawFn) -> torch.Tensor:
    """Rows of every length around the kernel's blocks: smooth, full of ties, with -inf, rising and falling."""
    rows = draw(st.integers(1, 5))
    vocab_size = draw(st.one_of(st.integers(1, 70), st.sampled_from([255, 256, 257, 2047, 2049, 5000, 16384])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    logits = torch.randn(rows, vocab_size, generator=generator) * draw(st.sampled_from([0.01, 3.0, 40.0]))
    match draw(st.sampled_from(["smooth", "ties", "equal", "masked", "rising", "falling"])):
        case "ties":
            logits = logits.round()
        case "equal":
            logits = logits[:, :1].expand(rows, vocab_size).contiguous()
        case "masked":
            logits[torch.rand(logits.shape, generator=generator) < 0.9] = -torch.inf
        case "rising":
            logits = logits.sort(dim=1).values
        case "falling":
            logits = logits.sort(dim=1, descending=True).values
    return logits


def check_top(logits: torch.Tensor, found: drafting.TopLogProbs) -> None:
    """The ids are those of the reference; the log-probabilities are right to what float32 can say."""
    k = found.ids.shape[1]
    assert torch.equal(found.ids, drafting.reference(logits, k).ids)
    assert (found.log_probs <= 0).all()
    assert (found.log_probs[:, 1:] <= found.log_probs[:, :-1]).all()
    exact = torch.log_softmax(logits.double(), dim=1)
    exact = exact.masked_fill(exact[:, :1].isnan(), -torch.inf).gather(1, found.ids)
    impossible = exact == -torch.inf
    assert torch.equal(found.log_probs == -torch.inf, impossible)
    error = (found.log_probs.double() - exact)[~impossible].abs()
    assert (error <= 1e-6 + 2**-23 * exact[~impossible].abs()).all()


@settings(max_examples=150, deadline=None)
@given(logits=logits_rows(), data=st.data())
def test_top_log_probs_are_those_of_the_log_softmax(
    library: NativeLibrary, logits: torch.Tensor, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, min(logits.shape[1], 40)))
    check_top(logits, top_log_probs(logits, k, library=library))


@pytest.mark.parametrize("vocab_size", [1, 16, 300, 4099])
def test_all_tokens_can_be_asked_for(library: NativeLibrary, vocab_size: int) -> None:
    logits = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(vocab_size)).round(decimals=1)
    check_top(logits, top_log_probs(logits, vocab_size, library=library))


@pytest.mark.parametrize("place", [0, 17, 2500, 4999])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_without_a_distribution_guesses_nothing(library: NativeLibrary, place: int, value: float) -> None:
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(place))
    logits[1, place] = value
    logits[3] = -torch.inf
    for found in (top_log_probs(logits, 6, library=library), drafting.reference(logits, 6)):
        check_top(logits, found)
        assert (found.log_probs[[1, 3]] == -torch.inf).all()
        assert found.ids[[1, 3]].tolist() == [list(range(6))] * 2
        assert (found.log_probs[[0, 2]] > -torch.inf).all()


@settings(max_examples=25, deadline=None)
@given(logits=logits_rows(), data=st.data())
def test_a_row_of_top_log_probs_does_not_see_the_others_or_the_threads(
    library: NativeLibrary, logits: torch.Tensor, data: st.DataObject
) -> None:
    # Enough rows that threads share the work.
    logits = logits.repeat(-(-300_000 // logits.numel()), 1)
    k = data.draw(st.integers(1, min(logits.shape[1], 12)))
    results = []
    for threads in (1, 2, 3):
        with num_threads(library, threads):
            results.append(top_log_probs(logits, k, library=library))
    for other in results[1:]:
        assert torch.equal(other.log_probs, results[0].log_probs)
        assert torch.equal(other.ids, results[0].ids)
    row = data.draw(st.integers(0, logits.shape[0] - 1))
    alone = top_log_probs(logits[row : row + 1].contiguous(), k, library=library)
    assert torch.equal(alone.log_probs[0], results[0].log_probs[row])
    assert torch.equal(alone.ids[0], results[0].ids[row])


@settings(max_examples=60, deadline=None)
@given(logits=logits_rows(), data=st.data())
def test_without_a_library_torch_finds_the_same(logits: torch.Tensor, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, min(logits.shape[1], 40)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafting, "available_library", lambda: None)
        found, expected = top_log_probs(logits, k), drafting.reference(logits, k)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.log_probs, expected.log_probs)


@pytest.mark.parametrize(
    ("logits", "k", "message"),
    [
        (torch.zeros(2, 3, 4), 2, r"logits must be \[R, V\]"),
        (torch.zeros(2, 3), 4, "at least k = 4"),
        (torch.zeros(2, 3), 0, "k at least 1"),
        (torch.zeros(2, 3, dtype=torch.float64), 2, "logits must be torch.float32"),
        (torch.zeros(3, 2).T, 2, "logits must be contiguous"),
    ],
)
def test_wrong_logits_are_refused(library: NativeLibrary, logits: torch.Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_log_probs(logits, k, library=library)


Fields = CandidateTree | MergedCandidates | TreeBatch


def check_same(found: Fields, expected: Fields) -> None:
    assert type(found) is type(expected)
    for field in dataclasses.fields(expected):
        mine, theirs = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(theirs, torch.Tensor):
            assert mine.dtype == theirs.dtype, field.name
            assert torch.equal(mine, theirs), f"{field.name}: {mine} is not {theirs}"
        else:
            assert mine == theirs, field.name


def one_forest(rng: random.Random, batch: int, count: int, *, ordered: bool, drawn: bool, source: str) -> CandidateTree:
    """Candidates with equal paths, ties and padding of any token. ordered: no child is likelier than its parent."""
    chain, ties = rng.random() < 0.3, rng.random() < 0.5
    rows: list[list[tuple[int, int, float]]] = []
    for _ in range(batch):
        row: list[tuple[int, int, float]] = []
        for node in range(count):
            parent = node - 1 if chain else rng.randint(-1, node - 1)
            step = rng.choice((0.0, 0.5, 1.0)) if ties else rng.random()
            above = row[parent][2] if parent >= 0 and ordered else 0.0
            row.append((rng.randrange(4), parent, -float("inf") if rng.random() < 0.1 else above - step))
        rows.append(row)
    tokens = torch.tensor([[node[0] for node in row] for row in rows])
    ranks = torch.tensor([[rng.randrange(5) for _ in row] for row in rows])
    return CandidateTree(
        tokens=tokens,
        parents=torch.tensor([[node[1] for node in row] for row in rows]),
        log_probs=torch.tensor([[node[2] for node in row] for row in rows]),
        ranks=ranks,
        source=source,
        draft_probs=torch.rand(batch, 3, 4) if drawn else None,
        draft_rows=ranks % 3 if drawn else None,
    )


@st.composite
def drafts(draw: st.DrawFn, *, ordered: bool = True) -> list[CandidateTree]:
    """What 1 to 3 drafters propose for 1 to 4 sequences; a single one may have drawn its candidates."""
    rng = random.Random(draw(st.integers(0, 2**32 - 1)))
    batch = draw(st.integers(1, 4))
    counts = draw(st.lists(st.one_of(st.integers(1, 12), st.integers(1, MAX_NODES)), min_size=1, max_size=3))
    drawn = len(counts) == 1 and draw(st.booleans())
    return [
        one_forest(rng, batch, count, ordered=ordered, drawn=drawn, source=f"drafter {number}")
        for number, count in enumerate(counts)
    ]


@contextlib.contextmanager
def using(library: NativeLibrary | None) -> Iterator[None]:
    """This library in the place of the one that the machine would choose; None = torch alone."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (tree_module, ngram):
            patch.setattr(module, "available_library", lambda: library)
        yield


@settings(max_examples=80, deadline=None)
@given(data=st.data(), max_nodes=st.integers(1, MAX_NODES), max_depth=st.integers(1, 20), ordered=st.booleans())
def test_merged_candidates_are_those_of_torch(
    library: NativeLibrary, data: st.DataObject, max_nodes: int, max_depth: int, ordered: bool
) -> None:
    forests = data.draw(drafts(ordered=ordered))
    with using(library):
        found = merge_candidates(forests, max_nodes=max_nodes, max_depth=max_depth)
    check_same(found, merge_reference(forests, max_nodes=max_nodes, max_depth=max_depth))


@settings(max_examples=80, deadline=None)
@given(data=st.data(), max_depth=st.integers(1, MAX_NODES), width=st.integers(1, MAX_NODES))
def test_flattened_trees_are_those_of_torch(
    library: NativeLibrary, data: st.DataObject, max_depth: int, width: int
) -> None:
    merged = merge_reference(data.draw(drafts()), max_nodes=MAX_NODES, max_depth=max_depth)
    batch = merged.tokens.shape[0]
    num_nodes = torch.tensor(data.draw(st.lists(st.integers(1, width), min_size=batch, max_size=batch)))
    roots = torch.arange(batch) + 7
    with using(library):
        found = flatten(roots, merged, num_nodes, width)
        plain = flatten(roots, None, num_nodes, width)
    check_same(found, flatten_reference(roots, merged, num_nodes, width))
    check_same(plain, flatten_reference(roots, None, num_nodes, width))


def test_one_topology_for_a_batch_is_read_as_if_it_were_copied(library: NativeLibrary) -> None:
    """Builders expand the parents and ranks of a topology over the batch: views without memory of their own."""
    whole = one_forest(random.Random(3), 3, 20, ordered=True, drawn=False, source="head")
    shared = dataclasses.replace(
        whole,
        tokens=whole.tokens.T.contiguous().T,
        parents=whole.parents[:1].expand(3, -1),
        ranks=whole.ranks[:1].expand(3, -1),
        # Below every parent, whichever sequence's parents these are.
        log_probs=-torch.arange(20.0).expand(3, -1),
    )
    roots, num_nodes = torch.arange(9)[::3], torch.tensor([16, 3, 5])
    with using(library):
        found = merge_candidates([shared], max_nodes=16, max_depth=9)
        laid_out = flatten(roots, found, num_nodes, 16)
    check_same(found, merge_reference([shared], max_nodes=16, max_depth=9))
    check_same(laid_out, flatten_reference(roots, found, num_nodes, 16))


@pytest.mark.parametrize("parents", [[-1, 1, 0], [-1, 2, 0], [0, -1, -1]])
def test_a_parent_behind_its_child_is_refused(library: NativeLibrary, parents: list[int]) -> None:
    tokens = torch.tensor([[1, 2, 3]])
    forest = CandidateTree(tokens, torch.tensor([parents]), torch.zeros(1, 3), torch.zeros_like(tokens), source="test")
    merged = MergedCandidates(tokens, forest.parents, forest.log_probs, forest.ranks, forest.ranks, ("test",))
    with using(library):
        with pytest.raises(ValueError, match="a parent does not come before its child"):
            merge_candidates([forest], max_nodes=4, max_depth=3)
        with pytest.raises(ValueError, match="a parent does not come before its child"):
            flatten(torch.tensor([0]), merged, torch.tensor([4]), 4)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tokens", torch.zeros(2, 3, dtype=torch.int32), "tokens must be torch.int64"),
        ("parents", torch.full((2, 4), -1), r"parents must be torch.int64 \[2, 3\]"),
        ("log_probs", torch.zeros(2, 3, dtype=torch.float64), "log_probs must be torch.float32"),
        ("ranks", torch.zeros(1, 3, dtype=torch.int64), r"ranks must be torch.int64 \[2, 3\]"),
    ],
)
def test_candidates_of_other_shapes_are_refused(
    library: NativeLibrary, name: str, value: torch.Tensor, message: str
) -> None:
    tokens = torch.ones(2, 3, dtype=torch.int64)
    forest = CandidateTree(tokens, tokens - 2, torch.zeros(2, 3), tokens, source="test")
    wrong = dataclasses.replace(forest, **{name: value})
    merged = merge_reference([forest], max_nodes=4, max_depth=3)
    wrong_merged = dataclasses.replace(merged, **{name: value})
    with using(library):
        with pytest.raises(ValueError, match=message):
            merge_candidates([forest, wrong], max_nodes=4, max_depth=3)
        with pytest.raises(ValueError, match=message):
            flatten(torch.tensor([0, 0]), wrong_merged, torch.tensor([4, 4]), 4)


@st.composite
def contexts(draw: st.DrawFn) -> DraftContext:
    """Histories of few tokens, so that suffixes occur again, with leftovers behind their ends."""
    rng = random.Random(draw(st.integers(0, 2**32 - 1)))
    batch = draw(st.integers(1, 4))
    num_positions = draw(st.one_of(st.integers(1, 40), st.sampled_from([128, 1000])))
    vocab_size = draw(st.sampled_from([1, 2, 4, 50]))
    history = torch.tensor([[rng.randrange(vocab_size) for _ in range(num_positions)] for _ in range(batch)])
    lengths = torch.tensor([rng.choice((num_positions, rng.randint(1, num_positions))) for _ in range(batch)])
    return DraftContext(
        root_tokens=history.gather(1, lengths[:, None] - 1)[:, 0],
        hidden=torch.zeros(batch, 1),
        history=history,
        history_lengths=lengths,
        seeds=torch.zeros_like(lengths),
    )


@settings(max_examples=120, deadline=None)
@given(
    context=contexts(),
    max_match=st.integers(1, 9),
    num_chains=st.integers(1, 6),
    depth=st.integers(1, 12),
    max_nodes=st.integers(1, 64),
)
def test_looked_up_chains_are_those_of_torch(
    library: NativeLibrary, context: DraftContext, max_match: int, num_chains: int, depth: int, max_nodes: int
) -> None:
    drafter = NgramDrafter(max_match=max_match, num_chains=num_chains, depth=depth)
    with using(library):
        found = drafter.propose(context, max_nodes)
    with using(None):
        expected = drafter.propose(context, max_nodes)
    check_same(found, expected)


@pytest.mark.parametrize("length", [-1, 9])
def test_a_length_beyond_the_history_is_refused(library: NativeLibrary, length: int) -> None:
    history = torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="a length is negative or beyond the history"):
        lookup(library, history, torch.tensor([length]), torch.zeros(3, 3), num_chains=1, depth=2)


@pytest.mark.parametrize(("num_chains", "depth"), [(0, 2), (9, 2), (1, 0)])
def test_chains_that_no_history_has_are_refused(library: NativeLibrary, num_chains: int, depth: int) -> None:
    history = torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"cannot look up .* in a history \[1, 8\]"):
        lookup(library, history, torch.tensor([4]), torch.zeros(3, 3), num_chains=num_chains, depth=depth)


def test_on_a_cpu_the_library_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def unused(*arguments: object, **options: object) -> None:
        raise AssertionError("torch did the work")

    forest = one_forest(random.Random(1), 1, 9, ordered=True, drawn=False, source="head")
    drafter = NgramDrafter()
    monkeypatch.setattr(tree_module, "merge_reference", unused)
    monkeypatch.setattr(tree_module, "flatten_reference", unused)
    monkeypatch.setattr(drafter, "propose_reference", unused)
    merged = merge_candidates([forest], max_nodes=8, max_depth=4)
    assert flatten(torch.tensor([1]), merged, torch.tensor([8]), 8).tokens.shape == (1, 8)
    context = DraftContext(
        root_tokens=torch.tensor([5]),
        hidden=torch.zeros(1, 1),
        history=torch.tensor([[5, 6, 5]]),
        history_lengths=torch.tensor([3]),
        seeds=torch.zeros(1, dtype=torch.int64),
    )
    assert drafter.propose(context, 4).tokens[0, 0] == 6
