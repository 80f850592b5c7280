"""The loss of an eagle head over whole packs against a loop over segments, positions and depths; dropout."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.heads.eagle import EagleHead, EagleShape
from gorgon_engine.heads.families import DraftHeads
from gorgon_engine.heads.hydra import HydraHeads, HydraShape
from gorgon_engine.heads.medusa import MedusaHeads
from gorgon_trainer.dataset import IGNORE, PackBatch, PackedDataset, collate
from gorgon_trainer.features import Examples, examples
from gorgon_trainer.heldout import held_out
from gorgon_trainer.objective import FrozenBackbone, Loss, Objective, ObjectiveConfig, head_logits
from gorgon_trainer.shards import TokenSequence
from support.eagle import make_head, predict
from support.training import VOCAB, frozen_of

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS, PACK = 3, 12
OFFSETS = (2, 3, 4)
DRAFTABLE = torch.arange(2, VOCAB, 3)  # a third of the vocabulary
PLAIN = ObjectiveConfig(loss=Loss.CROSS_ENTROPY, decay=1.0)


@dataclass(frozen=True)
class Setting:
    head: EagleHead
    packs: PackBatch
    hidden: Tensor  # [P, C]

    def examples(self, *, teachers: bool = True) -> Examples:
        return examples(self.packs, self.hidden, OFFSETS, teachers=teachers, pack_length=PACK)


@pytest.fixture(scope="module")
def setting(small_backbone: Backbone) -> Setting:
    """Packs of several answers, with padding, and prompts at which nothing is to be learned."""
    generator = torch.Generator().manual_seed(4)
    sequences = []
    for length in (5, 3, 12, 7, 4, 9):
        tokens = torch.randint(3, VOCAB, (length,), generator=generator).int()
        sequences.append(TokenSequence(tokens, (torch.arange(length) >= length // 3).to(torch.uint8)))
    dataset = PackedDataset(sequences, pack_length=PACK, offsets=OFFSETS)
    packs = collate([dataset[index] for index in range(len(dataset))])
    config = small_backbone.config
    shape = EagleShape(config.hidden_size, 4, 2, 4, 32, num_heads=HEADS)
    hidden = torch.randn(len(packs.tokens), config.hidden_size, generator=generator) * 2
    return Setting(make_head(shape).requires_grad_(True), packs, hidden)


def plain_features(setting: Setting, backbone: Backbone) -> list[tuple[int, int, Tensor]]:
    """(place, depth, feature [C]) wherever a head has a target, each from its segment alone."""
    packs, found = setting.packs, []
    for start, length in zip(packs.starts.tolist(), packs.lengths.tolist(), strict=True):
        for place in range(start, start + length):
            depths = [depth for depth in range(HEADS) if packs.targets[depth, place] != IGNORE]
            if not depths:
                continue
            embeddings = backbone.embed(packs.tokens[start + 1 : place + 2 + depths[-1]])
            predicted = predict(setting.head, setting.hidden[start : place + 1], embeddings)
            found += [(place, depth, predicted[depth]) for depth in depths]
    return found


@pytest.mark.parametrize("draft_vocabulary", [None, DRAFTABLE], ids=["all", "some"])
@pytest.mark.parametrize(
    "config",
    [
        PLAIN,
        replace(PLAIN, loss=Loss.KL, decay=0.7),
        replace(PLAIN, loss=Loss.KL, unroll=1, feature_loss_weight=10.0),
        replace(PLAIN, decay=0.5, unroll=2, feature_loss_weight=3.0),
    ],
    ids=["cross-entropy", "kl", "features", "features, unrolled"],
)
def test_the_loss_is_the_formula(
    setting: Setting, small_backbone: Backbone, config: ObjectiveConfig, draft_vocabulary: Tensor | None
) -> None:
    frozen = frozen_of(small_backbone, draft_vocabulary)
    summed, own = Objective(setting.head, frozen, config)(setting.examples(teachers=config.needs_teachers))
    row_of = {
        int(token): row for row, token in enumerate(torch.arange(VOCAB) if draft_vocabulary is None else DRAFTABLE)
    }
    num_steps = config.unroll or HEADS
    token_terms: list[list[Tensor]] = [[] for _ in range(num_steps)]
    feature_terms: list[list[Tensor]] = [[] for _ in range(num_steps)]
    for place, depth, feature in plain_features(setting, small_backbone):
        if depth >= num_steps:
            continue
        truth = setting.hidden[place + depth + 1]
        distance = (feature - truth).abs()
        feature_terms[depth].append(torch.where(distance < 1, distance.square() / 2, distance - 0.5).mean())
        target = int(setting.packs.targets[depth, place])
        if target not in row_of:
            continue
        student = torch.log_softmax(frozen.lm_head @ feature, dim=0)
        teacher = torch.softmax(frozen.lm_head @ truth, dim=0)
        hard = config.loss is Loss.CROSS_ENTROPY
        token_terms[depth].append(-student[row_of[target]] if hard else -(teacher * student).sum())
    expected = torch.stack([torch.stack(terms).mean() for terms in token_terms])
    if config.feature_loss_weight:
        expected = expected + config.feature_loss_weight * torch.stack([torch.stack(t).mean() for t in feature_terms])
    torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-4)
    weighted = sum(config.decay**depth * value for depth, value in enumerate(expected))
    torch.testing.assert_close(summed, weighted, rtol=1e-3, atol=1e-4)
    assert not own.requires_grad


def test_held_out_accuracies_are_of_the_heads_own_features(setting: Setting, small_backbone: Backbone) -> None:
    """Of every depth, whichever were trained."""
    frozen = frozen_of(small_backbone)
    measured = held_out(setting.head, frozen, [setting.examples(teachers=False)])
    setting.head.train()
    hits: list[list[bool]] = [[] for _ in range(HEADS)]
    for place, depth, feature in plain_features(setting, small_backbone):
        order = (frozen.lm_head @ feature).argsort(descending=True).tolist()[:10]
        hits[depth].append(int(setting.packs.targets[depth, place]) in order)
    assert [sum(row) for row in measured.accuracies] == pytest.approx([sum(row) / len(row) for row in hits])
    assert measured.num_positions == max(map(len, hits))
    assert sum(map(sum, hits)) > 0


@pytest.mark.parametrize("unroll", [1, 3])
def test_gradients_reach_every_weight_and_only_the_head(
    setting: Setting, small_backbone: Backbone, unroll: int
) -> None:
    frozen = frozen_of(small_backbone)
    batch = setting.examples()
    objective = Objective(setting.head, frozen, replace(PLAIN, unroll=unroll, feature_loss_weight=1.0))
    setting.head.zero_grad()
    objective(batch)[0].backward()
    assert {name for name, _ in objective.named_parameters()} == {
        f"heads.{name}" for name, _ in setting.head.named_parameters()
    }
    for name, parameter in setting.head.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.abs().amax(dim=tuple(range(1, parameter.ndim))) > 0).all(), name
    assert batch.packs is not None
    assert not batch.packs.hidden.requires_grad
    assert not frozen.lm_head.requires_grad


def test_a_deeper_loss_flows_back_through_the_features_above(setting: Setting, small_backbone: Backbone) -> None:
    """With a weight on the second depth alone, the gradient is not that of reading given features."""
    frozen = frozen_of(small_backbone)
    batch = setting.examples()
    gradients = []
    for steps in (1, 2):
        setting.head.zero_grad()
        losses = Objective(setting.head, frozen, replace(PLAIN, unroll=steps))(batch)[0]
        losses.backward()
        assert setting.head.norm.grad is not None
        gradients.append(setting.head.norm.grad.clone())
    assert not torch.allclose(gradients[0], gradients[1], rtol=0.05)


def test_other_heads_predict_no_features(small_backbone: Backbone) -> None:
    heads = MedusaHeads(small_backbone.config.hidden_size, num_heads=2)
    with pytest.raises(AssertionError, match="predict no features"):
        Objective(heads, frozen_of(small_backbone), replace(PLAIN, feature_loss_weight=1.0))


def heads_of(family: str, setting: Setting) -> DraftHeads:
    if family == "eagle":
        return setting.head
    size = setting.head.hidden_size
    torch.manual_seed(0)
    heads: DraftHeads = (
        MedusaHeads(size, num_heads=HEADS, num_blocks=2)
        if family == "medusa"
        else HydraHeads(HydraShape(size, num_heads=HEADS, num_blocks=2))
    )
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return heads


def logits_of(heads: DraftHeads, frozen: FrozenBackbone, batch: Examples) -> Tensor:
    with torch.no_grad():
        return torch.stack(list(head_logits(heads, frozen, batch)))


@pytest.mark.parametrize("family", ["medusa", "hydra", "eagle"])
def test_dropout_is_for_training_alone(setting: Setting, small_backbone: Backbone, family: str) -> None:
    frozen, batch = frozen_of(small_backbone), setting.examples()
    heads = heads_of(family, setting).train()
    expected = logits_of(heads, frozen, batch)
    random = torch.get_rng_state()
    assert torch.equal(logits_of(heads, frozen, batch), expected), "a share of zero"
    assert torch.equal(torch.get_rng_state(), random), "draws nothing"
    Objective(heads, frozen, replace(PLAIN, dropout=0.3))
    dropped = logits_of(heads, frozen, batch)
    for head in range(HEADS):
        assert not torch.isclose(dropped[head], expected[head]).all(dim=1).any()
        # What the heads add their own to passes whole, and stays most of what they say.
        if family != "eagle":
            assert torch.cosine_similarity(dropped[head], expected[head]).mean() > 0.8
    assert torch.equal(logits_of(heads.eval(), frozen, batch), expected)
    Objective(heads, frozen, PLAIN)
    assert torch.equal(logits_of(heads.train(), frozen, batch), expected)
