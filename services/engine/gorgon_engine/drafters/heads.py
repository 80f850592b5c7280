"""Drafting with trained heads: one small pass over the hidden state that predicted the root.

Letters: B sequences, K depths (one head each), M choices a depth, C hidden size, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gorgon_engine.drafters.base import DraftContext
from gorgon_engine.heads.medusa import MedusaHeads, Projection
from gorgon_engine.random import Stream, gumbel_noise
from gorgon_engine.tree.builders import RankPath, Topology, dynamic
from gorgon_engine.tree.candidates import CandidateTree
from gorgon_protocol.errors import BadRequestError

_NUM_CHOICES = 10  # of each head that a dynamic tree picks from


class HeadsDrafter:
    """A tree of the heads' choices: of this step's likeliest paths, or of a fixed topology.

    With `draw` the children of a node are drawn from the head's distribution, without replacement, instead of being
    its likeliest tokens: what Leviathan's rule asks for (`AcceptanceRule.REJECTION`). The topology must then be fixed:
    a choice of nodes that looked at the drawn tokens would bias the rule.
    """

    name = "head"

    def __init__(
        self,
        heads: MedusaHeads,
        project: Projection,
        *,
        paths: Sequence[RankPath] | None = None,
        num_choices: int = _NUM_CHOICES,
        draw: bool = False,
    ) -> None:
        """heads: depth d of the tree is guessed by head d - 1. project: the backbone's, for heads that share it.

        paths: the rank paths of a fixed topology, parents first, best first; None = dynamic. Raises
        `BadRequestError` for paths that are no tree or deeper than there are heads, and for dynamic drawing.
        """
        if draw and paths is None:
            raise BadRequestError("drawn drafts need a fixed tree (sparse or cartesian): a dynamic one would bias them")
        self._heads = heads
        self._project = project
        self._draw = draw
        self._num_choices = num_choices
        self._topology: Topology | None = None
        if paths is not None:
            device = heads.weight.device
            ordered = _siblings_in_order(paths) if draw else list(paths)
            self._topology = Topology.of(ordered, device)
            if self._topology.max_depth > heads.num_heads:
                raise BadRequestError(
                    f"the tree is {self._topology.max_depth} deep: the heads guess {heads.num_heads} tokens ahead"
                )
            self._num_choices = self._topology.num_ranks
            # Only the order matters, and it must be that of the list whatever was drawn.
            self._place_log_probs = -torch.arange(1, len(ordered) + 1, device=device).log()

    @torch.inference_mode()
    def propose(self, context: DraftContext, max_nodes: int) -> CandidateTree:
        logits = self._heads(context.hidden, self._project).float()  # [B, K, V]
        if self._draw:
            return self._drawn(logits, context, max_nodes)
        # Ranked by logit: two logits may round to one log-probability, never the other way round.
        top, tokens = logits.topk(min(self._num_choices, logits.shape[2]), dim=2)  # [B, K, M]
        log_probs = top - logits.logsumexp(dim=2, keepdim=True)
        if self._topology is None:
            return dynamic(tokens, log_probs, max_nodes, source=self.name)
        return self._topology.place(tokens, log_probs, source=self.name)
