"""Steps as CUDA graphs: the device part of a step is recorded once a size, and launched whole from then on.

A graph reads and writes fixed memory. The state of the running batch lies in buffers, one set for each size of batch,
that every graph of that size reads and leaves the next state in: between two steps of the same sequences nothing is
copied but how many nodes each of them verifies. Smaller batches are filled up with rows of a slot that no sequence has.

What recording means is the recorder's business: a CUDA graph, or doing the work again on the same buffers, by which a
CPU proves all of this but the capture itself. A size is run once as it is, on the buffers, before it is recorded, so
that whatever is set up at a first use is not recorded; its tokens count like any others.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from gorgon_engine.acceptance import AcceptanceRule
from gorgon_engine.backbone.base import Backbone, ForwardOutput, RowLogits
from gorgon_engine.batch import RunningBatch
from gorgon_engine.buckets import Buckets
from gorgon_engine.drafters.base import Drafter
from gorgon_engine.drafting import ALL_ROWS
from gorgon_engine.graph_prompts import PromptBuffers, PromptSize
from gorgon_engine.graph_state import GraphState
from gorgon_engine.kv_cache import KVCache
from gorgon_engine.memory_plan import MAX_GRAPHS
from gorgon_engine.outcome import LaunchedStep, StepSeconds
from gorgon_engine.recording import Recorder, Recording
from gorgon_engine.step import PrefillChunk, SpeculativeStep, Wanted
from gorgon_engine.transfer import Reading, pack, shapes_of
from gorgon_engine.tree.cost_model import Effort

T = TypeVar("T")

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class GraphStats:
    """What became of the steps, and of the passes over prompts."""

    num_replayed: int = 0
    num_first_runs: int = 0  # of a size, before it is recorded
    num_eager: dict[str, int] = field(default_factory=dict)  # by the reason why they cannot be recorded
    num_graphs: int = 0  # held now
    capture_seconds: float = 0.0  # spent recording

    @property
    def replayed_share(self) -> float:
        """Of all of them, 0 to 1."""
        total = self.num_replayed + self.num_first_runs + sum(self.num_eager.values())
        return self.num_replayed / total if total else 0.0

    def eager(self, reason: str) -> None:
        self.num_eager[reason] = self.num_eager.get(reason, 0) + 1


@dataclass(frozen=True, slots=True)
class _Size:
    """What a recording is made for."""

    batch: int
    width: int
    length: int
    all_greedy: bool
    any_filter: bool
    draft: bool
    costly: bool
    cheap: bool
    masked: bool  # not everything is drafted for everybody
    trace: bool
    num_logprobs: int | None


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What a step of a size leaves beside the state in the buffers."""

    packed: Tensor  # [B, n] float64: the figures for the host
    shapes: dict[str, torch.Size]
    has_candidates: bool
    seconds: StepSeconds


def num_slots_with_graphs(num_slots: int) -> int:
    """Slots that the cache of a `GraphedStep` needs for so many sequences: padding has one of its own."""
    return num_slots + 1 if num_slots > 1 else 1


class GraphedStep(SpeculativeStep):
    """A step that is launched as a graph wherever it can be, and else as it is: `stats` says how often and why.

    Not recorded are: rules other than the lossless one, penalties, biased logits, and drafts that were drawn from a
    distribution. The tokens are the same either way.
    """

    def __init__(
        self,
        backbone: Backbone,
        cache: KVCache,
        drafters: Iterable[Drafter],
        *,
        max_nodes: int,
        max_depth: int,
        recorder: Recorder,
        runs_ahead: bool = True,
    ) -> None:
        """cache: with as many slots as `num_slots_with_graphs` says; the spare one is taken for good."""
        super().__init__(backbone, cache, drafters, max_nodes=max_nodes, max_depth=max_depth)
        self.recorder = recorder
        self.runs_ahead = runs_ahead
        self.stats = GraphStats()
        self._spare_slot = cache.acquire() if cache.num_slots > 1 else None
        self.buckets = self._buckets = Buckets.of(
            num_slots=max(cache.num_slots - 1, 1), max_nodes=max_nodes, num_positions=cache.num_positions
        )
        self._states: dict[int, GraphState] = {}
        self._prompts: dict[PromptSize, PromptBuffers] = {}
        self._recordings: dict[_Size | PromptSize, Recording[Any]] = {}
        self._has_run: set[_Size | PromptSize] = set()
        self._refused: set[_Size | PromptSize] = set()
        self._recorded_drafters = self.drafting.drafters

    @torch.inference_mode()
    def launch(
        self,
        batch: RunningBatch,
        num_nodes: Sequence[int],
        *,
        max_length: int,
        rule: AcceptanceRule,
        wanted: Wanted,
    ) -> LaunchedStep:
        """As `SpeculativeStep.launch`. The state after it lies where the next launch of as many sequences leaves its
        own: copy what is to be kept (`RunningBatch.select` and `join` do)."""
        self._follow_drafters()
        reason = _obstacle(batch, rule)
        if reason is not None:
            self.stats.eager(reason)
            return super().launch(batch, num_nodes, max_length=max_length, rule=rule, wanted=wanted)
        count = batch.slots.shape[0]
        size = self._size(batch, num_nodes, max_length, wanted)
        state = self._state(size.batch, batch)
        if state.current is not batch:
            state.load(batch)
        state.current = None  # whatever goes wrong from here on
        state.load_controls(num_nodes, wanted.rows)
        outcome = self._perform(size, partial(self._advance_state, size, state))
        state.current = state.rows(count, batch.sampling, has_candidates=outcome.has_candidates)
        return LaunchedStep(
            batch=state.current,
            max_tokens=int(outcome.shapes["tokens"][0]),
            reading=Reading(outcome.packed, outcome.shapes),
            source_names=state.source_names,
            wanted=wanted,
            seconds=outcome.seconds,
        )

    @torch.inference_mode()
    def run_prompts(self, chunks: Sequence[PrefillChunk]) -> ForwardOutput:
        """As `SpeculativeStep.run_prompts`."""
        self._follow_drafters()
        size = PromptSize.of(chunks, self._buckets, self.cache.num_positions)
        if size is None:
            self.stats.eager("long prompts")
            return super().run_prompts(chunks)
        if size not in self._prompts:
            self._prompts[size] = PromptBuffers(size, self._spare_slot, self.backbone.device)
        buffers = self._prompts[size]
        buffers.load(chunks)
        output = self._perform(size, partial(self._pass_over_buffers, size, buffers))
        # Copies: the next prompts of this size are run in the same memory, and these may not be done with.
        width = max(chunk.stop - chunk.start for chunk in chunks)
        hidden, logits = output.hidden[: len(chunks), :width], output.logits[: len(chunks)]
        return ForwardOutput(hidden.clone(), RowLogits.of(logits.clone()))

    def _follow_drafters(self) -> None:
        """Recordings know nothing of drafters that were taken up since."""
        if self._recorded_drafters is self.drafting.drafters:
            return
        self._recorded_drafters = self.drafting.drafters
        self.recorder.forget()
        self._recordings.clear()
        self._has_run.clear()
        self._refused.clear()
        self.stats.num_graphs = 0

    def _size(self, batch: RunningBatch, num_nodes: Sequence[int], max_length: int, wanted: Wanted) -> _Size:
        buckets = self._buckets
        width = 1 if batch.candidates is None else buckets.width(max(num_nodes))
        return _Size(
            batch=buckets.batch(len(num_nodes)),
            width=width,
            length=buckets.length(max_length),
            all_greedy=batch.sampling.all_greedy,
            any_filter=batch.sampling.any_filter,
            draft=wanted.draft,
            costly=wanted.effort.costly,
            cheap=wanted.effort.cheap,
            masked=wanted.drafts and wanted.rows != ALL_ROWS,
            trace=wanted.trace,
            num_logprobs=wanted.num_logprobs,
        )

    def _state(self, size: int, batch: RunningBatch) -> GraphState:
        if size not in self._states:
            self._states[size] = GraphState(batch, size, self.max_nodes - 1, self._spare_slot)
        return self._states[size]

    def _perform(self, size: _Size | PromptSize, work: Callable[[], T]) -> T:
        recording: Recording[T] | None = self._recordings.get(size)
        if recording is None and size in self._has_run and size not in self._refused:
            recording = self._record(size, work)
        if recording is not None:
            self.stats.num_replayed += 1
            return recording.replay()
        if size in self._refused:
            self.stats.eager("not recorded")
        else:
            self.stats.num_first_runs += 1
        outcome = work()
        self._has_run.add(size)
        return outcome

    def _record(self, size: _Size | PromptSize, work: Callable[[], T]) -> Recording[T] | None:
        """None, once and for all, where that is not possible."""
        began = time.perf_counter()
        try:
            recording = self.recorder.record(work)
        except RuntimeError as error:
            _logger.warning("%s runs without a graph: %s", size, str(error).partition("\n")[0])
            self._refused.add(size)
            return None
        if len(self._recordings) >= MAX_GRAPHS:
            # None is running: recording waits for the device. Those of now are likelier to be asked for again.
            self._recordings.pop(next(iter(self._recordings)))
        self._recordings[size] = recording
        self.stats.num_graphs = len(self._recordings)
        self.stats.capture_seconds += time.perf_counter() - began
        return recording

    def _pass_over_buffers(self, size: PromptSize, buffers: PromptBuffers) -> ForwardOutput:
        """The work that is recorded of prompts."""
        output = self._pass_over(buffers.inputs(), ends=size.ends)
        if self._spare_slot is not None and size.batch > 1:
            self.cache.empty(self._spare_slot)
        return output

    def _advance_state(self, size: _Size, state: GraphState) -> _Outcome:
        """The work that is recorded: `advance`, from the buffers to the buffers."""
        wanted = Wanted(
            num_logprobs=size.num_logprobs,
            trace=size.trace,
            draft=size.draft,
            effort=Effort(costly=size.costly, cheap=size.cheap),
            rows=state.masks if size.masked else ALL_ROWS,
        )
        advanced = self.advance(
            state.whole(all_greedy=size.all_greedy, any_filter=size.any_filter, has_candidates=size.width > 1),
            state.num_nodes,
            size.width,
            max_length=size.length,
            rule=AcceptanceRule.LOSSLESS,
            wanted=wanted,
        )
        state.store(advanced.batch, tuple(drafter.name for drafter in self.drafting.drafters))
        if self._spare_slot is not None and size.batch > 1:
            self.cache.empty(self._spare_slot)  # the rows that fill the batch up have said something, too
        return _Outcome(
            packed=pack(advanced.figures),
            shapes=shapes_of(advanced.figures),
            has_candidates=advanced.batch.candidates is not None,
            seconds=advanced.seconds,
        )


def _obstacle(batch: RunningBatch, rule: AcceptanceRule) -> str | None:
    """Why a step cannot be recorded."""
    if rule is not AcceptanceRule.LOSSLESS:
        return "acceptance rule"
    if batch.counts is not None:
        return "penalties"
    if batch.sampling.bias is not None:
        return "logit bias"
    if batch.candidates is not None and batch.candidates.draft_probs is not None:
        return "drawn drafts"
    return None
