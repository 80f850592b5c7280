"""Drafting with an EAGLE head on a GPU: the search of `drafters/eagle.py` in few launches of fixed shapes.

The layer is run in two halves. *Up to its attention* (both inputs, keys, values, query) it runs for every committed
position when that is told (`observe`): all rows of a step in one pass over two matrices. The last of these rows is the
one that the next draft begins with, so it is kept in its slot, and the draft goes on with the second half: what is
remembered costs no pass of its own.

A draft is one pass for each depth, W paths as W rows of it. The beam's paths are a tree: their keys and values lie
behind the committed ones, in the scratch of the drafter's own cache, and an ancestor word of 64 bits says what each row
attends to, so that the verification's own kernel (`tree_attention`) serves. Nothing is read by the host, no shape
depends on a value, and all that is remembered lies in tensors indexed by slot: a CUDA graph may hold any part of it.

Letters: B sequences, E rows of a sequence, R rows of all, W paths, M choices a path, N nodes, S slots, G KV heads, H
query heads, P positions of a slot, D head dimension, C hidden size, V tokens that can be drafted.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.drafters.base import Committed, DraftContext
from gorgon_engine.drafters.beam import BeamLimits
from gorgon_engine.drafters.choices import top_log_probs
from gorgon_engine.heads.eagle import EagleHead
from gorgon_engine.heads.eagle_layer import EagleLayer
from gorgon_engine.kernels.triton.eagle_beam import BeamPaths, FoundNodes, eagle_beam
from gorgon_engine.kernels.triton.eagle_inputs import eagle_inputs
from gorgon_engine.kernels.triton.eagle_keep import eagle_keep
from gorgon_engine.kernels.triton.eagle_tree import eagle_tree
from gorgon_engine.kernels.triton.rms_norm import add_rms_norm
from gorgon_engine.kernels.triton.rope_append import rope_append
from gorgon_engine.kernels.triton.silu_mul import silu_mul
from gorgon_engine.kernels.triton.tree_attention import tree_attention
from gorgon_engine.kernels.triton.tree_attention_plan import (
    HEAD_DIMS,
    TreeAttentionPlan,
    TreeAttentionWorkspace,
    check_dtype,
)
from gorgon_engine.models.linear import DenseLinear
from gorgon_engine.tree.candidates import CandidateTree
from gorgon_protocol.errors import ModelError

SCRATCH = 64  # rows of a draft behind the committed positions: one ancestor word
_MAX_ROWS = 64  # of a pass: what a product costs no more for
_MIN_WIDTH = 2
_MAX_DRAFT_TOKENS = 16384  # every depth reads the projection to them
_VERIFYING = 1.1  # steps of plain decoding that a tree costs to verify
_RANKS_BELOW = 3


@dataclass(frozen=True, slots=True)
class Level:
    """One depth of the search: everything about it that follows from sizes."""

    num_paths: int  # W, looked below
    num_choices: int  # M
    num_kept: int  # nodes
    first_node: int
    width: int  # paths that go on
    first_row: int  # of their keys and values in the scratch


def plan_levels(*, num_depths: int, limits: BeamLimits, max_nodes: int, vocab_size: int, batch: int) -> list[Level]:
    """The depths of a draft of `max_nodes` nodes a sequence.

    As `beam.likeliest_tree` takes them, but no wider than the scratch holds, and for many sequences no wider than the
    rows that one pass has room for.
    """
    width = min(limits.width, max(_MAX_ROWS // batch, _MIN_WIDTH))
    if num_depths > 1:
        width = max(min(width, SCRATCH // (num_depths - 1)), 1)
    num_choices = min(limits.num_choices, vocab_size)
    levels: list[Level] = []
    num_paths, first_node, first_row = 1, 0, 0
    for depth in range(1, num_depths + 1):
        num_kept = min(max_nodes, num_paths * num_choices)
        going_on = 0 if depth == num_depths else min(width, num_kept)
        levels.append(Level(num_paths, num_choices, num_kept, first_node, going_on, first_row))
        first_node += num_kept
        first_row += going_on
        num_paths = going_on
    return levels


@dataclass(frozen=True, slots=True, eq=False)
class _Memory:
    """What is known of the sequences in S slots."""

    keys: Tensor  # [S, G, P + SCRATCH, D]
    values: Tensor  # [S, G, P + SCRATCH, D]
    x: Tensor  # [S, C] float32: the layer's input at the last true feature,
    query: Tensor  # [S, H, D]: and its query
    cos: Tensor  # [positions, D/2] float32
    sin: Tensor  # [positions, D/2] float32

    @classmethod
    def of(cls, head_angles: tuple[Tensor, Tensor], layer: EagleLayer, num_slots: int, num_positions: int) -> Self:
        shape, gain = layer.shape, layer.norm
        # Zeros, not empty: masked attention multiplies stale rows by zero, and 0 * NaN is NaN.
        keys = gain.new_zeros(num_slots, shape.num_kv_heads, num_positions + SCRATCH, shape.head_dim)
        return cls(
            keys=keys,
            values=torch.zeros_like(keys),
            x=gain.new_zeros(num_slots, shape.hidden_size, dtype=torch.float32),
            query=gain.new_zeros(num_slots, shape.num_query_heads, shape.head_dim),
            cos=head_angles[0],
            sin=head_angles[1],
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """R rows of the layer, before they attend; their keys and values are in the memory."""

    x: Tensor  # [R, C] float32: the residual stream
    query: Tensor  # [R, H, D]


class EagleGpuDrafter:
    """A tree of the head's likeliest continuations, as `EagleDrafter` makes it."""

    name = "head"
    is_costly = True

    def __init__(
        self,
        layer: EagleLayer,
        *,
        angles: Callable[[Tensor], tuple[Tensor, Tensor]],
        embed: Callable[[Tensor], Tensor],
        vocab_size: int,
        draft_vocabulary: Tensor | None = None,
        limits: BeamLimits | None = None,
        num_depths: int | None = None,
    ) -> None:
        """angles: positions [P] -> cosines and sines [P, D/2] float32. embed: tokens [R] -> embeddings [R, C].
        draft_vocabulary: [V] int64, the token of each row of the layer's projection; None = all tokens. vocab_size: V.
        num_depths: None = as deep as the head drafts. limits: `min_path_prob` is for CPUs alone.

        It drafts once it has a memory: see `for_slots`.
        """
        self._layer = layer
        self._angles = angles
        self._embed = embed
        self._vocab_size = vocab_size
        self._vocabulary = draft_vocabulary
        self._limits = limits or BeamLimits()
        self.num_depths = min(num_depths or layer.shape.num_heads, layer.shape.num_heads, SCRATCH + 1)
        self._memory: _Memory | None = None

    def for_slots(self, num_slots: int, num_positions: int) -> Self:
        """As `StatefulDrafter.for_slots`; the weights are shared."""
        drafter = copy.copy(self)
        positions = torch.arange(num_positions + SCRATCH, device=self._layer.norm.device)
        drafter._memory = _Memory.of(self._angles(positions), self._layer, num_slots, num_positions)
        return drafter

    @torch.inference_mode()
    def observe(self, committed: Committed) -> None:
        """As `StatefulDrafter.observe`; at once, so that nothing waits between two CUDA graphs."""
        memory = self._memory
        assert memory is not None, "a drafter observes the sequences of the slots that it was made for"
        rows = self._until_attention(
            memory,
            committed.hidden.flatten(0, 1).contiguous(),
            committed.next_tokens.flatten(),
            slots=committed.slots,
            starts=committed.starts.contiguous(),
            is_chain=True,
        )
        eagle_keep(rows.x, rows.query, committed.slots, committed.counts, memory.x, memory.query)

    @torch.inference_mode()
    def propose(self, context: DraftContext, max_nodes: int) -> CandidateTree:
        """As `Drafter.propose`; the positions before the root have been observed, and the last of them last."""
        memory, slots = self._memory, context.slots
        assert memory is not None, "a drafter drafts for the slots that it was made for"
        assert slots is not None
        batch, device = slots.shape[0], slots.device
        levels = plan_levels(
            num_depths=self.num_depths, limits=self._limits, max_nodes=max_nodes, vocab_size=self._vocab_size,
            batch=batch,
        )  # fmt: skip
        lengths = context.history_lengths - 1  # [B] true features
        attend = _Attention.of(memory, levels, lengths, slots, max_length=context.history.shape[1])
        found = FoundNodes.empty(batch, levels[-1].first_node + levels[-1].num_kept, device)
        # The root's row: no word of its own, its keys and values are true ones.
        no_words = torch.zeros((batch, 1, 1), dtype=torch.int64, device=device)
        features = self._after_attention(
            _Rows(memory.x.index_select(0, slots), memory.query.index_select(0, slots)), attend, no_words
        )
        paths: BeamPaths | None = None
        for depth, level in enumerate(levels, start=1):
            if paths is not None:
                rows = self._until_attention(
                    memory, features, paths.tokens, slots=slots, starts=lengths, paths=paths.rows, offset=depth - 2,
                    place_offset=levels[depth - 2].first_row,
                )  # fmt: skip
                features = self._after_attention(rows, attend, paths.words)
            log_probs, choices = top_log_probs(self._layer.projection(features)[0], level.num_choices)
            shape = (batch, level.num_paths, level.num_choices)
            paths = eagle_beam(
                log_probs.view(shape), choices.view(shape), paths, found, vocabulary=self._vocabulary,
                first_node=level.first_node, num_kept=level.num_kept, width=level.width, first_bit=level.first_row,
            )  # fmt: skip
        tree = eagle_tree(found, max_nodes)
        return CandidateTree(tree.tokens, tree.parents, tree.log_probs, tree.ranks, source=self.name)

    def _until_attention(
        self, memory: _Memory, features: Tensor, tokens: Tensor, *,
        slots: Tensor, starts: Tensor, paths: Tensor | None = None, offset: int = 0, place_offset: int = 0,
        is_chain: bool = False,
    ) -> _Rows:  # fmt: skip
        """features: [F, C]; tokens: [R] behind them; the rest as `eagle_inputs` takes it."""
        layer, shape = self._layer, self._layer.shape
        given = eagle_inputs(
            features, self._embed(tokens), starts,
            feature_gain=layer.feature_norm, embedding_gain=layer.embedding_norm, cos=memory.cos, sin=memory.sin,
            eps=shape.norm_eps, paths=paths, offset=offset, place_offset=place_offset, is_chain=is_chain,
        )  # fmt: skip
        x = given.residual
        normed = self._normed(x, layer.fc(given.inputs), layer.attention_norm)
        query = normed.new_empty(x.shape[0], shape.num_query_heads, shape.head_dim)
        rope_append(
            layer.qkv(normed), given.cos, given.sin, slots=slots, lengths=given.places, keys=memory.keys,
            values=memory.values, query=query,
        )  # fmt: skip
        return _Rows(x, query)

    def _after_attention(self, rows: _Rows, attend: "_Attention", words: Tensor) -> Tensor:
        """The features [R, C] that the rows predict. words: [B, R / B, 1] int64; rows.x is used up."""
        layer = self._layer
        attended = attend(rows.query, words)
        normed = self._normed(rows.x, layer.o(attended), layer.mlp_norm)
        gated = normed.new_empty(normed.shape[0], layer.shape.intermediate_size)
        silu_mul(layer.gate_up(normed), gated)
        return self._normed(rows.x, layer.down(gated), layer.norm)

    def _normed(self, x: Tensor, partials: Tensor, gain: Tensor) -> Tensor:
        """norm(x + the sum of partials) in the layer's dtype; x is changed."""
        normed = torch.empty(x.shape, dtype=self._layer.dtype, device=x.device)
        add_rms_norm(x, partials, gain, self._layer.shape.norm_eps, normed)
        return normed


@dataclass(frozen=True, slots=True, eq=False)
class _Attention:
    """Attention of one draft's rows, which share a prefix and a workspace."""

    memory: _Memory
    slots: Tensor  # [B] int64
    lengths: Tensor  # [B] int64
    plans: dict[int, TreeAttentionPlan]  # by W
    workspace: TreeAttentionWorkspace

    @classmethod
    def of(cls, memory: _Memory, levels: list[Level], lengths: Tensor, slots: Tensor, *, max_length: int) -> Self:
        num_heads, head_dim = memory.query.shape[1:]
        num_kv_heads, num_positions = memory.keys.shape[1:3]
        plans = {
            width: TreeAttentionPlan.fast(
                num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, batch=slots.shape[0],
                num_nodes=width, max_length=min(max_length, num_positions - SCRATCH), max_depth=len(levels),
                device=slots.device,
            )
            for width in {level.num_paths for level in levels}
        }  # fmt: skip
        workspace = TreeAttentionWorkspace.of(list(plans.values()), slots.device)
        return cls(memory, slots, lengths, plans, workspace)

    def __call__(self, query: Tensor, words: Tensor) -> Tensor:
        """query: [B W, H, D]; words: [B, W, 1] int64 -> [B W, H D]."""
        batch, width = words.shape[:2]
        out = tree_attention(
            query.view(batch, width, *query.shape[1:]), self.memory.keys, self.memory.values, self.slots, self.lengths,
            words, plan=self.plans[width], workspace=self.workspace,
        )  # fmt: skip
        return out.view(batch * width, -1)


def drafter_of(
    head: EagleHead, backbone: Backbone, draft_vocabulary: Tensor | None, *,
    four_bit: bool, num_depths: int, limits: BeamLimits | None = None,
) -> EagleGpuDrafter:  # fmt: skip
    """The drafter of a head that reads the backbone's embeddings and lm_head, its matrices packed (and used up).

    draft_vocabulary: [V] int64, ascending, None = all tokens; the most frequent of them are drafted, as many as pay:
    tokenizers number those first. four_bit: the layer and the projection in NF4. Call
    `refusal` first.
    """
    lm_head = backbone.lm_head
    assert isinstance(lm_head, DenseLinear)
    if draft_vocabulary is None and lm_head.out_features > _MAX_DRAFT_TOKENS:
        draft_vocabulary = torch.arange(_MAX_DRAFT_TOKENS, device=backbone.device)
    if draft_vocabulary is not None:
        draft_vocabulary = draft_vocabulary[:_MAX_DRAFT_TOKENS].contiguous()
    projection = lm_head if draft_vocabulary is None else lm_head.select_outputs(draft_vocabulary)
    angles = angle_tables(head)
    return EagleGpuDrafter(
        EagleLayer.pack(head, projection, four_bit=four_bit),
        angles=angles,
        embed=backbone.embed,
        vocab_size=projection.out_features,
        draft_vocabulary=draft_vocabulary,
        limits=limits,
        num_depths=num_depths,
    )


def refusal(head: EagleHead, backbone: Backbone) -> str | None:
    """Why the kernels cannot run a head behind a backbone, as the end of a sentence; None where they can."""
    if head.shape.head_dim not in HEAD_DIMS:
        return f"its head dim is {head.shape.head_dim}, and the kernels know {' and '.join(map(str, HEAD_DIMS))}"
    if not isinstance(backbone.lm_head, DenseLinear):
        return "the backbone's lm_head is quantised"
    try:
        check_dtype(head.norm.dtype)
    except ModelError as error:
        return str(error)
    return None


def profitable_depths(accuracies: Sequence[Sequence[float]], *, pass_share: float) -> int:
    """How deep to draft for the most tokens a second, by what a head was measured to guess right.

    accuracies: [K][M], the share of positions where the depth's choice of that rank was right, given what is above it.
    pass_share: what one depth costs, in steps of plain decoding.
    """
    reached = tokens = 1.0
    cost = _VERIFYING
    best, depths = 0.0, 1
    for depth, ranks in enumerate(accuracies, start=1):
        # Few paths go on, and of those the first choices are what a budget of nodes is spent on.
        reached *= min(sum(sorted(ranks, reverse=True)[:_RANKS_BELOW]), 1.0)
        tokens, cost = tokens + reached, cost + pass_share
        if tokens / cost > best:
            best, depths = tokens / cost, depth
    return depths


def angle_tables(head: EagleHead) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Of a head: positions [P] -> cosines and sines [P, D/2] float32."""
    shape = EagleHead(head.shape, device="meta")  # keeps no weights alive

    def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
        made = shape.angles(positions[None])
        return made.cos[0].contiguous(), made.sin[0].contiguous()

    return angles
