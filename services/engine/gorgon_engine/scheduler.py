"""The scheduler: which sequences take part in a step, and what becomes of the tokens that it gives.

    schedule -> draft -> verify -> accept -> commit

Only this module changes a sequence's status.
"""

import time
from collections import deque
from dataclasses import dataclass
from functools import partial

import torch

from gorgon_engine.acceptance import AcceptanceRule
from gorgon_engine.batch import RunningBatch
from gorgon_engine.budget import TreeBudget
from gorgon_engine.events import Event, FinishedEvent, TokenEvent
from gorgon_engine.sampling import SamplingBatch, SamplingParams, TokenCounts
from gorgon_engine.sequence import FinishReason, Sequence, Status
from gorgon_engine.step import SpeculativeStep, StepResult, Wanted
from gorgon_protocol.metrics import Usage


@dataclass(slots=True)
class _Group:
    """Running sequences that can share a step: one acceptance rule, all or none penalised, all or none drafted."""

    sequences: list[Sequence]
    batch: RunningBatch


class _CancelledError(Exception):
    """A request was cancelled while its prompt was running."""


class Scheduler:
    """Admits waiting sequences while there are KV slots, steps the running ones, retires the finished ones."""

    def __init__(
        self, step: SpeculativeStep, budget: TreeBudget, *, chunk_size: int, eos_token_ids: frozenset[int]
    ) -> None:
        self._step = step
        self._budget = budget
        self._chunk_size = chunk_size
        self._eos_token_ids = eos_token_ids
        self._waiting: deque[Sequence] = deque()
        self._groups: dict[tuple[AcceptanceRule, bool, bool], _Group] = {}
        self._cancelled: set[str] = set()

    @property
    def num_running(self) -> int:
        return sum(len(group.sequences) for group in self._groups.values())

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, sequence: Sequence) -> None:
        assert sequence.status is Status.WAITING
        self._waiting.append(sequence)

    def cancel(self, request_id: str) -> None:
        """End a request at the next step; unknown or finished ids are ignored."""
        self._cancelled.add(request_id)

    def step(self) -> list[Event]:
        """Admit what fits, run one step of everything that is running, and report."""
        events = self.drop_cancelled()
        while self._waiting and self._step.cache.num_free_slots:
            events += self._admit(self._waiting.popleft())
        for key, group in list(self._groups.items()):
            events += self._advance(group)
            if not group.sequences:
                del self._groups[key]
        return events

    def abort(self) -> list[Event]:
        """End everything, with what was produced."""
        self._cancelled |= {s.request.id for s in self._waiting}
        self._cancelled |= {s.request.id for g in self._groups.values() for s in g.sequences}
        return self.drop_cancelled()

    def drop_cancelled(self) -> list[Event]:
        """End the cancelled requests now instead of at the next step."""
        if not self._cancelled:
            return []
        events: list[Event] = []
        for sequence in [s for s in self._waiting if s.request.id in self._cancelled]:
            self._waiting.remove(sequence)
            events.append(self._finish(sequence, FinishReason.CANCELLED, None))
        for key, group in list(self._groups.items()):
            gone = [s for s in group.sequences if s.request.id in self._cancelled]
            events += [self._finish(s, FinishReason.CANCELLED, None) for s in gone]
            if gone:
                self._retire(group)
            if not group.sequences:
                del self._groups[key]
        self._cancelled.clear()
        return events

    def _admit(self, sequence: Sequence) -> list[Event]:
        request, cache = sequence.request, self._step.cache
        params = [request.sampling]
        device, vocab_size = self._step.backbone.device, self._step.backbone.config.vocab_size
        sampling = SamplingBatch.of(params, vocab_size=vocab_size, device=device)
        counts = _fresh_counts(request.prompt, vocab_size, device) if request.sampling.penalised else None
        sequence.slot = cache.acquire()
        sequence.status = Status.RUNNING
        try:
            result = self._step.prefill(
                sequence.slot,
                request.prompt,
                sampling,
                counts,
                chunk_size=self._chunk_size,
                wanted=_wanted([sequence], self._budget),
                check=partial(self._raise_if_cancelled, request.id),
            )
        except _CancelledError:
            cache.release(sequence.slot)
            self._cancelled.discard(request.id)
            return [self._finish(sequence, FinishReason.CANCELLED, None)]
        except BaseException:
            # Also Ctrl-C: the slot must not leak, and the sequence goes back to where it was.
            cache.release(sequence.slot)
            sequence.status = Status.WAITING
            self._waiting.appendleft(sequence)
            raise
        key = (request.speculation.acceptance, counts is not None, request.speculation.enabled)
        group = self._groups.get(key)
        if group is None or not group.sequences:  # all of it has ended in this very step: its rows are nobody's
            group = self._groups[key] = _Group([sequence], result.batch)
        else:
            group.sequences.append(sequence)
            group.batch = group.batch.join(result.batch, _params(group))
        return self._emit(group, [sequence], result)

    def _raise_if_cancelled(self, request_id: str) -> None:
        if request_id in self._cancelled:
            raise _CancelledError

    def _advance(self, group: _Group) -> list[Event]:
        sequences = group.sequences
        if not sequences:
            return []
        num_nodes = self._budget.choose(sequences)
        result = self._step.run(
            group.batch,
            num_nodes,
            max_length=max(s.committed_length for s in sequences),
            rule=sequences[0].request.speculation.acceptance,
            wanted=_wanted(sequences, self._budget),
        )
        self._budget.observe(sequences, result)
        group.batch = result.batch
        return self._emit(group, list(sequences), result)

    def _emit(self, group: _Group, stepped: list[Sequence], result: StepResult) -> list[Event]:
        events: list[Event] = []
        for row, sequence in enumerate(stepped):
            sequence.path_probs = result.path_probs[row]
            events += self._take_tokens(sequence, row, result)
        if any(s.status is Status.FINISHED for s in group.sequences):
            self._retire(group)
        return events

    def _take_tokens(self, sequence: Sequence, row: int, result: StepResult) -> list[Event]:
        """Append one step's tokens up to the first that ends the sequence."""
        offered = result.tokens[row]
        first = not sequence.output
        stop: str | int | None
        kept, reason, stop = self._until_stop(sequence, offered)
        pieces = []
        for token in kept:
            pieces.append(sequence.detokenizer.push([token]))
            if sequence.detokenizer.stopped is not None:
                reason, stop = FinishReason.STOP, sequence.detokenizer.stopped
                break
        kept = kept[: len(pieces)]
        sequence.output += kept
        sequence.last_token_at = time.perf_counter()
        if first:
            sequence.first_token_at = sequence.last_token_at
        else:
            sequence.metrics.record(num_accepted=len(kept) - 1, num_drafted=result.num_drafted[row])
        events: list[Event] = [
            TokenEvent(
                request_id=sequence.request.id,
                token_ids=kept,
                pieces=pieces,
                num_accepted=0 if first else min(len(kept), len(offered) - 1),
                step=sequence.metrics.num_steps,
                num_nodes=result.num_drafted[row] + 1,
                logprobs=result.logprobs[row][: len(kept)] if result.logprobs is not None else None,
                trace=result.traces[row] if result.traces is not None and sequence.request.trace else None,
                seconds=result.seconds,
            )
        ]
        if reason is not None:
            events.append(self._finish(sequence, reason, stop))
        return events

    def _until_stop(self, sequence: Sequence, offered: list[int]) -> tuple[list[int], FinishReason | None, int | None]:
        sampling = sequence.request.sampling
        stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else self._eos_token_ids)
        room = self._step.cache.capacity - len(sequence.request.prompt) - len(sequence.output)
        if sampling.max_tokens is not None:
            room = min(room, sampling.max_tokens - len(sequence.output))
        for place, token in enumerate(offered[:room]):
            if token in stops:
                return offered[: place + 1], FinishReason.STOP, token
        if len(offered) >= room:
            return offered[:room], FinishReason.LENGTH, None
        return offered, None, None

    def _finish(self, sequence: Sequence, reason: FinishReason, stop: str | int | None) -> FinishedEvent:
        sequence.status = Status.FINISHED
        prompt, output = len(sequence.request.prompt), len(sequence.output)
        ttft = None if sequence.first_token_at is None else sequence.first_token_at - sequence.arrived_at
        return FinishedEvent(
            request_id=sequence.request.id,
            text=sequence.detokenizer.finish(),
            finish_reason=reason,
            stop=stop,
            usage=Usage(prompt_tokens=prompt, completion_tokens=output, total_tokens=prompt + output),
            metrics=sequence.metrics.summary(),
            tokens_per_second=sequence.tokens_per_second,
            ttft_seconds=ttft,
        )

    def _retire(self, group: _Group) -> None:
        """Free the slots of finished sequences and drop their rows from the batch."""
        rows = [row for row, s in enumerate(group.sequences) if s.status is not Status.FINISHED]
        for sequence in group.sequences:
            if sequence.status is Status.FINISHED:
                self._step.cache.release(sequence.slot)
        group.sequences = [group.sequences[row] for row in rows]
        if rows:
            group.batch = group.batch.select(rows, _params(group))


def _params(group: _Group) -> list[SamplingParams]:
    return [s.request.sampling for s in group.sequences]


def _wanted(sequences: list[Sequence], budget: TreeBudget) -> Wanted:
    logprobs = [s.request.sampling.logprobs for s in sequences if s.request.sampling.logprobs is not None]
    return Wanted(
        num_logprobs=max(logprobs) if logprobs else None,
        trace=any(s.request.trace for s in sequences),
        draft=any(s.request.speculation.enabled for s in sequences),
        costly=budget.wants_costly,
    )


def _fresh_counts(prompt: tuple[int, ...], vocab_size: int, device: torch.device) -> TokenCounts:
    in_prompt = torch.zeros((1, vocab_size), dtype=torch.bool, device=device)
    in_prompt[0, list(prompt)] = True
    return TokenCounts(in_prompt=in_prompt, in_output=torch.zeros((1, vocab_size), dtype=torch.int32, device=device))
