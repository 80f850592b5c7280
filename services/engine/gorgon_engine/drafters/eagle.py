"""Drafting with an EAGLE head (2401.15077): a decoder layer that runs behind the committed text, a beam of paths deep.

The layer's keys and values of every committed position stay in a cache of its own, laid out as the backbone's. They
follow from each position's inputs alone (there is one layer), so that what is committed is remembered in one batched
projection, and no state depends on how the text was split into steps.

On a CPU, where a step in which nothing is drafted must cost next to nothing, what was committed waits until a draft
needs it; what another sequence in the same slot has outlived by then is never computed. On native kernels the dynamic
search is one call, and so is what is remembered (`kernels/cpu/eagle.py`).

Letters: B sequences, E rows of a sequence, R rows of all of them, W paths in the beam, M choices or positions, S slots,
G KV heads, P positions of a slot, D head dimension, C hidden size, V tokens that can be drafted.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from gorgon_engine.drafters.base import Committed, DraftContext
from gorgon_engine.drafters.beam import BeamLimits, FixedTree, likeliest_tree
from gorgon_engine.drafters.choices import top_log_probs
from gorgon_engine.heads.eagle import Angles, EagleHead, Paths, Prefix, Projection
from gorgon_engine.kernels.cpu.eagle import NativeEagle, NativeEagleMemory
from gorgon_engine.tree.builders import RankPath
from gorgon_engine.tree.candidates import CandidateTree

_MAX_WAITING_ROWS = 4096


@dataclass(frozen=True, slots=True, eq=False)
class _Network:
    """The head between the backbone's embeddings and its projection."""

    head: EagleHead
    embed: Callable[[Tensor], Tensor]
    project: Projection | None
    draft_vocabulary: Tensor | None

    def inputs(self, features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Features and the embeddings of the tokens behind them, [..., C] each, as the head takes them."""
        dtype = self.head.norm.dtype
        return features.to(dtype), self.embed(tokens).to(dtype)

    def choices(self, features: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The likeliest tokens at predicted features [B, W, C]: log-probabilities and tokens [B, W, M]."""
        assert self.project is not None, "what searches with tensor operations needs the backbone's projection"
        log_probs, places = top_log_probs(self.project(features), count)
        return log_probs, places if self.draft_vocabulary is None else self.draft_vocabulary[places]


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Positions to be remembered, no place twice."""

    slots: Tensor  # [R] int64
    positions: Tensor  # [R] int64
    hidden: Tensor  # [R, C]
    next_tokens: Tensor  # [R] int64

    @classmethod
    def of(cls, committed: Committed, wanted: Tensor | None = None) -> Self:
        """wanted: [B] bool, sequences that are still there; on a CPU. None = all."""
        device = committed.hidden.device
        steps = torch.arange(committed.hidden.shape[1], device=device)
        positions = committed.starts[:, None] + steps  # [B, E]
        slots = committed.slots[:, None].expand_as(positions)
        parts = (slots, positions, committed.hidden, committed.next_tokens)
        if device.type != "cpu":
            return cls(*(part.flatten(0, 1) for part in parts))  # of one shape, padding and all
        real = steps < committed.counts[:, None]
        real = real if wanted is None else real & wanted[:, None]
        return cls(*(part[real] for part in parts))

    @classmethod
    def of_all(cls, several: Sequence["_Waiting"], tenants: Tensor) -> Self:
        """Those of the sequences that have the slots now: [S]. They share no place."""
        rows = [
            cls.of(one.committed, None if one.tenants is None else one.tenants == tenants[one.committed.slots])
            for one in several
        ]
        if len(rows) == 1:
            return rows[0]
        names = ("slots", "positions", "hidden", "next_tokens")
        return cls(*(torch.cat([getattr(part, name) for part in rows]) for name in names))

    def as_committed(self) -> Committed:
        """Each as a stretch of its own."""
        counts = torch.ones_like(self.positions)
        return Committed(self.slots, self.positions, self.hidden[:, None], self.next_tokens[:, None], counts)


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """What is not remembered yet."""

    committed: Committed
    tenants: Tensor | None  # [B] int64, whose it is; None on a GPU, where nothing waits


class _Memory:
    """The keys and values of S slots, and what waits to become such."""

    def __init__(self, zeros: Tensor) -> None:
        # Zeros, not empty: masked attention multiplies stale rows by zero, and 0 * NaN is NaN.
        self.keys = zeros  # [S, G, P, D]
        self.values = zeros.clone()  # [S, G, P, D]
        self.native: NativeEagleMemory | None = None  # the same, for native calls
        self.waiting: list[_Waiting] = []
        self.num_waiting = 0  # rows, padding counted
        self.tenants = torch.zeros(zeros.shape[0], dtype=torch.int64)  # [S] sequences that each slot has had

    def drop_outlived(self) -> None:
        """Keep of what waits only what concerns the sequences that have the slots now."""
        rows = _Rows.of_all(self.waiting, self.tenants).as_committed()
        self.waiting = [_Waiting(rows, self.tenants[rows.slots])]
        self.num_waiting = rows.next_tokens.numel()

    @classmethod
    def of(cls, head: EagleHead, native: NativeEagle | None, num_slots: int, num_positions: int) -> Self:
        shape, gain = head.shape, head.norm
        sizes = (num_slots, shape.num_kv_heads, num_positions, shape.head_dim)
        dtype = gain.dtype if native is None else native.memory_dtype
        memory = cls(torch.zeros(sizes, dtype=dtype, device=gain.device))
        if native is not None:
            angles = head.angles(torch.arange(num_positions + native.max_depth)[None])
            memory.native = NativeEagleMemory(native, memory.keys, memory.values, angles.cos[0], angles.sin[0])
        return memory


class EagleDrafter:
    """A tree of the head's likeliest continuations: this step's likeliest paths, or a fixed topology."""

    name = "head"
    is_costly = True

    def __init__(
        self,
        head: EagleHead,
        *,
        embed: Callable[[Tensor], Tensor],
        project: Projection | None = None,
        draft_vocabulary: Tensor | None = None,
        paths: Sequence[RankPath] | None = None,
        limits: BeamLimits | None = None,
        native: NativeEagle | None = None,
    ) -> None:
        """embed: tokens [...] -> embeddings [..., C]. project: features [..., C] -> logits [..., V], the backbone's.
        draft_vocabulary: [V] int64, the token of each row of the projection; None = all tokens. paths: the rank paths
        of a fixed topology, parents first, best first; None = dynamic. native: the same head, embeddings and
        projection, for the dynamic search in one call; None = with tensor operations.

        It drafts once it has a memory: see `for_slots`. Raises `BadRequestError` for paths that are no tree or deeper
        than the head drafts.
        """
        assert native is None or paths is None
        assert native is not None or project is not None
        self._network = _Network(head, embed, project, draft_vocabulary)
        self._native = native
        self._fixed = None if paths is None else FixedTree(paths, num_depths=head.num_heads)
        self._limits = limits or BeamLimits()
        self._memory: _Memory | None = None

    def for_slots(self, num_slots: int, num_positions: int) -> Self:
        """As `StatefulDrafter.for_slots`; the weights are shared."""
        drafter = copy.copy(self)
        drafter._memory = _Memory.of(self._network.head, self._native, num_slots, num_positions)
        return drafter

    @torch.inference_mode()
    def observe(self, committed: Committed) -> None:
        """As `StatefulDrafter.observe`. Rows that would lie behind the last position must be padding."""
        memory = self._memory
        assert memory is not None, "a drafter observes the sequences of the slots that it was made for"
        if committed.hidden.device.type != "cpu":
            memory.waiting.append(_Waiting(committed, None))
            self._remember(memory)
            return
        memory.tenants[committed.slots] += committed.starts == 0
        memory.waiting.append(_Waiting(committed, memory.tenants[committed.slots]))
        memory.num_waiting += committed.next_tokens.numel()
        if memory.num_waiting >= _MAX_WAITING_ROWS:
            memory.drop_outlived()
            if memory.num_waiting > _MAX_WAITING_ROWS // 2:
                self._remember(memory)

    def _remember(self, memory: _Memory) -> None:
        """Compute the keys and values of what waits."""
        waiting = memory.waiting
        if not waiting:
            return
        if memory.native is None:
            self._remember_rows(memory, _Rows.of_all(waiting, memory.tenants))
        else:
            # One alone, as after every step that drafts, is taken as it is.
            alone = len(waiting) == 1
            committed = waiting[0].committed if alone else _Rows.of_all(waiting, memory.tenants).as_committed()
            memory.native.observe(
                slots=committed.slots,
                starts=committed.starts,
                counts=committed.counts,
                hidden=committed.hidden.float().contiguous(),
                next_tokens=committed.next_tokens.contiguous(),
            )
        waiting.clear()
        memory.num_waiting = 0

    def _remember_rows(self, memory: _Memory, rows: _Rows) -> None:
        head = self._network.head
        features, embeddings = self._network.inputs(rows.hidden, rows.next_tokens)
        made = head.rows(features[:, None, None], embeddings[:, None, None], head.angles(rows.positions[:, None]))
        # [R] over dims 0 and 2 put it first, which is how the rows come.
        memory.keys[rows.slots, :, rows.positions] = made.keys[:, 0, 0]
        memory.values[rows.slots, :, rows.positions] = made.values[:, 0, 0]

    @torch.inference_mode()
    def propose(self, context: DraftContext, max_nodes: int) -> CandidateTree:
        """As `Drafter.propose`; the positions before the root have been observed."""
        memory = self._memory
        assert memory is not None, "a drafter drafts for the slots that it was made for"
        assert context.slots is not None
        self._remember(memory)
        if memory.native is not None:
            return self._in_one_call(memory.native, context, context.slots, max_nodes)
        beam = self._begin(memory, context, context.slots)
        if self._fixed is not None:
            return self._fixed.follow(beam, context.root_tokens, max_nodes=max_nodes, source=self.name)
        return likeliest_tree(
            beam, num_depths=self._network.head.num_heads, limits=self._limits, max_nodes=max_nodes, source=self.name
        )

    def _in_one_call(
        self, memory: NativeEagleMemory, context: DraftContext, slots: Tensor, max_nodes: int
    ) -> CandidateTree:
        trees = memory.draft(
            slots=slots,
            lengths=context.history_lengths,
            hidden=context.hidden.float().contiguous(),
            root_tokens=context.root_tokens.contiguous(),
            max_nodes=max_nodes,
            num_choices=self._limits.num_choices,
            width=self._limits.width,
            min_path_prob=self._limits.min_path_prob,
        )
        return CandidateTree(**trees._asdict(), source=self.name)

    def _begin(self, memory: _Memory, context: DraftContext, slots: Tensor) -> "_Beam":
        """The layer's step at the last committed position, whose next token is the root."""
        head = self._network.head
        last = (context.history_lengths - 2)[:, None]  # [B, 1]
        num_positions = min(context.history.shape[1], memory.keys.shape[2])
        seen = torch.arange(num_positions, device=last.device) <= last  # [B, M]
        prefix = Prefix(
            keys=memory.keys[:, :, :num_positions].index_select(0, slots),
            values=memory.values[:, :, :num_positions].index_select(0, slots),
            mask=seen[:, None],
        )
        angles = head.angles(last + torch.arange(head.num_heads, device=last.device))  # of all depths
        features, embeddings = self._network.inputs(context.hidden[:, None], context.root_tokens[:, None])
        rows = head.rows(features[:, :, None], embeddings[:, :, None], angles.at(0))
        return _Beam(self._network, prefix, head.begin(rows, prefix), angles, depth=0)


@dataclass(frozen=True, slots=True, eq=False)
class _Beam:
    network: _Network
    prefix: Prefix
    paths: Paths  # [B, 1, W] of them
    angles: Angles  # of every depth
    depth: int  # of the step that made the features

    def choices(self, count: int) -> tuple[Tensor, Tensor]:
        return self.network.choices(self.paths.features[:, 0], count)

    def extend(self, parents: Tensor, tokens: Tensor) -> "_Beam":
        paths = self.paths.select(parents[:, None])
        _, embeddings = self.network.inputs(paths.features, tokens[:, None])
        angles = self.angles.at(self.depth + 1)
        paths = self.network.head.extend(self.prefix, paths, embeddings, angles)
        return _Beam(self.network, self.prefix, paths, self.angles, depth=self.depth + 1)
