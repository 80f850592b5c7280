"""What a training job tells Prometheus: names with the prefix `gorgon_trainer:`, beside the engine's `gorgon:`.

Everything comes from where it is counted anyway, on the main process alone, and never makes the host wait for a device:
steps and positions with every step, losses when they are logged. What is not known yet is absent, not 0: a loss of 0 or
a checkpoint of 1970 would be wrong on every panel.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

Stage = Literal["data", "distill", "train", "evaluate", "publish"]
Result = Literal["finished", "failed"]
STAGES: Final[tuple[Stage, ...]] = get_args(Stage)
RESULTS: Final[tuple[Result, ...]] = get_args(Result)


class _Figure(Collector):
    """A gauge that is absent while its value is None. One thread writes it: setting it takes no lock."""

    def __init__(self, name: str, text: str, registry: CollectorRegistry) -> None:
        self._name = f"gorgon_trainer:{name}"
        self._text = text
        self.value: float | None = None
        registry.register(self)

    def add(self, amount: float) -> float:
        """What it is now. Only once it has been set."""
        assert self.value is not None
        self.value += amount
        return self.value

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(self._name, self._text)
        value = self.value
        if value is not None:
            family.add_metric((), value)
        yield family


@dataclass(frozen=True, slots=True)
class _Pace:
    """How fast a stage has gone since it began here: what an earlier call did took no time of this one."""

    began: float
    first: float
    last: float
    max_seconds: float | None = None

    def seconds_left(self, done: float) -> float | None:
        """None before anything is done."""
        if done <= self.first:
            return None
        seconds = time.monotonic() - self.began
        left = seconds / (done - self.first) * (self.last - done)
        return left if self.max_seconds is None else min(left, max(0.0, self.max_seconds - seconds))


class TrainerMetrics:
    """The metrics of one training job, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def figure(name: str, text: str) -> _Figure:
            return _Figure(name, text, registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"gorgon_trainer:{name}", text, labels, registry=registry)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"gorgon_trainer:{name}", text, registry=registry)

        self._stage = gauge("stage", "1 for the stage under way, 0 for the others.", "stage")
        self._seconds_left = figure("seconds_left", "Of the stage under way, at its pace so far.")
        self._outcome = gauge("outcome", "1 for how the job ended; all 0 while it runs.", "result")

        self._distilled_tokens = counter("distilled_tokens", "Tokens that the backbone has answered.")
        self._prompts_left = figure("prompts_left", "Prompts that this process has still to put to the backbone.")
        self._shards_left = figure("shards_left", "Shards of answers that this process has still to write.")

        self._step = figure("step", "Optimizer steps done, those before the run was resumed too.")
        self._max_steps = figure("max_steps", "Optimizer steps of the whole run, unless it stops early.")
        self._positions = counter("positions", "Positions with a target trained on, by all processes together.")
        self._loss = figure("loss", "Training loss: the weighted sum over the heads.")
        self._head_loss = gauge("head_loss", "Training loss of a head.", "head")
        self._learning_rate = figure("learning_rate", "Of the step that was logged last.")
        self._acceptance_length = figure(
            "held_out_acceptance_length", "Tokens a step expected of a tree of 32 rows on held-out answers."
        )
        self._accuracy = gauge(
            "held_out_accuracy", "Share of held-out positions where a head's first choice is right.", "head"
        )
        self._checkpoint_step = figure("checkpoint_step", "Step at which the run was last saved.")
        self._checkpoint_timestamp = figure("checkpoint_timestamp_seconds", "When the run was last saved, Unix time.")
        self._published = gauge("published_info", "The heads that this job has published.", "name", "version")

        self._prompts = _Pace(0.0, 0.0, 0.0)
        self._steps = _Pace(0.0, 0.0, 0.0)
        for stage in STAGES:
            self._stage.labels(stage)
        for result in RESULTS:
            self._outcome.labels(result)

    def render(self) -> bytes:
        """The text format, `CONTENT_TYPE`."""
        return generate_latest(self.registry)

    def begin(self, stage: Stage) -> None:
        for one in STAGES:
            self._stage.labels(one).set(one == stage)
        self._seconds_left.value = None

    def ended(self, result: Result) -> None:
        self._outcome.labels(result).set(1)

    def distilling(self, *, num_prompts: int, num_shards: int, max_seconds: float | None) -> None:
        """What there is to do; max_seconds: after which no more is begun."""
        self.begin("distill")
        self._prompts = _Pace(time.monotonic(), 0, num_prompts, max_seconds)
        self._prompts_left.value, self._shards_left.value = num_prompts, num_shards

    def answered(self, num_tokens: int) -> None:
        self._distilled_tokens.inc(num_tokens)

    def prompt_ended(self) -> None:
        """With all of its turns, or dropped."""
        left = self._prompts_left.add(-1)
        self._seconds_left.value = self._prompts.seconds_left(self._prompts.last - left)

    def shard_written(self) -> None:
        self._shards_left.add(-1)

    def training(self, *, step: int, max_steps: int, saved_at: float | None) -> None:
        """step: where the run goes on; saved_at: since when that is on the disk, Unix time, None for a new run."""
        self.begin("train")
        self._steps = _Pace(time.monotonic(), step, max_steps)
        self._step.value, self._max_steps.value = step, max_steps
        if saved_at is not None:
            self._checkpoint_step.value, self._checkpoint_timestamp.value = step, saved_at

    def stepped(self, step: int, num_positions: int) -> None:
        """num_positions: of this step. For every step, so it must stay cheap."""
        self._step.value = step
        self._positions.inc(num_positions)

    def logged(self, record: Mapping[str, Any]) -> None:
        """record: a line of the run's history."""
        self._seconds_left.value = self._steps.seconds_left(record["step"])
        self._loss.value, self._learning_rate.value = record["loss"], record["learning_rate"]
        for head, loss in enumerate(record["head_losses"], 1):
            self._head_loss.labels(str(head)).set(loss)
        if "held_out" in record:
            self._acceptance_length.value = record["held_out"]["acceptance_length"]
            for head, row in enumerate(record["held_out"]["accuracies"], 1):
                self._accuracy.labels(str(head)).set(row[0])

    def saved(self, step: int) -> None:
        self._checkpoint_step.value, self._checkpoint_timestamp.value = step, time.time()

    def published(self, name: str, version: str) -> None:
        self._published.labels(name, version).set(1)
