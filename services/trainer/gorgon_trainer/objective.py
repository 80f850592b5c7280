"""The loss of draft heads: every head's own, weighted and summed; the backbone is only read.

    loss = sum_k decay^k * L_k,     k = 0 .. K - 1

L_k is the cross-entropy of the right token (Medusa, 2401.10774, section 2.3.1), or the Kullback-Leibler divergence from
the backbone's own distribution at the target's place (Hydra++, 2402.05109, section 4.2). A head that predicts the
backbone's features pays for their smooth L1 distance beside (EAGLE, 2401.15077, section 3.2).

Letters: n positions, K heads, C hidden size, V vocabulary, V' tokens that can be drafted, B packs of L positions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from gorgon_engine.heads.eagle import EagleHead, Prefix
from gorgon_engine.heads.families import DraftHeads
from gorgon_engine.heads.hydra import HydraHeads
from gorgon_engine.heads.medusa import MedusaHeads
from gorgon_trainer.dataset import IGNORE
from gorgon_trainer.features import Examples


class Loss(StrEnum):
    CROSS_ENTROPY = "cross-entropy"
    KL = "kl"


class FrozenBackbone:
    """What training needs of the backbone beside its hidden states: embeddings and the shared projection. Not a module:
    its weights are no part of what is trained, moved or saved."""

    def __init__(
        self,
        *,
        embed: Callable[[Tensor], Tensor],
        lm_head: Tensor,
        draft_vocabulary: Tensor | None,
        vocab_size: int,
    ) -> None:
        """lm_head: [V', C], rows of the tokens that can be drafted. draft_vocabulary: [V'] ascending; None = all."""
        self.embed = embed
        self.lm_head = lm_head
        self.draft_vocabulary = draft_vocabulary
        rows = torch.arange(vocab_size, device=lm_head.device)
        if draft_vocabulary is not None:
            rows = torch.full_like(rows, IGNORE)
            rows[draft_vocabulary] = torch.arange(draft_vocabulary.numel(), device=rows.device)
        self._rows = rows  # [V]: a token's row in the projection, IGNORE where it cannot be drafted

    def project(self, features: Tensor) -> Tensor:
        """[..., C] -> logits [..., V']."""
        return nn.functional.linear(features.to(self.lm_head.dtype), self.lm_head)

    def rows(self, tokens: Tensor) -> Tensor:
        """Token ids (or IGNORE) -> rows of the projection (or IGNORE)."""
        return torch.where(tokens == IGNORE, IGNORE, self._rows[tokens.clamp(min=0)])


def head_logits(heads: DraftHeads, backbone: FrozenBackbone, batch: Examples) -> Iterator[Tensor]:
    """Each head's logits [n, V'] in turn, the right tokens above it given: one at a time, as they are large."""
    for head, features in enumerate(head_features(heads, backbone, batch)):
        yield _project(heads, backbone, head, features)


def head_features(
    heads: DraftHeads, backbone: FrozenBackbone, batch: Examples, *, num_steps: int | None = None
) -> Iterator[Tensor]:
    """What each head's projection reads [n, C], in turn, the right tokens above it given.

    An eagle head reads features that it predicted itself. num_steps: of that family, the first so many depths alone.
    """
    if isinstance(heads, EagleHead):
        yield from _eagle_features(heads, backbone, batch, num_steps or heads.num_heads)
    elif isinstance(heads, HydraHeads):
        embeddings = heads.condition(backbone.embed(batch.next_tokens).to(batch.hidden.dtype))  # [K', n, C]
        conditions = [heads.condition(batch.hidden), *embeddings.unbind(0)]
        for depth in range(1, heads.num_heads + 1):
            inputs = torch.cat(conditions[: depth + 1], dim=1)
            yield heads.features(depth, batch.hidden, inputs)
    else:
        yield from heads.features(batch.hidden).unbind(dim=1)


def _eagle_features(head: EagleHead, backbone: FrozenBackbone, batch: Examples, num_steps: int) -> Iterator[Tensor]:
    """All positions of the packs go one step after the other, as any of them is a place to draft at; the examples'
    features are what is wanted."""
    packs = batch.packs
    assert packs is not None, "heads with attention are trained on whole packs"
    embeddings = (backbone.embed(tokens).to(packs.hidden.dtype)[:, :, None] for tokens in packs.next_tokens)
    angles = (head.angles(packs.positions + step) for step in range(num_steps))
    rows = head.rows(packs.hidden[:, :, None], next(embeddings), next(angles))
    keys, values = (part[:, :, 0].transpose(1, 2) for part in (rows.keys, rows.values))
    prefix = Prefix(keys, values, packs.mask())
    paths = head.begin(rows, prefix)
    yield paths.features.flatten(0, 2)[packs.chosen]
    for _ in range(num_steps - 1):
        paths = head.extend(prefix, paths, next(embeddings), next(angles))
        yield paths.features.flatten(0, 2)[packs.chosen]


def _project(heads: DraftHeads, backbone: FrozenBackbone, head: int, features: Tensor) -> Tensor:
    """Features [n, C] of a head, counted from 0 -> logits [n, V']."""
    if isinstance(heads, EagleHead):
        return backbone.project(features)
    if isinstance(heads, HydraHeads):
        return heads.project(head + 1, features, backbone.project)
    assert isinstance(heads, MedusaHeads)
    if heads.projection is None:
        return backbone.project(features)
    return nn.functional.linear(features, heads.projection[head])


@dataclass(frozen=True, slots=True)
class ObjectiveConfig:
    """What the loss is made of."""

    loss: Loss
    decay: float  # of a head's weight
    dropout: float = 0.0  # share of what the heads read that is dropped while they are in training mode
    unroll: int | None = None  # eagle: depths that are trained; None = all
    feature_loss_weight: float = 0.0  # eagle: of the features' distance, beside 1 for the tokens' loss

    @property
    def needs_teachers(self) -> bool:
        return self.loss is Loss.KL or self.feature_loss_weight > 0.0


class Objective(nn.Module):
    """The heads with their loss: the module that is trained, on one device or on several."""

    def __init__(self, heads: DraftHeads, backbone: FrozenBackbone, config: ObjectiveConfig) -> None:
        super().__init__()
        assert config.feature_loss_weight == 0.0 or isinstance(heads, EagleHead), "other heads predict no features"
        self.heads = heads
        self._backbone = backbone
        self._config = config
        for module in heads.modules():
            if isinstance(module, nn.Dropout):
                module.p = config.dropout

    def forward(self, batch: Examples) -> tuple[Tensor, Tensor]:
        """The loss to minimise [], and each trained head's own [K], detached."""
        config = self._config
        losses = []
        made = head_features(self.heads, self._backbone, batch, num_steps=config.unroll)
        for head, features in enumerate(made):
            logits = _project(self.heads, self._backbone, head, features)
            loss = self._token_loss(head, logits, batch)
            if config.feature_loss_weight > 0.0:
                loss = loss + config.feature_loss_weight * _feature_loss(head, features, batch)
            losses.append(loss)
        own = torch.stack(losses)
        weights = config.decay ** torch.arange(len(losses), device=own.device)
        return (own * weights).sum(), own.detach()

    def _token_loss(self, head: int, logits: Tensor, batch: Examples) -> Tensor:
        targets = self._backbone.rows(batch.targets[head])
        counted = targets != IGNORE
        if self._config.loss is Loss.CROSS_ENTROPY:
            summed = nn.functional.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")
        else:
            assert batch.teachers is not None
            with torch.no_grad():
                teacher = torch.softmax(self._backbone.project(batch.teachers[head]).float(), dim=1)
            student = torch.log_softmax(logits.float(), dim=1)
            # Up to the teacher's own entropy, which no head can change.
            summed = (-(teacher * student).sum(dim=1)).where(counted, 0.0).sum()
        return summed / counted.sum().clamp(min=1)


def _feature_loss(head: int, features: Tensor, batch: Examples) -> Tensor:
    """Of predicted features [n, C] where there is a target: the mean over positions and dimensions."""
    assert batch.teachers is not None
    counted = batch.targets[head] != IGNORE
    distances = nn.functional.smooth_l1_loss(features.float(), batch.teachers[head].float(), reduction="none")
    return distances.mean(dim=1).where(counted, 0.0).sum() / counted.sum().clamp(min=1)
