"""How often heads are right on text that they were not trained on.

Letters: n positions, K heads, V' tokens that can be drafted, M ranks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

from gorgon_engine.drafters.choices import top
from gorgon_engine.heads.families import DraftHeads
from gorgon_trainer.dataset import IGNORE
from gorgon_trainer.evaluation.predicted import predicted_acceptance_length
from gorgon_trainer.features import Examples
from gorgon_trainer.objective import FrozenBackbone, head_logits

NUM_RANKS = 10


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Over all held-out positions where a head has a target; heads that see drafted tokens are given the right ones."""

    accuracies: tuple[tuple[float, ...], ...]  # [K][M]: share of positions where the choice of that rank was right
    losses: tuple[float, ...]  # [K] mean cross-entropy, over the targets that can be drafted
    num_positions: int

    @classmethod
    def pooled(cls, parts: Sequence[Self]) -> Self:
        """Of several texts together, each by its positions. Of one: itself, to the bit."""
        if len(parts) == 1:
            return parts[0]
        positions = torch.tensor([float(part.num_positions) for part in parts], dtype=torch.float64)
        shares = positions / positions.sum()
        accuracies = torch.tensor([part.accuracies for part in parts], dtype=torch.float64)  # [parts, K, M]
        losses = torch.tensor([part.losses for part in parts], dtype=torch.float64)  # [parts, K]
        return cls(
            accuracies=tuple(tuple(row) for row in torch.tensordot(shares, accuracies, dims=1).tolist()),
            losses=tuple((shares @ losses).tolist()),
            num_positions=sum(part.num_positions for part in parts),
        )

    def acceptance_length(self, offsets: tuple[int, ...], num_nodes: int = 32) -> float:
        """Expected tokens a step of the best fixed tree of `num_nodes` rows, root included (2401.10774, s. 2.3.3)."""
        rows = [row for row, offset in zip(self.accuracies, offsets, strict=True) if offset > 1]
        return predicted_acceptance_length(rows, num_nodes)


@torch.no_grad()
def held_out(heads: DraftHeads, backbone: FrozenBackbone, batches: Iterable[Examples]) -> HeldOut:
    """Measure heads over the examples of held-out batches. A target that cannot be drafted counts as missed.

    The heads are in evaluation mode afterwards.
    """
    heads.eval()
    right = counts = losses = drafted = None
    for batch in batches:
        rows_right, rows_count, rows_loss, rows_drafted = [], [], [], []
        for head, logits in enumerate(head_logits(heads, backbone, batch)):
            wanted = backbone.rows(batch.targets[head])
            _, choices = top(logits.float(), NUM_RANKS)  # [n, M]
            hit = (choices == wanted[:, None]).sum(dim=0)
            rows_right.append(nn.functional.pad(hit, (0, NUM_RANKS - hit.numel())))
            rows_count.append((batch.targets[head] != IGNORE).sum())
            rows_loss.append(nn.functional.cross_entropy(logits.float(), wanted, ignore_index=IGNORE, reduction="sum"))
            rows_drafted.append((wanted != IGNORE).sum())
        here = [torch.stack(rows).double() for rows in (rows_right, rows_count, rows_loss, rows_drafted)]
        if right is None or counts is None or losses is None or drafted is None:
            right, counts, losses, drafted = here
        else:
            right, counts, losses, drafted = right + here[0], counts + here[1], losses + here[2], drafted + here[3]
    assert right is not None, "no held-out batch"
    assert counts is not None
    assert losses is not None
    assert drafted is not None
    return HeldOut(
        accuracies=tuple(tuple(row) for row in (right / counts.clamp(min=1)[:, None]).tolist()),
        losses=tuple((losses / drafted.clamp(min=1)).tolist()),
        num_positions=int(counts.max()),
    )
