"""Drafting with Hydra heads: the search against all paths there are, fixed trees path by path."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch

from gorgon_engine.drafters.base import DraftContext
from gorgon_engine.drafters.beam import BeamLimits
from gorgon_engine.drafters.hydra import HydraDrafter
from gorgon_engine.heads.hydra import HydraHeads, HydraShape
from gorgon_engine.tree.builders import RankPath, cartesian_paths
from gorgon_protocol.errors import BadRequestError
from support.searches import Tokens, assert_same_nodes, by_beam, by_trying_all, nodes_of

HIDDEN, VOCAB, HEADS = 16, 5, 3
EVERYTHING = BeamLimits(num_choices=VOCAB, width=VOCAB**HEADS)

SHAPES: list[dict[str, Any]] = [
    {"normalised": True},
    {"normalised": False, "matrix_residual": True},
    {"normalised": True, "own_projection": VOCAB},
    {"normalised": False, "own_projection": VOCAB, "projection_bias": True},
]


@dataclass(frozen=True)
class Setting:
    """Heads, the backbone's two matrices [V, C], and which of its tokens the rows of a projection stand for."""

    heads: HydraHeads
    embedding: torch.Tensor
    lm_head: torch.Tensor
    said: torch.Tensor | None = None

    @property
    def tokens(self) -> list[int]:
        return list(range(VOCAB)) if self.said is None else self.said.tolist()

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embedding[tokens]

    def project(self, features: torch.Tensor) -> torch.Tensor:
        return features @ (self.lm_head if self.said is None else self.lm_head[self.said]).T

    def drafter(self, **options: Any) -> HydraDrafter:
        defaults = {"embed": self.embed, "project": self.project, "draft_vocabulary": self.said}
        return HydraDrafter(self.heads, **(defaults | options))


def make(*, said: list[int] | None = None, scale: float = 1.0, **shape: Any) -> Setting:
    torch.manual_seed(0)
    heads = HydraHeads(HydraShape(hidden_size=HIDDEN, num_heads=HEADS, num_blocks=2, **shape))
    for name, parameter in heads.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(name == "norm"), std=0.3)
    vocab_size = VOCAB if said is None else 1 + max(said)
    return Setting(
        heads.requires_grad_(False),
        torch.randn(vocab_size, HIDDEN),
        torch.randn(vocab_size, HIDDEN) * 0.4 * scale,
        None if said is None else torch.tensor(said),
    )


def make_context(setting: Setting, batch: int = 1) -> DraftContext:
    generator = torch.Generator().manual_seed(9)
    history = torch.randint(setting.embedding.shape[0], (batch, 8), generator=generator)
    return DraftContext(
        root_tokens=history[:, -1],
        hidden=torch.randn(batch, HIDDEN, generator=generator),
        history=history,
        history_lengths=torch.full((batch,), 8),
        seeds=torch.arange(batch),
    )


def row_of(context: DraftContext, row: int) -> DraftContext:
    names = ("root_tokens", "hidden", "history", "history_lengths", "seeds")
    return DraftContext(**{name: getattr(context, name)[row : row + 1] for name in names})


def next_log_probs(setting: Setting, context: DraftContext, row: int) -> Callable[[Tokens], dict[int, float]]:
    """The distribution of the token below a path, through the pass that training takes: all tokens given at once."""

    @cache
    def following(path: Tokens) -> dict[int, float]:
        given = [int(context.root_tokens[row]), *path]
        given += [0] * (HEADS - len(given))  # what stands below is not seen
        embeddings = setting.embedding[torch.tensor(given)]
        logits = setting.heads(context.hidden[row], embeddings, setting.project)[len(path)]
        return dict(zip(setting.tokens, torch.log_softmax(logits, dim=0).tolist(), strict=True))

    return following


def assert_same(found: dict[Tokens, float], expected: dict[Tokens, float]) -> None:
    assert_same_nodes(found, expected, absolute=1e-5)


@pytest.mark.parametrize("said", [None, [3, 4, 8, 11, 17]])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_wide_search_finds_the_best_of_all_paths(shape: dict[str, Any], said: list[int] | None) -> None:
    setting = make(said=said, **shape)
    context = make_context(setting, batch=3)
    drafter = setting.drafter(limits=EVERYTHING)
    for row in range(3):
        expected = by_trying_all(next_log_probs(setting, context, row), setting.tokens, HEADS)
        for max_nodes in (1, 7, 31, 127):
            tree = drafter.propose(context, max_nodes)
            assert tree.tokens.shape == (3, max_nodes)
            assert tree.log_probs.dtype == torch.float32
            assert_same(nodes_of(tree, row), dict(list(expected.items())[:max_nodes]))


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
    setting = make(normalised=True)
    context = make_context(setting, batch=4)
    for max_nodes in (2, 12, 60):
        tree = setting.drafter(limits=limits).propose(context, max_nodes)
        for row in range(4):
            assert_same(nodes_of(tree, row), by_beam(next_log_probs(setting, context, row), limits, HEADS, max_nodes))


def test_ranks_are_places_among_the_siblings() -> None:
    setting = make()
    context = make_context(setting, batch=2)
    tree = setting.drafter(limits=EVERYTHING).propose(context, 100)
    for row in range(2):
        following = next_log_probs(setting, context, row)
        for path, rank in zip(nodes_of(tree, row), tree.ranks[row].tolist(), strict=True):
            siblings = sorted(following(path[:-1]).items(), key=lambda item: -item[1])
            assert siblings[rank][0] == path[-1]
    assert (tree.source, tree.draft_probs) == ("head", None)


def test_a_least_probability_ends_the_search_and_changes_nothing_above_it() -> None:
    setting = make(scale=2.0)
    context = make_context(setting, batch=3)
    whole = setting.drafter(limits=EVERYTHING).propose(context, 127)
    num_projections = 0

    def project(features: torch.Tensor) -> torch.Tensor:
        nonlocal num_projections
        num_projections += 1
        return setting.project(features)

    used = []
    for least in (0.0, 0.01, 0.1, 0.3, 1.0):
        num_projections = 0
        limits = replace(EVERYTHING, min_path_prob=least)
        tree = setting.drafter(project=project, limits=limits).propose(context, 127)
        used.append(num_projections)
        for row in range(3):
            every, kept = nodes_of(whole, row), nodes_of(tree, row)
            above = {path: value for path, value in every.items() if value >= torch.tensor(least).log()}
            assert_same(dict(list(kept.items())[: len(above)]), above)
            assert all(len(path) == 1 or path[:-1] in above for path in kept), "nothing is looked for below the rest"
    assert used == sorted(used, reverse=True)
    assert (used[0], used[-1]) == (HEADS, 1)


@pytest.mark.parametrize("least", [0.0, 0.15])
def test_sequences_do_not_see_each_other(least: float) -> None:
    setting = make(scale=1.5)
    context = make_context(setting, batch=6)
    drafter = setting.drafter(limits=BeamLimits(num_choices=4, width=5, min_path_prob=least))
    together = drafter.propose(context, 20)
    for row in range(6):
        assert_same(nodes_of(together, row), nodes_of(drafter.propose(row_of(context, row), 20), 0))
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    names = ("root_tokens", "hidden", "history", "history_lengths", "seeds")
    moved = drafter.propose(DraftContext(**{name: getattr(context, name)[order] for name in names}), 20)
    for row in range(6):
        assert_same(nodes_of(moved, row), nodes_of(together, int(order[row])))


def test_dynamic_trees_have_one_size() -> None:
    """Batches are joined: what was not found is padding."""
    setting = make()
    context = make_context(setting, batch=2)
    for limits in (EVERYTHING, BeamLimits(num_choices=2, width=1), BeamLimits(min_path_prob=1.0)):
        tree = setting.drafter(limits=limits).propose(context, 300)
        assert tree.tokens.shape == tree.parents.shape == tree.log_probs.shape == tree.ranks.shape == (2, 300)
    assert [len(nodes_of(tree, row)) for row in range(2)] == [VOCAB, VOCAB]
    padding = tree.log_probs == -torch.inf
    assert padding.sum().item() == 2 * (300 - VOCAB)
    assert (tree.parents[padding] == -1).all()


def test_certain_guesses_keep_parents_first() -> None:
    """Every path of one likely token has probability 1, to the last bit: only the order of depths tells them apart."""
    setting = make()

    def project(features: torch.Tensor) -> torch.Tensor:
        return 1e4 * torch.nn.functional.one_hot(torch.full(features.shape[:-1], 3), VOCAB)

    certain = setting.drafter(project=project, limits=EVERYTHING)
    tree = certain.propose(make_context(setting, batch=2), 40)
    for row in range(2):
        assert list(nodes_of(tree, row).items())[:3] == [((3,), 0.0), ((3, 3), 0.0), ((3, 3, 3), 0.0)]


@pytest.mark.parametrize("said", [None, [3, 4, 8, 11, 17]])
@pytest.mark.parametrize("shape", SHAPES)
def test_fixed_trees_path_by_path(shape: dict[str, Any], said: list[int] | None) -> None:
    """In the order of the list, which is not that of the depths."""
    paths: list[RankPath] = [(1,), (1, 0), (0,), (1, 0, 4), (0, 3), (1, 2), (0, 3, 0), (0, 0), (1, 0, 1), (4,), (0, 1)]
    setting = make(said=said, **shape)
    context = make_context(setting, batch=3)
    drafter = setting.drafter(paths=paths)
    for max_nodes in (1, 2, 5, 11, 50):
        tree = drafter.propose(context, max_nodes)
        assert tree.tokens.shape == (3, min(max_nodes, len(paths)))
        for row in range(3):
            following = next_log_probs(setting, context, row)
            expected = {}
            for path in paths[:max_nodes]:
                tokens: Tokens = ()
                value = 0.0
                for rank in path:
                    token, log_prob = sorted(following(tokens).items(), key=lambda item: -item[1])[rank]
                    tokens, value = (*tokens, token), value + log_prob
                expected[tokens] = value
            assert list(nodes_of(tree, row)) == list(expected), "in the order of the list"
            assert_same(nodes_of(tree, row), expected)
            assert tree.ranks[row].tolist() == [path[-1] for path in paths[:max_nodes]]


def test_a_tree_may_be_shallower_than_the_heads_are_many() -> None:
    setting = make()
    context = make_context(setting)
    deep = setting.drafter(paths=cartesian_paths([2, 2, 2], 100)).propose(context, 6)
    shallow = setting.drafter(paths=cartesian_paths([2, 2], 100)).propose(context, 100)
    assert nodes_of(shallow, 0) == nodes_of(deep, 0)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)], "the tree is 4 deep: the heads guess 3 tokens beyond the next"),
        ([(0, 0), (0,)], "comes before its parent"),
        ([(0,), (0,)], "given twice"),
        ([(-1,)], "not a list of ranks"),
        ([], "at least one path"),
    ],
)
def test_trees_that_do_not_fit_the_heads_are_refused(paths: list[RankPath], message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        make().drafter(paths=paths)


def test_the_vocabulary_may_be_smaller_than_the_choices() -> None:
    setting = make()
    context = make_context(setting)
    many = setting.drafter(limits=BeamLimits(num_choices=50, width=200)).propose(context, 127)
    assert nodes_of(many, 0) == nodes_of(setting.drafter(limits=EVERYTHING).propose(context, 127), 0)
    with pytest.raises(BadRequestError, match="asks for choice 6 of 5 tokens that can be drafted"):
        setting.drafter(paths=[(0,), (6,)]).propose(context, 4)


@pytest.mark.parametrize("paths", [None, cartesian_paths([3, 2, 1], 100)])
def test_half_precision_backbones_may_have_exact_heads(paths: list[RankPath] | None) -> None:
    """On a CPU the heads are float32 whatever the backbone's activations are; on a GPU both are bfloat16."""
    setting = make()
    context = make_context(setting, batch=2)
    narrow = replace(context, hidden=context.hidden.bfloat16())
    exact = replace(context, hidden=narrow.hidden.float())
    embedding = setting.embedding.bfloat16()
    options: dict[str, Any] = {"project": lambda features: setting.project(features.float()), "paths": paths}
    expected = replace(setting, embedding=embedding.float()).drafter(paths=paths).propose(exact, 9)
    tree = HydraDrafter(setting.heads, embed=lambda tokens: embedding[tokens], **options).propose(narrow, 9)
    for name in ("tokens", "parents", "ranks", "log_probs"):
        assert torch.equal(getattr(tree, name), getattr(expected, name))
    halved = make().heads.bfloat16()
    rounded = HydraDrafter(halved, embed=lambda tokens: embedding[tokens], **options).propose(narrow, 9)
    assert rounded.log_probs.dtype == torch.float32
    torch.testing.assert_close(rounded.log_probs, expected.log_probs, atol=0.2, rtol=0.1)
