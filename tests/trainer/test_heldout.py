"""Held-out accuracies against a loop over positions, and what they promise."""

import pytest
import torch
from torch import Tensor

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.heads.medusa import MedusaHeads
from gorgon_trainer.dataset import IGNORE
from gorgon_trainer.evaluation.predicted import predicted_acceptance_length
from gorgon_trainer.features import Examples
from gorgon_trainer.heldout import NUM_RANKS, HeldOut, held_out
from gorgon_trainer.objective import FrozenBackbone, head_logits
from support.training import VOCAB, frozen_of

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = 3


def make_batches(hidden_size: int) -> list[Examples]:
    """Batches of different sizes; the last head has targets in the first one alone."""
    generator = torch.Generator().manual_seed(6)
    batches = []
    for number, count in enumerate((30, 1, 55)):
        targets = torch.randint(VOCAB, (HEADS, count), generator=generator)
        targets[torch.rand(HEADS, count, generator=generator) < 0.3] = IGNORE
        if number:
            targets[2] = IGNORE
        batches.append(
            Examples(
                hidden=torch.randn(count, hidden_size, generator=generator),
                next_tokens=torch.randint(VOCAB, (HEADS, count), generator=generator),
                targets=targets,
                teachers=None,
            )
        )
    return batches


@pytest.mark.parametrize(
    "draft_vocabulary", [None, torch.arange(1, VOCAB, 2), torch.arange(0, VOCAB, 9)], ids=["all", "half", "eight"]
)
def test_accuracies_are_shares_of_positions(small_backbone: Backbone, draft_vocabulary: Tensor | None) -> None:
    frozen = frozen_of(small_backbone, draft_vocabulary)
    size = small_backbone.config.hidden_size
    torch.manual_seed(1)
    heads = MedusaHeads(size, num_heads=HEADS)
    torch.nn.init.normal_(heads.weight, std=0.2)
    batches = make_batches(size)
    measured = held_out(heads, frozen, batches)

    tokens = list(range(VOCAB)) if draft_vocabulary is None else draft_vocabulary.tolist()
    for head in range(HEADS):
        hits, count, losses = [0] * NUM_RANKS, 0, []
        for batch in batches:
            logits = list(head_logits(heads, frozen, batch))[head].detach()
            for row, target in zip(logits, batch.targets[head].tolist(), strict=True):
                if target == IGNORE:
                    continue
                count += 1
                best = [tokens[place] for place in row.argsort(descending=True).tolist()[:NUM_RANKS]]
                if target in best:
                    hits[best.index(target)] += 1
                if target in tokens:
                    losses.append(-torch.log_softmax(row, dim=0)[tokens.index(target)])
        assert measured.accuracies[head] == pytest.approx([hit / count for hit in hits])
        assert measured.losses[head] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)
        assert sum(hits) > 0
        # With every token to choose from some are still ranked behind the tenth; of eight, only what cannot be drafted.
        assert sum(hits) < count
    counts = [sum(int((batch.targets[head] != IGNORE).sum()) for batch in batches) for head in range(HEADS)]
    assert measured.num_positions == max(counts) > counts[2]


def test_a_head_that_is_always_right_and_one_that_cannot_be() -> None:
    """The projection is the identity: a hidden state is the token that it stands for."""
    frozen = FrozenBackbone(
        embed=lambda tokens: tokens, lm_head=torch.eye(VOCAB)[:50], draft_vocabulary=torch.arange(50), vocab_size=VOCAB
    )
    said = torch.arange(10, 30)
    batch = Examples(
        hidden=torch.nn.functional.one_hot(said, VOCAB).float(),
        next_tokens=said[None],
        targets=torch.stack([said, torch.full_like(said, 60)]),
        teachers=None,
    )
    measured = held_out(MedusaHeads(VOCAB, num_heads=2), frozen, [batch])
    assert measured.accuracies == ((1.0, *[0.0] * 9), (0.0,) * 10)
    assert measured.losses[1] == 0.0, "no target of this head can be drafted"
    assert measured.acceptance_length((2, 3)) == 2.0


@pytest.mark.parametrize("num_nodes", [1, 2, 9, 32])
def test_the_acceptance_length_is_that_of_the_best_tree(num_nodes: int) -> None:
    rows = ((0.6, 0.1, 0.05), (0.5, 0.2, 0.0), (0.3, 0.1, 0.1))
    measured = HeldOut(accuracies=rows, losses=(1.0, 2.0, 3.0), num_positions=9)
    assert measured.acceptance_length((2, 3, 4), num_nodes) == predicted_acceptance_length(rows, num_nodes)
    # The head of offset 1 guesses the root, which the backbone gives itself.
    assert measured.acceptance_length((1, 2, 3), num_nodes) == predicted_acceptance_length(rows[1:], num_nodes)
    if num_nodes == 2:
        assert measured.acceptance_length((2, 3, 4), num_nodes) == pytest.approx(1.6)
