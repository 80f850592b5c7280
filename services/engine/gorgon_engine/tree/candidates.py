"""Guesses of one drafter as a forest below the root, before they are merged and pruned into the tree to verify."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CandidateTree:
    """M candidate nodes a sequence, parents before children; invalid nodes are padding with log-probability -inf.

    `log_probs` is the drafter's own estimate that the whole path from the root to the node is what the backbone will
    say: never larger than the parent's, so that the best nodes always form a tree (OPT-Tree, 2406.17276).
    """

    tokens: Tensor  # [B, M] int64
    parents: Tensor  # [B, M] int64 index into the candidates, -1 = child of the root
    log_probs: Tensor  # [B, M] float32, of the path; -inf = padding
    ranks: Tensor  # [B, M] int64: place among its siblings in the drafter's own order, 0 = its first choice
    source: str  # the drafter's name
    # Where children were *drawn* from a distribution (Leviathan's rule needs it): draft_probs[b, draft_rows[b, m]] is
    # the distribution from which node m was drawn.
    draft_probs: Tensor | None = None  # [B, Q, V] float32
    draft_rows: Tensor | None = None  # [B, M] int64

    def spread(self, rows: Tensor, batch: int) -> "CandidateTree":
        """The trees of R sequences as rows [R] int64 of a larger batch; the others are padding."""

        def placed(values: Tensor, padding: float) -> Tensor:
            return values.new_full((batch, *values.shape[1:]), padding).index_copy_(0, rows, values)

        return CandidateTree(
            tokens=placed(self.tokens, 0),
            parents=placed(self.parents, -1),
            log_probs=placed(self.log_probs, -torch.inf),
            ranks=placed(self.ranks, 0),
            source=self.source,
            draft_probs=None if self.draft_probs is None else placed(self.draft_probs, 0),
            draft_rows=None if self.draft_rows is None else placed(self.draft_rows, 0),
        )
