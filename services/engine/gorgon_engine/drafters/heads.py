"""Drafting with Medusa heads: one small pass over the hidden state that predicted the root.

Letters: B sequences, K depths (one head each), M choices a depth, N nodes (the root not counted), V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gorgon_engine.drafters.base import DraftContext
from gorgon_engine.drafters.choices import top_log_probs
from gorgon_engine.heads.medusa import MedusaHeads, Projection
from gorgon_engine.random import Stream, gumbel_noise
from gorgon_engine.tree.builders import RankPath, Topology, dynamic
from gorgon_engine.tree.candidates import CandidateTree
from gorgon_protocol.errors import BadRequestError

_NUM_CHOICES = 10  # of each head, for a dynamic tree to pick from


class HeadsDrafter:
    """A tree of the heads' likeliest tokens: this step's likeliest paths, or a fixed topology."""

    name = "head"
    is_costly = True

    def __init__(
        self,
        heads: MedusaHeads,
        project: Projection,
        *,
        paths: Sequence[RankPath] | None = None,
        num_choices: int = _NUM_CHOICES,
        draft_vocabulary: Tensor | None = None,
    ) -> None:
        """heads: head d - 1 guesses depth d of the tree. project: the backbone's, for heads that share it.
        draft_vocabulary: [V'] int64, the token of each row of the projections; None = all tokens.

        paths: the rank paths of a fixed topology, parents first, best first; None = dynamic. Raises
        `BadRequestError` for paths that are no tree or deeper than there are heads.
        """
        self._heads = heads
        self._project = project
        self._num_choices = num_choices
        self._draft_vocabulary = draft_vocabulary
        self._topology = None if paths is None else _topology(paths, heads)

    @torch.inference_mode()
    def propose(self, context: DraftContext, max_nodes: int) -> CandidateTree:
        logits = self._heads(context.hidden, self._project)  # [B, K, V]
        num_choices = self._num_choices if self._topology is None else self._topology.num_ranks
        best, tokens = top_log_probs(logits, num_choices)
        if self._draft_vocabulary is not None:
            tokens = self._draft_vocabulary[tokens]
        if self._topology is None:
            return dynamic(tokens, best, max_nodes, source=self.name)
        return self._topology.place(tokens, best, max_nodes=max_nodes, source=self.name)


class DrawnHeadsDrafter:
    """A fixed topology whose children are *drawn* from the heads' distributions, without replacement: the drafts that
    Leviathan's rule (`AcceptanceRule.REJECTION`) is for. Under target sampling they are exact too, only worse.

    Which nodes are verified must not depend on the tokens drawn, else the rule is biased: so the topology is fixed, and
    the log-probabilities, by which trees are cut, are functions of the node's place alone. All nodes of a depth share
    one draw, which the rule allows: a walk visits one of them.
    """

    name = "head"
    is_costly = True

    def __init__(
        self,
        heads: MedusaHeads,
        project: Projection,
        *,
        paths: Sequence[RankPath],
        accuracies: Sequence[Sequence[float]] | None = None,
        draft_vocabulary: Tensor | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """paths: as for `HeadsDrafter`, and every sibling behind the one of the rank before. accuracies: [K][M], how
        often each rank is right, to estimate path probabilities with; None = halving with every rank. vocab_size: of
        the backbone, needed with a draft_vocabulary.

        Raises `BadRequestError` for paths that are no such tree or deeper than there are heads.
        """
        listed: set[RankPath] = set()
        for path in paths:
            if path and path[-1] > 0 and (*path[:-1], path[-1] - 1) not in listed:
                raise BadRequestError(f"drawn drafts: tree path {list(path)} comes before its sibling of lower rank")
            listed.add(tuple(path))
        self._heads = heads
        self._project = project
        assert draft_vocabulary is None or vocab_size is not None
        self._draft_vocabulary = draft_vocabulary
        self._vocab_size = vocab_size
        self._topology = _topology(paths, heads)
        estimates = torch.tensor([_estimate(path, accuracies) for path in paths], device=heads.weight.device)
        # In the order of the list, whatever the estimates: a cut then leaves a prefix of it.
        self._log_probs = estimates.log().cummin(dim=0).values  # [N]

    @torch.inference_mode()
    def propose(self, context: DraftContext, max_nodes: int) -> CandidateTree:
        probs = torch.softmax(self._heads(context.hidden, self._project).float(), dim=2)  # [B, K, V]
        if self._draft_vocabulary is not None and self._vocab_size is not None:
            # The rule compares distributions over all tokens.
            whole = probs.new_zeros((*probs.shape[:2], self._vocab_size))
            probs = whole.index_copy_(2, self._draft_vocabulary, probs)
        depths = torch.arange(1, probs.shape[1] + 1, device=probs.device)
        positions = context.history_lengths[:, None] + depths - 1  # [B, K], of the guessed tokens
        noise = gumbel_noise(context.seeds[:, None], positions, probs.shape[2], Stream.DRAFT)
        # The first M of a Gumbel race are M draws without replacement, in order (Kool et al., 1903.06059).
        keys, tokens = (probs.log() + noise).topk(self._topology.num_ranks, dim=2)  # [B, K, M]
        # A distribution of fewer tokens than that runs out: no draw, no node.
        drawn = torch.zeros_like(keys).masked_fill(keys == -torch.inf, -torch.inf)
        tree = self._topology.place(tokens, drawn, max_nodes=max_nodes, source=self.name)
        levels = self._topology.levels[:max_nodes]
        return replace(
            tree,
            log_probs=tree.log_probs + self._log_probs[:max_nodes],
            draft_probs=probs,
            draft_rows=levels.expand_as(tree.tokens),
        )


def _topology(paths: Sequence[RankPath], heads: MedusaHeads) -> Topology:
    topology = Topology.of(paths, heads.weight.device)
    if topology.max_depth > heads.num_heads:
        raise BadRequestError(
            f"the tree is {topology.max_depth} deep: the heads guess {heads.num_heads} tokens beyond the next"
        )
    return topology


def _estimate(path: RankPath, accuracies: Sequence[Sequence[float]] | None) -> float:
    estimate = 1.0
    for depth, rank in enumerate(path):
        row = accuracies[depth] if accuracies is not None else ()
        # Never zero, which would be padding: a rank that was never right may still be drawn and verified.
        estimate *= max(row[rank] if rank < len(row) else 0.0, 1e-4) if row else 2.0 ** -(rank + 1)
    return estimate
