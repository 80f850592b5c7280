"""The loss against its plain formula; gradients reach the heads and nothing else; training sees what drafting does."""

import pytest
import torch
from torch import Tensor

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.drafters.base import DraftContext
from gorgon_engine.drafters.hydra import HydraDrafter
from gorgon_engine.heads.families import DraftHeads
from gorgon_engine.heads.hydra import HydraHeads, HydraShape
from gorgon_engine.heads.medusa import MedusaHeads
from gorgon_trainer.dataset import IGNORE
from gorgon_trainer.features import Examples
from gorgon_trainer.objective import FrozenBackbone, Loss, Objective, ObjectiveConfig, head_logits
from support.training import VOCAB, frozen_of

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS, POSITIONS = 3, 40
DRAFTABLE = torch.arange(2, VOCAB, 3)  # a third of the vocabulary


def make_heads(kind: str, hidden_size: int, num_rows: int) -> DraftHeads:
    """Heads whose every weight has a random value. kind: the family, `-own` for projections of their own."""
    torch.manual_seed(2)
    own = kind.endswith("-own")
    if kind.startswith("medusa"):
        lm_head = torch.zeros(num_rows, hidden_size) if own else None
        heads: DraftHeads = MedusaHeads(hidden_size, num_heads=HEADS, num_blocks=2, lm_head=lm_head)
    else:
        shape = HydraShape(
            hidden_size,
            num_heads=HEADS,
            num_blocks=2,
            normalised=not own,
            matrix_residual=own,
            own_projection=num_rows if own else None,
            projection_bias=own,
        )
        heads = HydraHeads(shape)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return heads


KINDS = ["medusa", "medusa-own", "hydra", "hydra-own"]


def make_batch(hidden_size: int) -> Examples:
    """Random examples, a fifth of the targets missing."""
    generator = torch.Generator().manual_seed(5)
    targets = torch.randint(VOCAB, (HEADS, POSITIONS), generator=generator)
    targets[torch.rand(HEADS, POSITIONS, generator=generator) < 0.2] = IGNORE
    return Examples(
        hidden=torch.randn(POSITIONS, hidden_size, generator=generator),
        next_tokens=torch.randint(VOCAB, (HEADS, POSITIONS), generator=generator),
        targets=targets,
        teachers=torch.randn(HEADS, POSITIONS, hidden_size, generator=generator),
    )


def plain_logits(heads: DraftHeads, backbone: Backbone, frozen: FrozenBackbone, batch: Examples) -> list[Tensor]:
    """What the heads' own forward gives, one example after another."""
    if isinstance(heads, MedusaHeads):
        return list(heads(batch.hidden, frozen.project).unbind(1))
    rows = []
    for place in range(POSITIONS):
        embeddings = backbone.embed(batch.next_tokens[:, place])  # [K, C]
        rows.append(torch.stack(heads(batch.hidden[place], embeddings, frozen.project)))
    return list(torch.stack(rows, dim=1))


def plain_loss(logits: list[Tensor], frozen: FrozenBackbone, batch: Examples, loss: Loss, draftable: Tensor) -> Tensor:
    """Each head's loss [K], by loops over the formula."""
    row_of = {int(token): row for row, token in enumerate(draftable)}
    values = []
    for head in range(HEADS):
        terms = []
        for place, target in enumerate(batch.targets[head].tolist()):
            if target not in row_of:
                continue
            student = torch.log_softmax(logits[head][place].double(), dim=0)
            if loss is Loss.CROSS_ENTROPY:
                terms.append(-student[row_of[target]])
            else:
                assert batch.teachers is not None
                teacher = torch.softmax((frozen.lm_head @ batch.teachers[head, place]).double(), dim=0)
                terms.append(-(teacher * student).sum())
        values.append(torch.stack(terms).mean())
    return torch.stack(values).float()


@pytest.mark.parametrize("draft_vocabulary", [None, DRAFTABLE], ids=["all", "some"])
@pytest.mark.parametrize("loss", list(Loss))
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_formula(
    small_backbone: Backbone, kind: str, loss: Loss, draft_vocabulary: Tensor | None
) -> None:
    frozen = frozen_of(small_backbone, draft_vocabulary)
    size = small_backbone.config.hidden_size
    heads, batch = make_heads(kind, size, frozen.lm_head.shape[0]), make_batch(size)
    logits = plain_logits(heads, small_backbone, frozen, batch)
    draftable = torch.arange(VOCAB) if draft_vocabulary is None else draft_vocabulary
    expected = plain_loss(logits, frozen, batch, loss, draftable)

    summed, own = Objective(heads, frozen, ObjectiveConfig(loss=loss, decay=0.8))(batch)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(summed, sum(0.8**head * expected[head] for head in range(HEADS)), rtol=1e-4, atol=1e-5)
    assert not own.requires_grad


@pytest.mark.parametrize("draft_vocabulary", [None, DRAFTABLE], ids=["all", "some"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_computes_the_heads_own_forward(
    small_backbone: Backbone, kind: str, draft_vocabulary: Tensor | None
) -> None:
    frozen = frozen_of(small_backbone, draft_vocabulary)
    size = small_backbone.config.hidden_size
    heads, batch = make_heads(kind, size, frozen.lm_head.shape[0]), make_batch(size)
    expected = plain_logits(heads, small_backbone, frozen, batch)
    made = list(head_logits(heads, frozen, batch))
    assert len(made) == HEADS
    for logits, plain in zip(made, expected, strict=True):
        torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)


def test_training_computes_what_drafting_does_on_the_true_path(small_backbone: Backbone) -> None:
    """The drafter is made to draft the true tokens: a path whose ranks are those of the training's own logits."""
    frozen = frozen_of(small_backbone)
    size = small_backbone.config.hidden_size
    heads, batch = make_heads("hydra", size, VOCAB), make_batch(size)
    assert isinstance(heads, HydraHeads)
    with torch.no_grad():
        log_probs = [torch.log_softmax(logits, dim=1) for logits in head_logits(heads, frozen, batch)]
    for place in range(8):
        root, drafts = int(batch.next_tokens[0, place]), batch.next_tokens[1:, place].tolist()
        order = [one[place].argsort(descending=True).tolist() for one in log_probs]
        ranks = [order[depth].index(token) for depth, token in enumerate(drafts)]
        # The last head's guess: its best one.
        path = [*ranks, 0]
        drafter = HydraDrafter(
            heads,
            embed=small_backbone.embed,
            project=frozen.project,
            paths=[tuple(path[:depth]) for depth in range(1, HEADS + 1)],
        )
        context = DraftContext(
            root_tokens=torch.tensor([root]),
            hidden=batch.hidden[place : place + 1],
            history=torch.tensor([[5, root]]),
            history_lengths=torch.tensor([2]),
            seeds=torch.tensor([0]),
        )
        tree = drafter.propose(context, HEADS)
        assert tree.tokens[0].tolist() == [*drafts, order[-1][0]]
        steps = [float(log_probs[depth][place, token]) for depth, token in enumerate(tree.tokens[0].tolist())]
        sums = [sum(steps[: depth + 1]) for depth in range(HEADS)]
        torch.testing.assert_close(tree.log_probs[0], torch.tensor(sums), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", list(Loss))
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_weight_and_only_the_heads(small_backbone: Backbone, kind: str, loss: Loss) -> None:
    frozen = frozen_of(small_backbone)
    size = small_backbone.config.hidden_size
    heads, batch = make_heads(kind, size, VOCAB), make_batch(size)
    before = frozen.lm_head.clone()
    objective = Objective(heads, frozen, ObjectiveConfig(loss=loss, decay=1.0))
    objective(batch)[0].backward()
    assert {name for name, _ in objective.named_parameters()} == {
        f"heads.{name}" for name, _ in heads.named_parameters()
    }
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None, name
        per_head = parameter.grad.flatten(1) if name in ("weight", "bias", "projection") else parameter.grad[None]
        assert (per_head.abs().amax(dim=tuple(range(1, per_head.ndim))) > 0).all(), name
    assert not frozen.lm_head.requires_grad
    assert torch.equal(frozen.lm_head, before)
    assert batch.teachers is not None
    assert not batch.hidden.requires_grad
    assert not batch.teachers.requires_grad


@pytest.mark.parametrize("loss", list(Loss))
def test_a_head_without_a_target_costs_nothing(small_backbone: Backbone, loss: Loss) -> None:
    frozen = frozen_of(small_backbone, DRAFTABLE)
    size = small_backbone.config.hidden_size
    heads, batch = make_heads("medusa", size, len(DRAFTABLE)), make_batch(size)
    batch.targets[1] = 0  # a token that cannot be drafted
    summed, own = Objective(heads, frozen, ObjectiveConfig(loss=loss, decay=1.0))(batch)
    summed.backward()
    assert isinstance(heads, MedusaHeads)
    assert own[1] == 0
    assert torch.isfinite(summed)
    assert heads.weight.grad is not None
    assert not heads.weight.grad[1].any()
    assert heads.weight.grad[0].any()


def test_rows_of_the_projection(small_backbone: Backbone) -> None:
    frozen = frozen_of(small_backbone, DRAFTABLE)
    tokens = torch.tensor([[2, 3, IGNORE], [5, 65, 66]])
    assert frozen.rows(tokens).tolist() == [[0, IGNORE, IGNORE], [1, 21, IGNORE]]
    assert frozen_of(small_backbone).rows(tokens).tolist() == tokens.tolist()
