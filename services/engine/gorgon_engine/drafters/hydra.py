"""Drafting with sequentially dependent heads (Hydra, 2402.05109): depth by depth, each guess seeing those above it.

The search is `drafters/beam.py`'s; on native CPU kernels it is one call (`kernels/cpu/hydra.py`).

Letters: B sequences, W paths in the beam, M choices a path, C hidden size, V tokens that can be drafted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gorgon_engine.drafters.base import DraftContext
from gorgon_engine.drafters.beam import BeamLimits, FixedTree, likeliest_tree
from gorgon_engine.drafters.choices import top_log_probs
from gorgon_engine.heads.hydra import HydraHeads, Projection
from gorgon_engine.kernels.cpu.hydra import NativeHydra
from gorgon_engine.tree.builders import RankPath
from gorgon_engine.tree.candidates import CandidateTree


@dataclass(frozen=True, slots=True, eq=False)
class _Network:
    """The heads between the backbone's embeddings and its projection."""

    heads: HydraHeads
    embed: Callable[[Tensor], Tensor]
    project: Projection | None
    draft_vocabulary: Tensor | None
    dtype: torch.dtype

    def begin(self, context: DraftContext) -> "_Beam":
        hidden = context.hidden[:, None].to(self.dtype)  # [B, 1, C]
        conditions = torch.cat([self.heads.condition(hidden), self.condition(context.root_tokens[:, None])], dim=2)
        return _Beam(self, hidden, conditions, depth=1)

    def condition(self, tokens: Tensor) -> Tensor:
        return self.heads.condition(self.embed(tokens).to(self.dtype))


@dataclass(frozen=True, slots=True, eq=False)
class _Beam:
    network: _Network
    hidden: Tensor  # [B, 1, C]
    conditions: Tensor  # [B, W, (1 + depth) C]
    depth: int  # of the tokens that are chosen next

    def choices(self, count: int) -> tuple[Tensor, Tensor]:
        heads, vocabulary = self.network.heads, self.network.draft_vocabulary
        wide = self.hidden.expand(-1, self.conditions.shape[1], -1)
        logits = heads.project(self.depth, heads.features(self.depth, wide, self.conditions), self.network.project)
        log_probs, places = top_log_probs(logits, count)
        return log_probs, places if vocabulary is None else vocabulary[places]

    def extend(self, parents: Tensor, tokens: Tensor) -> "_Beam":
        upper = self.conditions.gather(1, parents[:, :, None].expand(-1, -1, self.conditions.shape[2]))
        conditions = torch.cat([upper, self.network.condition(tokens)], dim=2)
        return _Beam(self.network, self.hidden, conditions, self.depth + 1)


class HydraDrafter:
    """A tree of the heads' likeliest continuations: this step's likeliest paths, or a fixed topology."""

    name = "head"
    is_costly = True

    def __init__(
        self,
        heads: HydraHeads,
        *,
        embed: Callable[[Tensor], Tensor],
        project: Projection | None = None,
        draft_vocabulary: Tensor | None = None,
        paths: Sequence[RankPath] | None = None,
        limits: BeamLimits | None = None,
        native: NativeHydra | None = None,
    ) -> None:
        """embed: tokens [...] -> embeddings [..., C]. project: features [..., C] -> logits [..., V], for heads that
        share the backbone's projection. draft_vocabulary: [V] int64, the token of each row of the projections; None =
        all tokens. paths: the rank paths of a fixed topology, parents first, best first; None = dynamic. native: the
        same heads, embeddings and projection, for the dynamic search in one call; None = with tensor operations.

        Raises `BadRequestError` for paths that are no tree or deeper than there are heads.
        """
        assert native is None or paths is None
        # Packed for the native kernels, they have no parameters of their own and take float32.
        dtype = next((parameter.dtype for parameter in heads.heads.parameters()), torch.float32)
        self._network = _Network(heads, embed, project, draft_vocabulary, dtype)
        self._native = native
        self._limits = limits or BeamLimits()
        self._fixed = None if paths is None else FixedTree(paths, num_depths=heads.num_heads)

    @torch.inference_mode()
    def propose(self, context: DraftContext, max_nodes: int) -> CandidateTree:
        if self._native is not None:
            return self._in_one_call(self._native, context, max_nodes)
        beam = self._network.begin(context)
        if self._fixed is not None:
            return self._fixed.follow(beam, context.root_tokens, max_nodes=max_nodes, source=self.name)
        return likeliest_tree(
            beam, num_depths=self._network.heads.num_heads, limits=self._limits, max_nodes=max_nodes, source=self.name
        )

    def _in_one_call(self, native: NativeHydra, context: DraftContext, max_nodes: int) -> CandidateTree:
        trees = native.draft(
            context.hidden.float().contiguous(),
            context.root_tokens.contiguous(),
            max_nodes=max_nodes,
            num_choices=self._limits.num_choices,
            width=self._limits.width,
            min_path_prob=self._limits.min_path_prob,
        )
        return CandidateTree(**trees._asdict(), source=self.name)
