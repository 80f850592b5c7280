"""What the engine tells Prometheus. Names are vLLM's with the prefix `gorgon:`, so that dashboards can be carried over.

Acceptance rate = accepted / draft tokens; mean acceptance length = 1 + accepted / drafts; both from rates of the
counters. A step of one sequence counts as a draft where it verified more than the root; `decode_steps_total` has them
all, so that the share of plain steps can be told.

Everything is counted on the event loop out of what events carry anyway; the counts of a step are added up first, as
each addition to a metric takes a lock. What the engine itself counts of its graphs is read when the metrics are.
"""

from collections import Counter as Tally
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)

if TYPE_CHECKING:
    from gorgon_engine.events import FinishedEvent, TokenEvent
    from gorgon_engine.graphs import GraphStats
    from gorgon_engine.outcome import StepSeconds

_TTFT = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_TOKEN = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 2.5, 10.0)
_REQUEST = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0)
_NODES = (1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0)
_SPEEDUP = (0.5, 0.75, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0)


@dataclass(slots=True)
class StepTally:
    """The token events of one report, added up."""

    num_tokens: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted: int = 0
    num_plain: int = 0
    accepted_steps: Tally[int] = field(default_factory=Tally)  # accepted drafts of a step -> steps
    seconds: "StepSeconds | None" = None  # of the pass that all of them shared


class EngineMetrics:
    """The metrics of one engine process, in a registry of its own."""

    def __init__(self, *, num_running: Callable[[], float], num_waiting: Callable[[], float],
                 kv_cache_usage: Callable[[], float], is_ready: Callable[[], float],
                 graph_stats: "Callable[[], GraphStats | None]" = lambda: None) -> None:  # fmt: skip
        """The callables are asked when the metrics are. graph_stats: None where there are no graphs."""
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)

        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            Gauge(f"gorgon:{name}", text, registry=registry).set_function(value)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"gorgon:{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"gorgon:{name}", text, buckets=buckets, registry=registry)

        gauge("engine_ready", "1 while new requests are taken.", is_ready)
        gauge("num_requests_running", "Sequences in a slot.", num_running)
        gauge("num_requests_waiting", "Requests that wait for a slot.", num_waiting)
        gauge("kv_cache_usage_perc", "Share of the KV cache positions in use, 0 to 1.", kv_cache_usage)

        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that ended.")
        self._generation_tokens = counter("generation_tokens", "Tokens generated.")
        self._successes = counter("request_success", "Requests that finished.", "finished_reason")
        self._failures = counter("request_failure", "Requests that ended with an error or were refused.", "code")
        self._merged = counter("merged_messages", "Token messages joined to an earlier one for a slow reader.")

        self._ttft = histogram("time_to_first_token_seconds", "From a request's arrival to its first token.", _TTFT)
        self._inter_token = histogram(
            "inter_token_latency_seconds", "Seconds a token between two token messages, one value a message.", _TOKEN
        )
        self._e2e = histogram("e2e_request_latency_seconds", "From a request's arrival to its end.", _REQUEST)
        self._queue = histogram("request_queue_time_seconds", "Waiting for a slot.", _REQUEST)
        self._prefill = histogram("request_prefill_time_seconds", "From the slot to the first token.", _REQUEST)
        self._decode = histogram("request_decode_time_seconds", "From the first token to the last.", _REQUEST)
        self._speedup = histogram(
            "request_speedup", "A request's decode speed over plain decoding as measured at start-up.", _SPEEDUP
        )

        self._drafts = counter("spec_decode_num_drafts", "Trees verified, one a sequence and step.")
        self._draft_tokens = counter("spec_decode_num_draft_tokens", "Nodes verified, roots not counted.")
        self._accepted = counter("spec_decode_num_accepted_tokens", "Drafted tokens that were kept.")
        self._accepted_at = counter(
            "spec_decode_num_accepted_tokens_per_pos", "Kept at a depth of the tree, from 0.", "position"
        )
        self._tree_nodes = histogram(
            "spec_decode_tree_nodes", "Rows of a verification pass for one sequence, root included.", _NODES
        )
        self._steps = counter("decode_steps", "Steps of a sequence.", "kind")
        self._step_seconds = counter("step_seconds", "Time of the engine's steps.", "verb")
        self._swaps = counter("heads_swaps", "New draft heads: taken up or refused.", "result")
        self._plain = Gauge(
            "gorgon:plain_tokens_per_second", "A stream's plain decoding as measured at start-up.", ("batch_size",),
            registry=registry,
        )  # fmt: skip
        self._heads = Gauge(
            "gorgon:heads_info", "The draft heads in use.", ("name", "version", "family"), registry=registry
        )
        self._engine = Info("gorgon:engine", "What is served, and on what.", registry=registry)
        self._graph_stats = graph_stats
        self._seen: dict[Counter, float] = {}  # by `_raise_to`
        self._graph_steps = counter(
            "graph_steps", "Steps of the batch and passes over prompts on a GPU, by how they were launched.", "kind"
        )
        self._eager_steps = counter(
            "graph_eager_steps", "Steps and passes over prompts without a graph, by the reason.", "reason"
        )
        self._capture_seconds = counter("graph_capture_seconds", "Time spent recording graphs.")
        self._num_graphs = Gauge("gorgon:num_graphs", "CUDA graphs held.", registry=registry)
        for kind in ("plain", "speculative"):
            self._steps.labels(kind)
        for kind in ("replayed", "first_run", "eager"):
            self._graph_steps.labels(kind)
        for result in ("taken", "refused"):
            self._swaps.labels(result)

    def render(self) -> bytes:
        """The text format, version 0.0.4."""
        stats = self._graph_stats()
        if stats is not None:
            self._add_graphs(stats)
        return generate_latest(self.registry)

    def describe(self, *, model: str, backbone: str, kernels: str, graphs: bool, device: str, version: str) -> None:
        """graphs: whether steps are launched as such."""
        self._engine.info(
            {
                "model": model,
                "backbone": backbone,
                "kernels": kernels,
                "graphs": "yes" if graphs else "no",
                "device": device,
                "version": version,
            }
        )

    def set_plain_speed(self, batch_size: int, tokens_per_second: float) -> None:
        self._plain.labels(str(batch_size)).set(tokens_per_second)

    def set_heads(self, name: str, version: str, family: str) -> None:
        self._heads.clear()
        self._heads.labels(name, version, family).set(1)

    def clear_heads(self) -> None:
        self._heads.clear()

    def swap(self, *, taken: bool) -> None:
        self._swaps.labels("taken" if taken else "refused").inc()

    def refused(self, code: str) -> None:
        """A request that was never submitted, or that ended with an error."""
        self._failures.labels(code).inc()

    def tally(self, tally: StepTally, event: "TokenEvent") -> None:
        """Add one sequence's part of a step."""
        tally.num_tokens += len(event.token_ids)
        if event.step == 0:  # the token of a prefill: nothing was verified
            return
        tally.seconds = event.seconds
        self._tree_nodes.observe(event.num_nodes)
        if event.num_nodes <= 1:
            tally.num_plain += 1
            return
        # Where an answer ends inside of a branch its last draft is no bonus token, but counts as one: as everywhere,
        # tokens = 1 + steps + accepted.
        num_accepted = len(event.token_ids) - 1
        tally.num_drafts += 1
        tally.num_draft_tokens += event.num_nodes - 1
        tally.num_accepted += num_accepted
        tally.accepted_steps[num_accepted] += 1

    def add(self, tally: StepTally) -> None:
        if tally.num_tokens:
            self._generation_tokens.inc(tally.num_tokens)
        if tally.num_plain:
            self._steps.labels("plain").inc(tally.num_plain)
        if tally.seconds is not None:
            for verb in ("draft", "verify", "accept", "commit"):
                self._step_seconds.labels(verb).inc(getattr(tally.seconds, verb))
        if not tally.num_drafts:
            return
        self._steps.labels("speculative").inc(tally.num_drafts)
        self._drafts.inc(tally.num_drafts)
        self._draft_tokens.inc(tally.num_draft_tokens)
        self._accepted.inc(tally.num_accepted)
        reached = 0
        for position in range(max(tally.accepted_steps) - 1, -1, -1):
            reached += tally.accepted_steps[position + 1]
            self._accepted_at.labels(str(position)).inc(reached)

    def _add_graphs(self, stats: "GraphStats") -> None:
        """What has come since the last time. The model's thread goes on counting meanwhile: plain numbers, each read
        once, which no lock and no device is waited for."""
        eager = dict(stats.num_eager)
        for kind, count in (
            ("replayed", stats.num_replayed),
            ("first_run", stats.num_first_runs),
            ("eager", sum(eager.values())),
        ):
            self._raise_to(self._graph_steps.labels(kind), count)
        for reason, count in eager.items():
            self._raise_to(self._eager_steps.labels(reason), count)
        self._raise_to(self._capture_seconds, stats.capture_seconds)
        self._num_graphs.set(stats.num_graphs)

    def _raise_to(self, counter: Counter, value: float) -> None:
        counter.inc(value - self._seen.get(counter, 0.0))
        self._seen[counter] = value

    def between_messages(self, seconds: float, num_tokens: int) -> None:
        self._inter_token.observe(seconds / max(num_tokens, 1))

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def finished(self, event: "FinishedEvent", *, e2e_seconds: float, speedup: float | None) -> None:
        """A request that ran to its end, or was cancelled by its client."""
        self._successes.labels(event.finish_reason.value).inc()
        self._prompt_tokens.inc(event.usage.prompt_tokens)
        self._e2e.observe(e2e_seconds)
        for histogram, value in (
            (self._queue, event.queue_seconds),
            (self._prefill, event.prefill_seconds),
            (self._decode, event.decode_seconds),
            (self._speedup, speedup),
        ):
            if value is not None:
                histogram.observe(value)

    def merged(self, count: int) -> None:
        if count:
            self._merged.inc(count)
