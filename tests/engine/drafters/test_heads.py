"""Drafting with heads: the right head at the right depth, and draws that Leviathan's rule can trust."""

from dataclasses import replace

import pytest
import torch

from gorgon_engine.acceptance import AcceptanceRule, accept
from gorgon_engine.backbone.base import RowLogits
from gorgon_engine.drafters.base import DraftContext
from gorgon_engine.drafters.heads import DrawnHeadsDrafter, HeadsDrafter
from gorgon_engine.heads.medusa import MedusaHeads
from gorgon_engine.sampling import SamplingBatch, SamplingParams
from gorgon_engine.tree.builders import RankPath, cartesian_paths, dynamic, sparse_paths, static_sparse
from gorgon_engine.tree.tree import flatten, merge_candidates
from gorgon_protocol.errors import BadRequestError
from support.statistics import chi_square_pvalue

HIDDEN, VOCAB, DEPTHS = 8, 12, 3


@pytest.fixture
def heads() -> MedusaHeads:
    torch.manual_seed(4)
    heads = MedusaHeads(HIDDEN, num_heads=DEPTHS, lm_head=torch.randn(VOCAB, HIDDEN))
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return heads.requires_grad_(False)


def unused(features: torch.Tensor) -> torch.Tensor:
    raise AssertionError("these heads have projections of their own")


def make_context(batch: int, *, seeds: torch.Tensor | None = None, length: int = 20) -> DraftContext:
    generator = torch.Generator().manual_seed(9)
    history = torch.randint(VOCAB, (batch, 32), generator=generator)
    return DraftContext(
        root_tokens=history[:, length - 1],
        hidden=torch.randn(batch, HIDDEN, generator=generator),
        history=history,
        history_lengths=torch.full((batch,), length),
        seeds=torch.arange(batch) if seeds is None else seeds,
    )


def test_a_dynamic_tree_is_built_from_each_heads_likeliest_tokens(heads: MedusaHeads) -> None:
    context = make_context(3)
    tree = HeadsDrafter(heads, unused, num_choices=4).propose(context, 10)
    log_probs, tokens = torch.log_softmax(heads(context.hidden), dim=2).topk(4, dim=2)
    expected = dynamic(tokens, log_probs, 10)
    assert tree.source == "head"
    for name in ("tokens", "parents", "ranks"):
        assert torch.equal(getattr(tree, name), getattr(expected, name))
    torch.testing.assert_close(tree.log_probs, expected.log_probs)
    assert tree.log_probs.dtype == torch.float32
    assert tree.draft_probs is None


def test_a_fixed_tree_takes_the_first_paths_that_fit(heads: MedusaHeads) -> None:
    context = make_context(2)
    paths = sparse_paths([[0.5, 0.3], [0.4, 0.3], [0.3]], 9)
    log_probs, tokens = torch.log_softmax(heads(context.hidden), dim=2).topk(2, dim=2)
    drafter = HeadsDrafter(heads, unused, paths=paths)
    for max_nodes in (1, 4, 9, 20):
        tree = drafter.propose(context, max_nodes)
        expected = static_sparse(tokens, log_probs, paths[:max_nodes])
        assert torch.equal(tree.tokens, expected.tokens)
        torch.testing.assert_close(tree.log_probs, expected.log_probs)


def test_the_vocabulary_may_be_smaller_than_the_choice(heads: MedusaHeads) -> None:
    tree = HeadsDrafter(heads, unused, num_choices=VOCAB + 5).propose(make_context(1), 127)
    assert tree.tokens.shape == (1, 127)
    assert (tree.log_probs > -torch.inf).all()


def test_shared_projections_are_one_product(heads: MedusaHeads) -> None:
    shared = MedusaHeads(HIDDEN, num_heads=DEPTHS)
    weight = torch.randn(VOCAB, HIDDEN)
    shapes: list[torch.Size] = []

    def project(features: torch.Tensor) -> torch.Tensor:
        shapes.append(features.shape)
        return features @ weight.T

    context = make_context(2)
    tree = HeadsDrafter(shared, project).propose(context, 8)
    assert shapes == [(2, DEPTHS, HIDDEN)]
    # Untrained heads pass the hidden state through: every depth guesses the backbone's own first choice.
    best = (context.hidden @ weight.T).argmax(dim=1)
    assert torch.equal(tree.tokens[:, 0], best)


def test_a_reduced_vocabulary_names_its_own_tokens(heads: MedusaHeads) -> None:
    """Row i of the projections stands for token said[i]: probabilities are among the tokens that can be drafted."""
    said = torch.tensor([2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37])
    context = make_context(3)
    for paths in (None, cartesian_paths([3, 2], 20)):
        whole = HeadsDrafter(heads, unused, paths=paths).propose(context, 12)
        tree = HeadsDrafter(heads, unused, paths=paths, draft_vocabulary=said).propose(context, 12)
        assert torch.equal(tree.tokens, said[whole.tokens])
        for name in ("parents", "log_probs", "ranks"):
            assert torch.equal(getattr(tree, name), getattr(whole, name))


class TestDrawn:
    paths = cartesian_paths([3, 2, 1], 100)

    def test_children_are_drawn_without_replacement_from_their_head(self, heads: MedusaHeads) -> None:
        """The first child follows the head's distribution; the second what the first left of it."""
        context = make_context(1)
        draws = 4000
        many = replace(
            context,
            **{name: getattr(context, name).expand(draws, *getattr(context, name).shape[1:]) for name in
               ("root_tokens", "hidden", "history", "history_lengths")},
            seeds=torch.arange(draws),
        )  # fmt: skip
        tree = DrawnHeadsDrafter(heads, unused, paths=self.paths).propose(many, 100)
        assert tree.draft_probs is not None
        assert tree.draft_rows is not None
        probs = torch.softmax(heads(context.hidden), dim=2)[0]
        torch.testing.assert_close(tree.draft_probs[0], probs)
        for path, column in (((0,), 0), ((0, 0), self.paths.index((0, 0))), ((0, 0, 0), self.paths.index((0, 0, 0)))):
            row = len(path) - 1
            assert (tree.draft_rows[:, column] == row).all()
            assert chi_square_pvalue(tree.tokens[:, column], probs[row]) > 1e-4
        without = probs[0][None].expand(VOCAB, -1) * (1 - torch.eye(VOCAB))
        second = (probs[0][:, None] * without / without.sum(dim=1, keepdim=True)).sum(dim=0)
        assert chi_square_pvalue(tree.tokens[:, 1], second) > 1e-4
        first_level = tree.tokens[:, :3].sort(dim=1).values
        assert (first_level.diff(dim=1) > 0).all(), "siblings differ"

    def test_draws_depend_on_seed_and_position_alone(self, heads: MedusaHeads) -> None:
        drafter = DrawnHeadsDrafter(heads, unused, paths=self.paths)
        context = make_context(2, seeds=torch.tensor([5, 5]))
        same = replace(context, hidden=context.hidden[:1].expand(2, -1))
        tree = drafter.propose(same, 20)
        assert torch.equal(tree.tokens[0], tree.tokens[1])
        later = drafter.propose(replace(same, history_lengths=same.history_lengths + 1), 20)
        assert not torch.equal(later.tokens, tree.tokens)

    def test_which_nodes_are_kept_never_looks_at_the_tokens(self, heads: MedusaHeads) -> None:
        context = make_context(50)
        for accuracies in (None, [[0.1, 0.5, 0.0], [0.9], []]):
            drafter = DrawnHeadsDrafter(heads, unused, paths=self.paths, accuracies=accuracies)
            tree = drafter.propose(context, 100)
            assert (tree.log_probs == tree.log_probs[0]).all()
            assert (tree.log_probs.diff(dim=1) <= 0).all(), "the list's order is the order of cutting"
            fewer = drafter.propose(context, 5)
            assert torch.equal(fewer.log_probs, tree.log_probs[:, :5])
            assert torch.equal(fewer.tokens, tree.tokens[:, :5])

    def test_a_distribution_that_runs_out_leaves_padding(self, heads: MedusaHeads) -> None:
        """One possible token: the second and third draws do not exist, nor anything below them."""
        certain = MedusaHeads(HIDDEN, num_heads=DEPTHS)

        def project(features: torch.Tensor) -> torch.Tensor:
            logits = torch.full((*features.shape[:2], VOCAB), -1e9)
            logits[..., 7] = 0.0
            return logits

        tree = DrawnHeadsDrafter(certain, project, paths=self.paths).propose(make_context(2), 100)
        real = [path for path, log_prob in zip(self.paths, tree.log_probs[0], strict=True) if log_prob > -torch.inf]
        assert real == [(0,), (0, 0), (0, 0, 0)]
        assert set(tree.tokens[0][tree.log_probs[0] > -torch.inf].tolist()) == {7}

    def test_a_reduced_vocabulary_is_a_distribution_over_all_tokens(self, heads: MedusaHeads) -> None:
        said = torch.arange(VOCAB) * 2 + 1
        context = make_context(4)
        whole = DrawnHeadsDrafter(heads, unused, paths=self.paths).propose(context, 20)
        drafter = DrawnHeadsDrafter(heads, unused, paths=self.paths, draft_vocabulary=said, vocab_size=2 * VOCAB + 1)
        tree = drafter.propose(context, 20)
        assert tree.draft_probs is not None
        assert whole.draft_probs is not None
        assert tree.draft_probs.shape == (4, DEPTHS, 2 * VOCAB + 1)
        assert torch.equal(tree.draft_probs[..., said], whole.draft_probs)
        torch.testing.assert_close(tree.draft_probs.sum(dim=2), torch.ones(4, DEPTHS))
        assert torch.isin(tree.tokens, said).all()

    @pytest.mark.parametrize(("num_nodes", "reduced"), [(4, False), (7, False), (16, False), (16, True)])
    def test_the_rejection_rule_keeps_the_backbones_distribution(
        self, heads: MedusaHeads, num_nodes: int, reduced: bool
    ) -> None:
        """Drafter, merging, cutting and rule together, over many seeds, whatever part of the tree is verified.

        reduced: the backbone may say three tokens that cannot be drafted.
        """
        draws = 6000
        vocab_size = VOCAB + 3 if reduced else VOCAB
        said = torch.tensor([token for token in range(vocab_size) if token not in (0, 4, 9)]) if reduced else None
        target = torch.randn(DEPTHS + 1, vocab_size, generator=torch.Generator().manual_seed(2)) * 1.5
        context = make_context(1)
        hidden = context.hidden.expand(draws, -1)
        length = 20
        many = DraftContext(
            root_tokens=torch.zeros(draws, dtype=torch.int64),
            hidden=hidden,
            history=torch.zeros(draws, 32, dtype=torch.int64),
            history_lengths=torch.full((draws,), length),
            seeds=torch.arange(draws),
        )
        drafter = DrawnHeadsDrafter(heads, unused, paths=self.paths, draft_vocabulary=said, vocab_size=vocab_size)
        forest = drafter.propose(many, 15)
        merged = merge_candidates([forest], max_nodes=16, max_depth=8)
        tree = flatten(many.root_tokens, merged, torch.full((draws,), num_nodes), num_nodes)
        params = SamplingParams(temperature=1.0)
        sampling = SamplingBatch.of([params], vocab_size=vocab_size, device=torch.device("cpu")).repeat(draws)
        result = accept(
            tree,
            RowLogits.of(target[tree.depths]),
            positions=many.history_lengths - 1,
            sampling=replace(sampling, seeds=many.seeds),
            counts=None,
            rule=AcceptanceRule.REJECTION,
            max_depth=8,
        )
        assert 1.2 < result.num_committed.float().mean() < 3.5, "drafts are accepted and rejected"
        for depth in range(2):
            said = result.num_committed > depth
            expected = torch.softmax(target[depth], dim=0)
            assert chi_square_pvalue(result.tokens[said, depth], expected) > 1e-4


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)], "4 deep: the heads guess 3 tokens beyond the next"),
        ([(0, 0), (0,)], "comes before its parent"),
        ([], "at least one path"),
    ],
)
@pytest.mark.parametrize("kind", [HeadsDrafter, DrawnHeadsDrafter])
def test_trees_that_do_not_fit_the_heads_are_refused(
    heads: MedusaHeads, kind: type[HeadsDrafter | DrawnHeadsDrafter], paths: list[RankPath], message: str
) -> None:
    with pytest.raises(BadRequestError, match=message):
        kind(heads, unused, paths=paths)


@pytest.mark.parametrize("paths", [[(1,)], [(0,), (2,), (1,)], [(0,), (0, 1)]])
def test_drawn_siblings_come_in_the_order_of_drawing(heads: MedusaHeads, paths: list[RankPath]) -> None:
    """A sibling that was drawn and is not verified would leave the later ones with the wrong distribution."""
    with pytest.raises(BadRequestError, match="before its sibling of lower rank"):
        DrawnHeadsDrafter(heads, unused, paths=paths)
