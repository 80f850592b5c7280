"""What the gateway tells Prometheus. Names are vLLM's where it has them, all with the prefix `gorgon_gateway:`: the
engine's own are `gorgon:`, so that no sum counts a request twice.

What happens for every message is counted in plain numbers, without locks: the event loop alone writes and reads them.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Info,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

# The boundaries of OpenTelemetry's GenAI conventions are coarser; these are the engine's, so that panels line up.
_TTFT = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_TOKEN = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 2.5, 10.0)
_REQUEST = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0)
FINISH_REASONS: Final = ("stop", "length", "cancelled")


class LoopHistogram(Collector):
    """A histogram that one thread alone writes and reads: an observation costs a search in a short tuple."""

    def __init__(self, name: str, text: str, buckets: tuple[float, ...], registry: CollectorRegistry) -> None:
        self._name = name
        self._text = text
        self._bounds = buckets
        self._counts = [0] * (len(buckets) + 1)  # the last one: above every bound
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        buckets: list[tuple[str, float]] = []
        total = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)


class GatewayMetrics:
    """The metrics of one gateway process, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"gorgon_gateway:{name}", text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"gorgon_gateway:{name}", text, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> LoopHistogram:
            return LoopHistogram(f"gorgon_gateway:{name}", text, buckets, registry)

        self._http = counter("http_requests", "HTTP requests answered.", "route", "method", "code")
        self._running = gauge("num_requests_running", "Generations under way, those that wait for an engine too.")
        self._successes = counter("request_success", "Generations that finished.", "finished_reason")
        self._failures = counter("request_failure", "Generations refused, or ended by an error.", "code")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of generations that finished.")
        self._generation_tokens = counter("generation_tokens", "Tokens passed on to clients.")

        self._ttft = histogram("time_to_first_token_seconds", "From a request's arrival to its first token.", _TTFT)
        self._inter_token = histogram(
            "inter_token_latency_seconds", "Seconds a token between two token messages, one value a message.", _TOKEN
        )
        self._e2e = histogram("e2e_request_latency_seconds", "From a request's arrival to its end.", _REQUEST)
        self._per_token = histogram(
            "request_time_per_output_token_seconds",
            "Seconds a token behind the first one, a generation's mean.",
            _TOKEN,
        )

        self._retries = counter("retries", "Generations sent to another engine before anything came.")
        self._resumptions = counter("resumptions", "Generations that another engine went on with.")
        self._rate_limited = counter("rate_limited", "Generations refused by a limit of their caller.", "limit")
        self._fallbacks = counter("limiter_fallbacks", "Admissions counted in process, as Redis gave no answer.")
        self._redis_up = gauge("limiter_redis_up", "1 while limits are counted in Redis; absent without Redis.")
        self._slow_readers = counter("slow_readers", "Streams ended as their reader stood still.")
        self._merged = counter("merged_messages", "Token messages joined to an earlier one for a slow reader.")
        self._websockets = gauge("websocket_connections", "Open WebSockets.")
        self._engines_known = gauge("engines_known", "Engines in the directory.")
        self._engines_ready = gauge("engines_ready", "Engines that take requests.")
        self._info = Info("gorgon_gateway:build", "The gateway's version.", registry=registry)

        registry.unregister(self._redis_up)  # until there is a Redis to tell about
        self._tells_redis = False
        for reason in FINISH_REASONS:
            self._successes.labels(reason)
        for limit in ("concurrent", "requests", "tokens", "day"):
            self._rate_limited.labels(limit)

    def render(self) -> bytes:
        """The text format, `CONTENT_TYPE`."""
        return generate_latest(self.registry)

    def describe(self, *, version: str) -> None:
        self._info.info({"version": version})

    def watch_engines(self, *, known: Callable[[], float], ready: Callable[[], float]) -> None:
        """The callables are asked when the metrics are."""
        self._engines_known.set_function(known)
        self._engines_ready.set_function(ready)

    def http_request(self, *, route: str, method: str, code: int) -> None:
        self._http.labels(route, method, str(code)).inc()

    def generation_begun(self) -> None:
        self._running.inc()

    def generation_ended(
        self,
        reason: str,
        *,
        e2e_seconds: float,
        ttft_seconds: float | None,
        seconds_per_token: float | None,
        num_prompt_tokens: int,
        num_tokens: int,
    ) -> None:
        """reason: a `finish_reason`, the code of an error, or `abandoned`; seconds_per_token: behind the first one."""
        self._running.dec()
        self._e2e.observe(e2e_seconds)
        if ttft_seconds is not None:
            self._ttft.observe(ttft_seconds)
        if seconds_per_token is not None:
            self._per_token.observe(seconds_per_token)
        if num_prompt_tokens:
            self._prompt_tokens.inc(num_prompt_tokens)
        if num_tokens:
            self._generation_tokens.inc(num_tokens)
        if reason in FINISH_REASONS:
            self._successes.labels(reason).inc()
        else:
            self._failures.labels(reason).inc()

    def between_messages(self, seconds: float, num_tokens: int) -> None:
        """For every token message but a generation's first, so it must stay cheap."""
        self._inter_token.observe(seconds / (num_tokens or 1))

    def retried(self, count: int = 1) -> None:
        self._retries.inc(count)

    def resumed(self, count: int = 1) -> None:
        self._resumptions.inc(count)

    def rate_limited(self, limit: str) -> None:
        self._rate_limited.labels(limit).inc()

    def limiter_redis_up(self, up: bool) -> None:
        if not self._tells_redis:
            self._tells_redis = True
            self.registry.register(self._redis_up)
        self._redis_up.set(1 if up else 0)

    def limiter_fell_back(self) -> None:
        self._fallbacks.inc()

    def slow_reader(self) -> None:
        self._slow_readers.inc()

    def merged(self, count: int) -> None:
        if count:
            self._merged.inc(count)

    def websocket_opened(self) -> None:
        self._websockets.inc()

    def websocket_closed(self) -> None:
        self._websockets.dec()
