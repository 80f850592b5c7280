"""Start-up measurement: what steps cost on this machine, by number of rows and of sequences.

Two uses: the cost model that sizes trees, and the plain-decoding speed that every reported speedup is measured against.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from gorgon_engine.acceptance import AcceptanceRule
from gorgon_engine.backbone.base import ForwardInputs
from gorgon_engine.batch import RunningBatch
from gorgon_engine.buckets import PROMPT_WIDTHS
from gorgon_engine.drafters.base import DraftContext
from gorgon_engine.graphs import GraphedStep
from gorgon_engine.recording import Recorder, Recording
from gorgon_engine.sampling import SamplingBatch, SamplingParams
from gorgon_engine.step import PrefillChunk, SpeculativeStep, Wanted
from gorgon_engine.transfer import to_device
from gorgon_engine.tree.candidates import CandidateTree
from gorgon_engine.tree.cost_model import CostModel, Curve, Effort
from gorgon_engine.tree.tree import MAX_NODES, ancestor_words, merge_candidates

_PREFIX = 64  # positions in the cache while measuring
_PREFILL_COUNTS = (32, 128)
_TREE_NODES = 4  # of the steps that tell what trees cost beside the pass
_MOST_SEQUENCES = 64
_ROUNDS = 3
_MAX_SECONDS = 2.0  # no further round begins after so long: a large model on a CPU takes seconds for one


@dataclass(frozen=True, slots=True)
class DraftSeconds:
    """What something takes for one sequence, and for each further one."""

    first: float
    each: float

    @classmethod
    def of(cls, batches: Sequence[int], seconds: Sequence[float]) -> "DraftSeconds":
        """batches: ascending, from 1."""
        return cls(seconds[0], max(seconds[-1] - seconds[0], 0.0) / max(batches[-1] - 1, 1))


@dataclass(frozen=True, slots=True)
class Calibration:
    """Medians over interleaved rounds at short context."""

    plain_step_seconds: float  # of one sequence
    cost_model: CostModel
    prefill: Curve  # passes over so many positions of a prompt
    costly_draft: DraftSeconds | None = None  # None where no drafter runs a network

    @property
    def plain_tokens_per_second(self) -> float:
        return 1.0 / self.plain_step_seconds


@dataclass(slots=True)
class _Stopwatch:
    """Times of several things, measured round by round. What slows a whole round down cancels out."""

    device: torch.device
    recorder: Recorder | None = None  # of steps: what they are recorded with is measured as a recording, too
    _rounds: list[dict[tuple[str, int], list[float]]] = field(default_factory=list)
    _recordings: dict[tuple[str, int], Recording[object]] = field(default_factory=dict)

    @property
    def num_warm_ups(self) -> int:
        """Rounds that do not count: a recording is made in the second."""
        return 1 if self.recorder is None else 2

    def begin_round(self) -> None:
        self._rounds.append({})

    def time_on_device(self, name: str, count: int, work: Callable[[], object]) -> float:
        """As `time`, of device work alone: always the same, on the same memory."""
        if self.recorder is not None and len(self._rounds) >= self.num_warm_ups:
            if (name, count) not in self._recordings:
                self._recordings[name, count] = self.recorder.record(work)
                self._recordings[name, count].replay()
            work = self._recordings[name, count].replay
        return self.time(name, count, work)

    def time(self, name: str, count: int, work: Callable[[], object]) -> float:
        """Seconds, also kept under (name, count)."""
        began = _now(self.device)
        work()
        seconds = _now(self.device) - began
        self.keep(name, count, seconds)
        return seconds

    def keep(self, name: str, count: int, seconds: float) -> None:
        self._rounds[-1].setdefault((name, count), []).append(seconds)

    def seconds(self, name: str, count: int, *, beside: tuple[str, int]) -> float:
        """The median, each time taken relative to what `beside` took in the same round."""
        timed = self._rounds[self.num_warm_ups :]
        base = [statistics.median(times[beside]) for times in timed]
        ratios = [statistics.median(times[name, count]) / b for times, b in zip(timed, base, strict=True)]
        return statistics.median(ratios) * statistics.median(base)


def calibrate(step: SpeculativeStep, *, chunk_size: int = 512) -> Calibration:
    """Time plain steps, passes and drafting in borrowed slots: about a second for a small CPU model.

    The slots must be free: nothing may run. chunk_size: positions of a prompt that one pass may run.
    """
    cache = step.cache
    slots = [cache.acquire() for _ in range(min(cache.num_free_slots, _MOST_SEQUENCES))]
    prefix = min(_PREFIX, max(1, cache.capacity // 2))
    try:
        # What lies there costs the same as a prompt.
        cache.append(to_device(slots, step.backbone.device), prefix)
        measurement = _Measurement(step, slots, prefix, chunk_size)
        calibration = measurement.run()
        if step.buckets is not None:
            measurement.rehearse(step.buckets.widths)
        return calibration
    finally:
        for slot in slots:
            cache.release(slot)


def calibrate_drafters(step: SpeculativeStep) -> DraftSeconds | None:
    """Of drafters taken up while streams run, of which nothing is touched. None where no drafter runs a network."""
    watch, drafts = _Stopwatch(step.backbone.device, _recorder_of(step)), _Drafts(step)
    for _ in range(watch.num_warm_ups + _ROUNDS):
        watch.begin_round()
        drafts.time(watch)
    return drafts.costly_seconds(watch, beside=("cheap draft", 1))


class _Drafts:
    """Drafts for the first slots, from a made-up context: nothing is written."""

    def __init__(self, step: SpeculativeStep) -> None:
        self._step = step
        num_sequences = step.cache.num_slots if step.buckets is None else step.buckets.batches[-1]
        self.batches = sorted({1, min(num_sequences, _MOST_SEQUENCES)})
        generator = torch.Generator().manual_seed(0)
        self._contexts = {batch: self._context(batch, generator) for batch in self.batches}

    def time(self, watch: _Stopwatch) -> None:
        for batch in self.batches:
            watch.time_on_device("cheap draft", batch, partial(self._draft, batch, costly=False))
            watch.time_on_device("draft", batch, partial(self._draft, batch, costly=True))

    def costly_seconds(self, watch: _Stopwatch, *, beside: tuple[str, int]) -> DraftSeconds | None:
        """What the costly drafters add."""
        if not self._step.drafting.has_costly:
            return None
        took = [
            max(watch.seconds("draft", batch, beside=beside) - watch.seconds("cheap draft", batch, beside=beside), 0.0)
            for batch in self.batches
        ]
        return DraftSeconds.of(self.batches, took)

    def _draft(self, batch: int, *, costly: bool) -> None:
        self._step.drafting.guess(self._contexts[batch], effort=Effort(costly=costly))

    def _context(self, batch: int, generator: torch.Generator) -> DraftContext:
        config, device = self._step.backbone.config, self._step.backbone.device
        length = min(_PREFIX, self._step.cache.capacity)
        history = torch.randint(config.vocab_size, (batch, length), generator=generator).to(device)
        return DraftContext(
            root_tokens=history[:, -1],
            hidden=self._step.backbone.embed(history[:, -1]),  # of a hidden state's size and type
            history=history,
            history_lengths=torch.full((batch,), length, device=device),
            seeds=torch.arange(batch, device=device),
            slots=torch.arange(batch, device=device),
        )


class _Measurement:
    """Everything that start-up measures, in slots that hold `prefix` positions each."""

    def __init__(self, step: SpeculativeStep, slots: Sequence[int], prefix: int, chunk_size: int) -> None:
        self._step = step
        self._slots = slots
        self._prefix = prefix
        self._generator = torch.Generator().manual_seed(0)
        num_slots, most = len(slots), max(step.max_nodes, min(4 * len(slots), MAX_NODES))
        self._batches = sorted({min(2**i, num_slots) for i in range(num_slots.bit_length() + 1)})
        self._rows = sorted({min(2**i, most) for i in range(most.bit_length() + 1)})
        room = min(chunk_size, step.cache.num_positions - prefix)
        self._prefill_rows = sorted({min(count, room) for count in _PREFILL_COUNTS})
        self._running = {count: _running(step, slots[:count], prefix) for count in self._batches}
        self._drafts = _Drafts(step)
        for count in self._drafts.batches:
            self._running.setdefault(count, _running(step, slots[:count], prefix))
        self._watch = _Stopwatch(step.backbone.device, _recorder_of(step))

    def run(self) -> Calibration:
        began = time.perf_counter()
        for number in range(self._watch.num_warm_ups + _ROUNDS):
            if number > self._watch.num_warm_ups and time.perf_counter() - began > _MAX_SECONDS:
                break
            self._watch.begin_round()
            self._round()
        plain = Curve(tuple(self._batches), _rising([self._seconds("plain", count) for count in self._batches]))
        passes = [self._seconds("pass", count) for count in self._rows]
        overhead = max(plain.seconds[0] - passes[0], 0.0)  # of a step beside its pass
        batches = self._drafts.batches
        trees = DraftSeconds.of(batches, [max(self._seconds("tree", count), 0.0) for count in batches])
        costly = self._drafts.costly_seconds(self._watch, beside=("plain", 1))
        return Calibration(
            plain_step_seconds=plain.seconds[0],
            cost_model=CostModel(
                rows=tuple(self._rows),
                seconds=_rising([plain.seconds[0], *(seconds + overhead for seconds in passes[1:])]),
                draft_seconds=trees.first,
                draft_seconds_each=trees.each,
                plain=plain,
            ),
            prefill=Curve(
                tuple(self._prefill_rows), _rising([self._seconds("prefill", count) for count in self._prefill_rows])
            ),
            costly_draft=costly,
        )

    def rehearse(self, widths: Sequence[int]) -> None:
        """Have short prompts, and the steps of one stream, greedy and drawn, recorded before anybody waits for them.
        widths: of trees."""
        step, count = self._step, 1
        for width in PROMPT_WIDTHS:
            if self._prefix + width <= step.cache.num_positions:
                for _ in range(2):  # the first time as it is
                    self._prefill_pass(width, ends=True)
        config, device = step.backbone.config, step.backbone.device
        guesses = merge_candidates([self._chains(count)], max_nodes=step.max_nodes, max_depth=step.max_depth)
        for params in (SamplingParams(), SamplingParams(temperature=1.0)):
            sampling = SamplingBatch.of([params], vocab_size=config.vocab_size, device=device)
            batch = replace(self._running[count], sampling=sampling, candidates=guesses)
            for width in widths:
                for _ in range(2):
                    result = step.run(
                        batch, [width], max_length=self._prefix, rule=AcceptanceRule.LOSSLESS, wanted=Wanted()
                    )
                    step.cache.append(batch.slots, -to_device([len(result.tokens[0])], device))

    def _round(self) -> None:
        for count in self._batches:
            if self._is_recorded:
                self._plain_step(count)  # which leaves the state where the next one looks for it
            for _ in range(3 if count == 1 else 1):
                self._watch.time("plain", count, partial(self._plain_step, count))
        for count in self._rows:
            self._watch.time_on_device("pass", count, partial(self._tree_pass, self._inputs(count)))
        for count in self._prefill_rows:
            self._watch.time("prefill", count, partial(self._prefill_pass, count))
        for count in self._drafts.batches:
            self._tree_step(count)
        self._drafts.time(self._watch)

    @property
    def _is_recorded(self) -> bool:
        return self._watch.recorder is not None

    def _seconds(self, name: str, count: int) -> float:
        return self._watch.seconds(name, count, beside=("plain", 1))

    def _plain_step(self, count: int) -> None:
        batch, step = self._running[count], self._step
        plain = Wanted(draft=False)
        result = step.run(batch, [1] * count, max_length=self._prefix, rule=AcceptanceRule.LOSSLESS, wanted=plain)
        step.cache.append(batch.slots, -1)  # back to where it was: the next step is as long
        self._running[count] = result.batch

    def _tree_step(self, count: int) -> None:
        """What trees add to a step beside the rows of the pass: looking guesses up, merging, flattening, walking."""
        step, cache, device = self._step, self._step.cache, self._step.backbone.device
        batch = self._running[count]
        guesses = replace(batch, candidates=merge_candidates([self._chains(count)], max_nodes=step.max_nodes,
                                                             max_depth=step.max_depth))  # fmt: skip
        plain, cheap = Wanted(draft=False), Wanted(effort=Effort(costly=False))
        beside_pass = []
        for running, nodes, wanted in ((batch, 1, plain), (guesses, min(_TREE_NODES, step.max_nodes), cheap)):
            for _ in range(2 if self._is_recorded else 1):  # the second finds the state where the first has left it
                began = _now(device)
                result = step.run(
                    running, [nodes] * count, max_length=self._prefix, rule=AcceptanceRule.LOSSLESS, wanted=wanted
                )
                seconds = _now(device) - began - result.seconds.verify
                cache.append(batch.slots, -to_device([len(tokens) for tokens in result.tokens], device))
                running = result.batch
            beside_pass.append(seconds)
        merging = self._watch.time("merge", count, partial(self._merge, count))
        if self._is_recorded and device.type != "cpu":
            # All of it is in the recording; so few rows more cost the pass nothing.
            added, merging = beside_pass[1] - beside_pass[0], 0.0
        else:
            # A GPU does not tell how long its pass took: there it is the merge alone.
            added = beside_pass[1] - beside_pass[0] + merging if device.type == "cpu" else merging
        self._watch.keep("tree", count, max(added, merging))

    def _merge(self, count: int) -> None:
        """Random text gives a lookup nothing to find, and what is not found is not merged."""
        merge_candidates([self._chains(count)], max_nodes=self._step.max_nodes, max_depth=self._step.max_depth)

    def _chains(self, count: int) -> CandidateTree:
        device, size = self._step.backbone.device, max(self._step.max_nodes - 1, 1)
        tokens = torch.randint(self._step.backbone.config.vocab_size, (count, size), generator=self._generator)
        index = torch.arange(size, device=device).expand(count, -1)
        tokens = tokens.to(device)
        return CandidateTree(tokens, index - 1, -(index + 1).float(), torch.zeros_like(tokens), source="calibration")

    def _tree_pass(self, inputs: ForwardInputs) -> None:
        self._step.backbone.forward(inputs, self._step.cache)

    def _prefill_pass(self, num_rows: int, *, ends: bool = False) -> None:
        """A part of a prompt in the first slot, as it is run between steps."""
        stop = self._prefix + num_rows
        size = stop if ends else stop + 1
        # Which tokens they are costs nothing.
        chunk = PrefillChunk(self._slots[0], (0,) * size, start=self._prefix, stop=stop, prompt_length=size)
        self._step.run_prompts([chunk])
        self._step.cache.append(to_device(self._slots[:1], self._step.backbone.device), -num_rows)

    def _inputs(self, num_rows: int) -> ForwardInputs:
        """A chain of rows in the first slot, as a tree to verify."""
        device, cache = self._step.backbone.device, self._step.cache
        vocab_size = self._step.backbone.config.vocab_size
        index = torch.arange(num_rows, device=device)[None]
        slots = to_device(self._slots[:1], device)
        return ForwardInputs(
            tokens=torch.randint(vocab_size, (1, num_rows), generator=self._generator).to(device),
            depths=index,
            slots=slots,
            lengths=cache.lengths[slots],
            num_rows=to_device([num_rows], device),
            prompt_lengths=cache.lengths[slots],
            max_positions=min(2 * _PREFIX + num_rows, cache.num_positions),
            ancestors=ancestor_words(index - 1),
        )


def _running(step: SpeculativeStep, slots: Sequence[int], length: int) -> RunningBatch:
    device, config = step.backbone.device, step.backbone.config
    tokens = to_device([number % config.vocab_size for number in range(len(slots))], device)
    return RunningBatch(
        slots=to_device(slots, device),
        prompt_lengths=torch.full_like(tokens, length),
        root_tokens=tokens,
        hidden=step.backbone.embed(tokens),
        sampling=SamplingBatch.of([SamplingParams()] * len(slots), vocab_size=config.vocab_size, device=device),
        counts=None,
        candidates=None,
    )


def _recorder_of(step: SpeculativeStep) -> Recorder | None:
    return step.recorder if isinstance(step, GraphedStep) else None


def _rising(seconds: Sequence[float]) -> tuple[float, ...]:
    """More rows never cost less: a dip is noise, and would draw the budget to it."""
    return tuple(itertools.accumulate(seconds, max))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
