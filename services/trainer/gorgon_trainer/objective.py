"""The loss of draft heads: every head's own, weighted and summed; the backbone is only read.

    loss = sum_k decay^k * L_k,     k = 0 .. K - 1

L_k is the cross-entropy of the right token (Medusa, 2401.10774, section 2.3.1), or the Kullback-Leibler divergence from
the backbone's own distribution at the target's place (Hydra++, 2402.05109, section 4.2).

Letters: n positions, K heads, C hidden size, V vocabulary, V' tokens that can be drafted.
"""

from collections.abc import Callable, Iterator
from enum import StrEnum

import torch
from torch import Tensor, nn

from gorgon_engine.heads.families import DraftHeads
from gorgon_engine.heads.hydra import HydraHeads
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
    if isinstance(heads, HydraHeads):
        embeddings = heads.condition(backbone.embed(batch.next_tokens).to(batch.hidden.dtype))  # [K', n, C]
        conditions = [heads.condition(batch.hidden), *embeddings.unbind(0)]
        for depth in range(1, heads.num_heads + 1):
            inputs = torch.cat(conditions[: depth + 1], dim=1)
            yield heads.project(depth, heads.features(depth, batch.hidden, inputs), backbone.project)
        return
    features = heads.features(batch.hidden)  # [n, K, C]
    for head, feature in enumerate(features.unbind(dim=1)):
        if heads.projection is None:
            yield backbone.project(feature)
        else:
            yield nn.functional.linear(feature, heads.projection[head])


class Objective(nn.Module):
    """The heads with their loss: the module that is trained, on one device or on several."""

    def __init__(self, heads: DraftHeads, backbone: FrozenBackbone, *, loss: Loss, decay: float) -> None:
        super().__init__()
        self.heads = heads
        self._backbone = backbone
        self._loss = loss
        self._decay = decay

    def forward(self, batch: Examples) -> tuple[Tensor, Tensor]:
        """The loss to minimise [], and each head's own [K], detached."""
        losses = []
        for head, logits in enumerate(head_logits(self.heads, self._backbone, batch)):
            targets = self._backbone.rows(batch.targets[head])
            losses.append(self._head_loss(head, logits, targets, batch))
        own = torch.stack(losses)
        weights = self._decay ** torch.arange(len(losses), device=own.device)
        return (own * weights).sum(), own.detach()

    def _head_loss(self, head: int, logits: Tensor, targets: Tensor, batch: Examples) -> Tensor:
        counted = targets != IGNORE
        if self._loss is Loss.CROSS_ENTROPY:
            summed = nn.functional.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")
        else:
            assert batch.teachers is not None
            with torch.no_grad():
                teacher = torch.softmax(self._backbone.project(batch.teachers[head]).float(), dim=1)
            student = torch.log_softmax(logits.float(), dim=1)
            # Up to the teacher's own entropy, which no head can change.
            summed = (-(teacher * student).sum(dim=1)).where(counted, 0.0).sum()
        return summed / counted.sum().clamp(min=1)
