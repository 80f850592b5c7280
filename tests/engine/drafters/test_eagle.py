"""Drafting with an EAGLE head: the search against all paths there are, what is remembered against nothing at all."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from gorgon_engine.drafters import eagle
from gorgon_engine.drafters.base import Committed, DraftContext, StatefulDrafter
from gorgon_engine.drafters.beam import BeamLimits
from gorgon_engine.drafters.eagle import EagleDrafter
from gorgon_engine.heads.eagle import EagleHead, EagleShape
from gorgon_engine.tree.builders import RankPath, cartesian_paths
from gorgon_protocol.errors import BadRequestError
from support.eagle import make_head, predict
from support.searches import Following, Tokens, assert_same_nodes, by_beam, by_ranks, by_trying_all, nodes_of

HIDDEN, VOCAB, DEPTHS, SLOTS, POSITIONS = 16, 5, 3, 4, 24
SHAPE = EagleShape(HIDDEN, 4, 2, 4, 20, num_heads=DEPTHS)
EVERYTHING = BeamLimits(num_choices=VOCAB, width=VOCAB**DEPTHS)
PART = [3, 4, 8, 11, 17]  # tokens that can be drafted, of 18


@dataclass(frozen=True)
class Setting:
    """A head, the backbone's two matrices [V, C], and which of its tokens the rows of the projection stand for."""

    head: EagleHead
    embedding: Tensor
    lm_head: Tensor
    said: Tensor | None = None

    @property
    def tokens(self) -> list[int]:
        return list(range(VOCAB)) if self.said is None else self.said.tolist()

    def project(self, features: Tensor) -> Tensor:
        return features @ (self.lm_head if self.said is None else self.lm_head[self.said]).T

    def drafter(self, **options: Any) -> EagleDrafter:
        defaults = {"embed": lambda tokens: self.embedding[tokens], "project": self.project}
        drafter = EagleDrafter(self.head, draft_vocabulary=self.said, **(defaults | options))
        return drafter.for_slots(SLOTS, POSITIONS)


@dataclass(frozen=True)
class Text:
    """One sequence: the hidden states of its committed positions, its tokens, the root behind them."""

    hidden: Tensor  # [T, C]
    tokens: Tensor  # [T + 1]


def make(said: list[int] | None = None) -> Setting:
    head = make_head(SHAPE)
    vocab_size = VOCAB if said is None else 1 + max(said)
    embedding, lm_head = torch.randn(vocab_size, HIDDEN), torch.randn(vocab_size, HIDDEN) * 0.4
    return Setting(head, embedding, lm_head, None if said is None else torch.tensor(said))


def make_texts(setting: Setting, *lengths: int, seed: int = 9) -> list[Text]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Text(
            torch.randn(length, HIDDEN, generator=generator),
            torch.randint(len(setting.embedding), (length + 1,), generator=generator),
        )
        for length in lengths
    ]


def committed(texts: list[Text], slots: list[int], starts: list[int], counts: list[int]) -> Committed:
    """Some stretch of each text, and rows past it that belong to no text."""
    width = max(counts)
    hidden, tokens = torch.full((len(texts), width, HIDDEN), 7.0), torch.ones(len(texts), width, dtype=torch.int64)
    for row, (text, start, count) in enumerate(zip(texts, starts, counts, strict=True)):
        hidden[row, :count] = text.hidden[start : start + count]
        tokens[row, :count] = text.tokens[start + 1 : start + count + 1]
    return Committed(torch.tensor(slots), torch.tensor(starts), hidden, tokens, torch.tensor(counts))


def observe(drafter: EagleDrafter, texts: list[Text], slots: list[int]) -> None:
    drafter.observe(committed(texts, slots, [0] * len(texts), [len(text.hidden) for text in texts]))


def context_of(texts: list[Text], slots: list[int]) -> DraftContext:
    lengths = torch.tensor([len(text.tokens) for text in texts])
    return DraftContext(
        root_tokens=torch.stack([text.tokens[-1] for text in texts]),
        hidden=torch.stack([text.hidden[-1] for text in texts]),
        history=torch.nn.utils.rnn.pad_sequence([text.tokens for text in texts], batch_first=True),
        history_lengths=lengths,
        seeds=torch.arange(len(texts)),
        slots=torch.tensor(slots),
    )


def following_of(setting: Setting, text: Text) -> Following:
    """The distribution of the token below a path, from the whole text and nothing else."""

    @cache
    def following(path: Tokens) -> dict[int, float]:
        embeddings = setting.embedding[torch.tensor([*text.tokens[1:].tolist(), *path])]
        feature = predict(setting.head, text.hidden, embeddings)[-1]
        log_probs = torch.log_softmax(setting.project(feature), dim=0)
        return dict(zip(setting.tokens, log_probs.tolist(), strict=True))

    return following


@pytest.mark.parametrize("said", [None, PART])
def test_a_wide_search_finds_the_best_of_all_paths(said: list[int] | None) -> None:
    setting = make(said)
    texts, slots = make_texts(setting, 5, 1, 9), [2, 0, 3]
    drafter = setting.drafter(limits=EVERYTHING)
    observe(drafter, texts, slots)
    everything = [by_trying_all(following_of(setting, text), setting.tokens, DEPTHS) for text in texts]
    for max_nodes in (1, 7, 31, 127):
        tree = drafter.propose(context_of(texts, slots), max_nodes)
        assert tree.tokens.shape == (3, max_nodes)
        assert (tree.log_probs.dtype, tree.source) == (torch.float32, "head")
        for row, expected in enumerate(everything):
            assert_same_nodes(nodes_of(tree, row), dict(list(expected.items())[:max_nodes]))


@pytest.mark.parametrize(
    "limits",
    [
        BeamLimits(num_choices=2, width=3),
        BeamLimits(num_choices=5, width=1),
        BeamLimits(num_choices=1, width=4),
        BeamLimits(num_choices=3, width=4, min_path_prob=0.2),
        BeamLimits(num_choices=5, width=9, min_path_prob=0.05),
    ],
)
def test_limits_leave_what_a_beam_search_finds(limits: BeamLimits) -> None:
    setting = make()
    texts, slots = make_texts(setting, 4, 8, 2), [0, 1, 2]
    drafter = setting.drafter(limits=limits)
    observe(drafter, texts, slots)
    followings = [following_of(setting, text) for text in texts]
    for max_nodes in (2, 12, 60):
        tree = drafter.propose(context_of(texts, slots), max_nodes)
        assert tree.tokens.shape == (3, max_nodes), "what was not found is padding"
        for row, following in enumerate(followings):
            assert_same_nodes(nodes_of(tree, row), by_beam(following, limits, DEPTHS, max_nodes))


@pytest.mark.parametrize("said", [None, PART])
def test_fixed_trees_path_by_path(said: list[int] | None) -> None:
    """In the order of the list, which is not that of the depths."""
    paths: list[RankPath] = [(1,), (1, 0), (0,), (1, 0, 4), (0, 3), (1, 2), (0, 3, 0), (0, 0), (1, 0, 1), (4,), (0, 1)]
    setting = make(said)
    texts, slots = make_texts(setting, 3, 7), [1, 3]
    drafter = setting.drafter(paths=paths)
    observe(drafter, texts, slots)
    followings = [following_of(setting, text) for text in texts]
    for max_nodes in (1, 2, 5, 11, 50):
        tree = drafter.propose(context_of(texts, slots), max_nodes)
        assert tree.ranks[0].tolist() == [path[-1] for path in paths[:max_nodes]]
        for row, following in enumerate(followings):
            expected = by_ranks(following, paths[:max_nodes])
            assert list(nodes_of(tree, row)) == list(expected), "in the order of the list"
            assert_same_nodes(nodes_of(tree, row), expected)


def test_it_is_all_the_same_how_a_text_was_cut() -> None:
    """At once, a position at a time, in stretches that overlap others' padding, with what other texts left behind."""
    setting = make()
    texts, slots = make_texts(setting, 10, 7, 4), [3, 1, 0]
    whole = setting.drafter()
    observe(whole, texts, slots)
    expected = whole.propose(context_of(texts, slots), 30)

    ragged = setting.drafter()
    observe(ragged, make_texts(setting, 20, 20, 20, 20, seed=1), [0, 1, 2, 3])
    starts = [0, 0, 0]
    for counts in ([1, 4, 2], [6, 1, 1], [1, 1, 1], [2, 1, 0]):
        ragged.observe(committed(texts, slots, starts, counts))
        starts = [start + count for start, count in zip(starts, counts, strict=True)]
    assert starts == [10, 7, 4]
    again = ragged.propose(context_of(texts, slots), 30)
    for row in range(3):
        assert_same_nodes(nodes_of(again, row), nodes_of(expected, row), tolerance=1e-5, absolute=1e-5)


def test_slots_that_change_hands_before_anything_was_drafted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the longer text that was there is left, and nothing of the shorter one is lost."""
    setting = make()
    first, second, other = make_texts(setting, 12, 5, 7)
    expected = setting.drafter()
    observe(expected, [second, other], [1, 2])
    trees = expected.propose(context_of([second, other], [1, 2]), 30)
    for limit in (1, 512):
        monkeypatch.setattr(eagle, "_MAX_WAITING_ROWS", limit)
        drafter = setting.drafter()
        observe(drafter, [other], [2])
        drafter.observe(committed([first], [1], [0], [9]))
        drafter.observe(committed([first], [1], [9], [3]))
        for start in range(5):
            drafter.observe(committed([second], [1], [start], [1]))
        again = drafter.propose(context_of([second, other], [1, 2]), 30)
        for row in range(2):
            assert_same_nodes(nodes_of(again, row), nodes_of(trees, row), tolerance=1e-5, absolute=1e-5)


@pytest.mark.parametrize("least", [0.0, 0.15])
def test_sequences_do_not_see_each_other(least: float) -> None:
    setting = make()
    texts = make_texts(setting, 5, 12, 2, 8)
    drafter = setting.drafter(limits=BeamLimits(num_choices=4, width=5, min_path_prob=least))
    observe(drafter, texts, [0, 1, 2, 3])
    together = drafter.propose(context_of(texts, [0, 1, 2, 3]), 20)
    for row, text in enumerate(texts):
        alone = drafter.propose(context_of([text], [row]), 20)
        assert_same_nodes(nodes_of(together, row), nodes_of(alone, 0), tolerance=1e-5, absolute=1e-5)
    moved = drafter.propose(context_of([texts[3], texts[0]], [3, 0]), 20)
    assert_same_nodes(nodes_of(moved, 0), nodes_of(together, 3), tolerance=1e-5, absolute=1e-5)


def test_the_positions_asked_for_bound_what_is_looked_at() -> None:
    """The history of a batch is wider than a short text, and may be wider than there are positions."""
    setting = make()
    texts = make_texts(setting, 6)
    drafter = setting.drafter()
    observe(drafter, texts, [2])
    context = context_of(texts, [2])
    expected = nodes_of(drafter.propose(context, 20), 0)
    for width in (7, 8, POSITIONS, POSITIONS + 1):
        history = torch.nn.functional.pad(texts[0].tokens, (0, width - 7))[None]
        assert_same_nodes(
            nodes_of(drafter.propose(replace(context, history=history), 20), 0), expected, tolerance=1e-5, absolute=1e-5
        )


def test_memories_are_their_own() -> None:
    setting = make()
    texts = make_texts(setting, 6)
    first = setting.drafter()
    second = first.for_slots(1, 10)
    assert isinstance(second, StatefulDrafter)
    observe(first, texts, [0])
    observe(second, make_texts(setting, 9, seed=4), [0])
    fresh = setting.drafter()
    observe(fresh, texts, [0])
    context = context_of(texts, [0])
    assert nodes_of(first.propose(context, 20), 0) == nodes_of(fresh.propose(context, 20), 0)
    assert nodes_of(first.propose(context, 20), 0) != nodes_of(second.propose(context, 20), 0)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)], "the tree is 4 deep: the heads guess 3 tokens beyond the next"),
        ([(0, 0), (0,)], "comes before its parent"),
        ([], "at least one path"),
    ],
)
def test_trees_that_do_not_fit_the_head_are_refused(paths: list[RankPath], message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        make().drafter(paths=paths)


def test_the_vocabulary_may_be_smaller_than_the_choices() -> None:
    setting = make()
    texts = make_texts(setting, 6)
    many, all_of_them = (
        setting.drafter(limits=BeamLimits(num_choices=50, width=200)),
        setting.drafter(limits=EVERYTHING),
    )
    strict = setting.drafter(paths=[(0,), (6,)])
    for drafter in (many, all_of_them, strict):
        observe(drafter, texts, [0])
    context = context_of(texts, [0])
    assert nodes_of(many.propose(context, 127), 0) == nodes_of(all_of_them.propose(context, 127), 0)
    with pytest.raises(BadRequestError, match="asks for choice 6 of 5 tokens that can be drafted"):
        strict.propose(context, 4)


@pytest.mark.parametrize("paths", [None, cartesian_paths([3, 2, 1], 100)])
def test_half_precision_backbones_may_have_exact_heads(paths: list[RankPath] | None) -> None:
    """On a CPU the head is float32 whatever the backbone's activations are; on a GPU both are bfloat16."""
    setting = make()
    narrow = [replace(text, hidden=text.hidden.bfloat16()) for text in make_texts(setting, 6)]
    wide = [replace(text, hidden=text.hidden.float()) for text in narrow]
    trees = []
    for texts in (narrow, wide):
        drafter = setting.drafter(paths=paths)
        observe(drafter, texts, [0])
        trees.append(nodes_of(drafter.propose(context_of(texts, [0]), 20), 0))
    assert trees[0] == trees[1]
    low = replace(setting, head=make_head(SHAPE).bfloat16())
    drafter = low.drafter(paths=paths, project=lambda features: setting.project(features.float()))
    observe(drafter, narrow, [0])
    found = nodes_of(drafter.propose(context_of(narrow, [0]), 20), 0)
    assert max(found.values()) == pytest.approx(max(trees[0].values()), abs=0.2)
