"""The scheduler: which sequences take part in a step, and what becomes of the tokens that it gives.

    schedule -> draft -> verify -> accept -> commit

A step of the engine is one decoding step of everything that runs, then one bounded portion of the prompts that are in
their slots already, so that a long prompt never holds up the others for long. Only this module changes a sequence's
status, and every sequence that was submitted ends with exactly one terminal event.

Where that gains anything the device is kept busy: a step is launched before the one before it is read, its trees sized
by what is known then. A sequence that turns out to have ended has one step too many behind it, of which nothing is
read: whoever gets its slot begins at position 0, behind that step in the device's order.
"""

import logging
import time
from dataclasses import dataclass

from gorgon_engine.acceptance import AcceptanceRule
from gorgon_engine.batch import RunningBatch
from gorgon_engine.budget import CostlyDrafting, TreeBudget
from gorgon_engine.emission import CANCELLED, Ending, emit, ended_before, finished_event, tokens_left
from gorgon_engine.events import Event, FailedEvent, StatusEvent
from gorgon_engine.outcome import LaunchedStep, StepResult
from gorgon_engine.planning import begin_sampling, plan_chunks, wanted_of
from gorgon_engine.queue import FairQueue
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.sequence import Sequence, Status
from gorgon_engine.step import SpeculativeStep
from gorgon_protocol.errors import BadRequestError, DeadlineError, GorgonError, QueueFullError

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that was launched and not read yet."""

    sequences: list[Sequence]  # in it; some may have ended since
    step: LaunchedStep
    batch_size: int  # of all groups


@dataclass(slots=True)
class _Group:
    """Running sequences that share a pass: those of one acceptance rule."""

    sequences: list[Sequence]
    batch: RunningBatch  # behind the flight
    flight: _Flight | None = None


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What a scheduler keeps to."""

    chunk_size: int  # positions of prompts that one pass runs while nothing else does
    max_waiting: int  # sequences that wait, beside those for whom a slot is free


class Scheduler:
    """Admits waiting sequences while there are KV slots, steps the running ones, retires the finished ones."""

    def __init__(self, step: SpeculativeStep, budget: TreeBudget, limits: SchedulerLimits) -> None:
        self._step = step
        self._budget = budget
        self._limits = limits
        self._queue = FairQueue()
        self._ended_before: list[tuple[Sequence, Ending]] = []
        self._prefilling: list[Sequence] = []  # in order of admission
        self._groups: dict[AcceptanceRule, _Group] = {}
        self._open: dict[str, Sequence] = {}
        self._cancelled: set[str] = set()
        self._drafters_epoch = 0
        self._told_changes = 0  # of the queue

    @property
    def num_running(self) -> int:
        """Sequences in a slot."""
        return len(self._prefilling) + self._num_decoding

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def num_committed(self) -> int:
        """Positions of the KV cache in use."""
        return sum(s.committed_length for s in self._open.values() if s.status in (Status.PREFILL, Status.RUNNING))

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._open)

    @property
    def has_room(self) -> bool:
        """Whether another sequence would be taken."""
        return len(self._queue) < self._limits.max_waiting + self._step.cache.num_free_slots

    @property
    def _num_decoding(self) -> int:
        return sum(len(group.sequences) for group in self._groups.values())

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises `QueueFullError`, and `BadRequestError` for an id that is in use."""
        request = sequence.request
        assert sequence.status is Status.WAITING
        if request.id in self._open:
            raise BadRequestError(f"request id {request.id} is in use: give every open request an id of its own")
        ending = ended_before(sequence, self._step.cache.capacity)
        if ending is not None:
            self._ended_before.append((sequence, ending))
        elif self.has_room:
            self._queue.push(sequence)
        else:
            raise QueueFullError(f"{len(self._queue)} requests wait already, which is the most: try again later")
        self._open[request.id] = sequence

    def cancel(self, request_id: str) -> None:
        """End a request at the next step; unknown or finished ids are ignored."""
        if request_id in self._open:
            self._cancelled.add(request_id)

    def drafters_changed(self, costly: CostlyDrafting | None) -> None:
        """The step has other drafters, which know nothing of what is running. costly: what those of them cost that run
        a network."""
        self._budget.start_over(costly)
        self._drafters_epoch += 1

    def step(self) -> list[Event]:
        """One decoding step of what runs, one portion of the prompts that came, and the reports."""
        events = self.drop_cancelled()
        batch_size = self._num_decoding
        for group in list(self._groups.values()):
            self._advance(group, batch_size, events)
        self._admit()
        self._expire(events)
        self._prefill(events)
        self._tell_positions(events)
        return events

    def abort(self) -> list[Event]:
        """End everything, with what was produced."""
        self._cancelled |= self._open.keys()
        return self.drop_cancelled()

    def drop_cancelled(self) -> list[Event]:
        """End now what was cancelled, or was over before it began, instead of at the next step."""
        events: list[Event] = []
        for sequence, ending in self._ended_before:
            self._finish(sequence, ending, events)
        self._ended_before.clear()
        if not self._cancelled:
            return events
        gone = [sequence for request_id, sequence in self._open.items() if request_id in self._cancelled]
        self._cancelled.clear()
        for sequence in gone:
            if sequence.status is Status.WAITING:
                self._queue.remove(sequence)
            self._finish(sequence, CANCELLED, events)
        self._retire()
        return events

    def _expire(self, events: list[Event]) -> None:
        for sequence in self._queue.overdue():
            self._queue.remove(sequence)
            limit = sequence.request.timeout_seconds
            error = DeadlineError(f"no slot was free within {limit:g} seconds: try again later, or allow more time")
            self._fail(sequence, error, events)

    def _admit(self) -> None:
        """A slot for each of those that wait, as far as there are any."""
        while self._queue and self._step.cache.num_free_slots:
            sequence = self._queue.pop()
            sequence.slot = self._step.cache.acquire()
            sequence.status = Status.PREFILL
            sequence.admitted_at = time.perf_counter()
            sequence.drafters_epoch = self._drafters_epoch
            self._prefilling.append(sequence)

    def _advance(self, group: _Group, batch_size: int, events: list[Event]) -> None:
        """One decoding step of a group."""
        sequences, flight = list(group.sequences), group.flight
        group.flight = None  # if anything breaks, nobody waits for it
        try:
            if flight is None or self._may_overtake(group, flight):
                group.flight = self._launch(group, flight, batch_size)
                if not self._step.runs_ahead:
                    flight, group.flight = group.flight, None
            if flight is not None:
                self._land(flight, events)
        except Exception as error:  # whatever breaks here must end these sequences, and no others
            self._fail_all(sequences, error, events)
        except BaseException:
            self._give_up(sequences)
            raise
        self._retire()

    def _launch(self, group: _Group, flight: _Flight | None, batch_size: int) -> _Flight:
        """The next step of a group, behind what is in flight."""
        sequences, step = list(group.sequences), self._step
        launched = step.launch(
            group.batch,
            self._budget.choose(sequences, step.buckets),
            max_length=_longest(sequences, flight),
            rule=_rule_of(sequences[0]),
            wanted=wanted_of(sequences, self._drafters_epoch, self._budget.effort(len(sequences))),
        )
        group.batch = launched.batch
        return _Flight(sequences, launched, batch_size)

    def _land(self, flight: _Flight, events: list[Event]) -> None:
        result = flight.step.read()
        self._budget.observe(flight.sequences, result)
        self._emit(flight.sequences, result, flight.batch_size, events)

    def _may_overtake(self, group: _Group, flight: _Flight) -> bool:
        """Whether a step can be launched before the flight is read: there is room for both behind what is known, and
        somebody will surely need it."""
        cache, step = self._step.cache, self._step
        if _longest(group.sequences, flight) + step.max_nodes + step.max_depth + 1 > cache.num_positions:
            return False
        return any(tokens_left(s, cache.capacity) > 1 for s in group.sequences)

    def _prefill(self, events: list[Event]) -> None:
        """One portion of the prompts that are in their slots."""
        if not self._prefilling:
            return
        decoding = self._num_decoding
        most = self._limits.chunk_size
        portion = min(self._budget.prefill_rows(decoding), most) if decoding else most
        taken = plan_chunks(self._prefilling, portion, drafters_epoch=self._drafters_epoch)
        sequences, chunks = [sequence for sequence, _ in taken], [chunk for _, chunk in taken]
        ended = [sequence for sequence, chunk in taken if chunk.is_last]
        try:
            sampling, counts = begin_sampling(ended, self._step.backbone)
            batch = decoding + len(ended)
            wanted = wanted_of(ended, self._drafters_epoch, self._budget.effort(batch))
            result = self._step.prefill(chunks, sampling, counts, wanted=wanted)
            for sequence, chunk in taken:
                sequence.num_prefilled = chunk.stop
                if not chunk.is_last:
                    progress = chunk.stop / len(chunk.tokens)
                    events.append(StatusEvent(sequence.request.id, "prefill", progress=progress))
            if result is not None:
                for sequence in ended:
                    sequence.status = Status.RUNNING
                self._prefilling = [s for s in self._prefilling if s.status is Status.PREFILL]
                self._emit(ended, result, decoding + len(ended), events)
                self._join(ended, result.batch)
        except Exception as error:  # as in _advance
            self._fail_all(sequences, error, events)
        except BaseException:
            self._give_up(sequences)
            raise
        self._retire()

    def _join(self, sequences: list[Sequence], batch: RunningBatch) -> None:
        """Put those that have begun, and not ended at once, in the groups that they run with."""
        rules = dict.fromkeys(_rule_of(s) for s in sequences if s.status is Status.RUNNING)
        for rule in rules:
            rows = [r for r, s in enumerate(sequences) if s.status is Status.RUNNING and _rule_of(s) is rule]
            joined = [sequences[row] for row in rows]
            added = batch.select(rows, _params(joined))
            group = self._groups.get(rule)
            if group is None:
                self._groups[rule] = _Group(joined, added)
            else:
                group.batch = group.batch.join(added, _params([*group.sequences, *joined]))
                group.sequences += joined

    def _emit(self, sequences: list[Sequence], result: StepResult, batch_size: int, events: list[Event]) -> None:
        rate = self._budget.plain_tokens_per_second(batch_size)
        for row, sequence in enumerate(sequences):
            if sequence.status is Status.FINISHED:  # while the step was in flight
                continue
            sequence.path_probs = result.path_probs[row]
            emitted = emit(
                sequence,
                result,
                row,
                capacity=self._step.cache.capacity,
                batch_size=batch_size,
                plain_rate=rate,
            )
            events.append(emitted.event)
            if emitted.ending is not None:
                self._finish(sequence, emitted.ending, events)

    def _tell_positions(self, events: list[Event]) -> None:
        if self._queue.num_changes == self._told_changes:
            return
        self._told_changes = self._queue.num_changes
        for position, sequence in enumerate(self._queue):
            if sequence.position != position:
                sequence.position = position
                events.append(StatusEvent(sequence.request.id, "queued", position=position))

    def _finish(self, sequence: Sequence, ending: Ending, events: list[Event]) -> None:
        events.append(finished_event(sequence, ending))
        self._close(sequence)

    def _fail(self, sequence: Sequence, error: GorgonError, events: list[Event]) -> None:
        events.append(FailedEvent(sequence.request.id, error))
        self._close(sequence)

    def _fail_all(self, sequences: list[Sequence], cause: Exception, events: list[Event]) -> None:
        """End the sequences of a pass that broke, those that it had ended already excepted."""
        _logger.error("a step of %d sequences failed", len(sequences), exc_info=cause)
        for sequence in sequences:
            if sequence.status is not Status.FINISHED:
                error = GorgonError(f"the engine failed in a step ({type(cause).__name__}): try again")
                error.__cause__ = cause
                self._fail(sequence, error, events)

    def _close(self, sequence: Sequence) -> None:
        if sequence.slot >= 0:
            self._step.cache.release(sequence.slot)
            sequence.slot = -1
        sequence.status = Status.FINISHED
        del self._open[sequence.request.id]

    def _retire(self) -> None:
        """Drop the rows of finished sequences from the batches."""
        self._prefilling = [s for s in self._prefilling if s.status is Status.PREFILL]
        for rule, group in list(self._groups.items()):
            rows = [row for row, s in enumerate(group.sequences) if s.status is not Status.FINISHED]
            if len(rows) == len(group.sequences):
                continue
            group.sequences = [group.sequences[row] for row in rows]
            if rows:
                group.batch = group.batch.select(rows, _params(group.sequences))
            else:
                self._groups.pop(rule)

    def _give_up(self, sequences: list[Sequence]) -> None:
        """Ctrl-C in the middle of a pass. Prompts begin again, if nobody cancels them; of what was decoding the last
        tokens may be lost, so that it can only end."""
        for sequence in reversed(sequences):
            if sequence.status is Status.PREFILL:
                self._step.cache.release(sequence.slot)
                sequence.slot, sequence.num_prefilled, sequence.status = -1, 0, Status.WAITING
                self._queue.push_front(sequence)
            elif sequence.status is Status.RUNNING:
                self._cancelled.add(sequence.request.id)
        self._prefilling = [s for s in self._prefilling if s.status is Status.PREFILL]


def _rule_of(sequence: Sequence) -> AcceptanceRule:
    """Without guesses all rules are one."""
    speculation = sequence.request.speculation
    return speculation.acceptance if speculation.may_draft else AcceptanceRule.LOSSLESS


def _longest(sequences: list[Sequence], flight: _Flight | None) -> int:
    """An upper bound of the committed lengths, behind what is in flight."""
    return max(s.committed_length for s in sequences) + (0 if flight is None else flight.step.max_tokens)


def _params(sequences: list[Sequence]) -> list[SamplingParams]:
    return [s.request.sampling for s in sequences]
