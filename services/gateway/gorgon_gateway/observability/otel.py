"""OpenTelemetry: spans, and the GenAI conventions' metrics of a server, sent by OTLP over HTTP.

The SDK reads its own variables: `OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_SERVICE_NAME`,
`OTEL_TRACES_SAMPLER`, `OTEL_METRIC_EXPORT_INTERVAL`. It sends on threads of its own, so that no request waits for it.
"""

import os
from collections.abc import Mapping
from typing import Final

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import NonRecordingSpan, SpanContext, StatusCode, TraceFlags, TraceState

from gorgon_gateway.observability.tracing import AttributeValue, Span, SpanKind, TraceContext

_KINDS: Final = {"server": trace.SpanKind.SERVER, "internal": trace.SpanKind.INTERNAL}

# Of the conventions: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/
_DURATION: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_PER_TOKEN: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_TTFT: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)


class OpenTelemetry:
    """Providers of its own: nothing global is set."""

    def __init__(self) -> None:
        resource = Resource.create({} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: "gorgon-gateway"})
        self._traces = TracerProvider(resource=resource)
        self._traces.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._traces.get_tracer("gorgon_gateway")
        reader = PeriodicExportingMetricReader(OTLPMetricExporter())
        self._meters = MeterProvider(resource=resource, metric_readers=[reader])
        meter = self._meters.get_meter("gorgon_gateway")
        self._duration = meter.create_histogram(
            "gen_ai.server.request.duration",
            unit="s",
            description="From a request's arrival to its end.",
            explicit_bucket_boundaries_advisory=_DURATION,
        )
        self._per_token = meter.create_histogram(
            "gen_ai.server.time_per_output_token",
            unit="s",
            description="Seconds a token behind the first one.",
            explicit_bucket_boundaries_advisory=_PER_TOKEN,
        )
        self._ttft = meter.create_histogram(
            "gen_ai.server.time_to_first_token",
            unit="s",
            description="From a request's arrival to its first token.",
            explicit_bucket_boundaries_advisory=_TTFT,
        )

    def start(
        self, name: str, *, kind: SpanKind, parent: TraceContext | None, attributes: Mapping[str, AttributeValue]
    ) -> Span:
        context = None
        if parent is not None:
            context = trace.set_span_in_context(NonRecordingSpan(_to_otel(parent)))
        return _OtelSpan(self._tracer.start_span(name, context=context, kind=_KINDS[kind], attributes=dict(attributes)))

    def generation_ended(
        self,
        attributes: Mapping[str, AttributeValue],
        *,
        duration_seconds: float,
        ttft_seconds: float | None,
        seconds_per_token: float | None,
    ) -> None:
        labels = dict(attributes)
        self._duration.record(duration_seconds, labels)
        if ttft_seconds is not None:
            self._ttft.record(ttft_seconds, labels)
        if seconds_per_token is not None:
            self._per_token.record(seconds_per_token, labels)

    def close(self) -> None:
        self._traces.shutdown()
        self._meters.shutdown()


class _OtelSpan:
    __slots__ = ("_span", "context")

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        own = span.get_span_context()
        self.context = TraceContext(
            trace_id=trace.format_trace_id(own.trace_id),
            span_id=trace.format_span_id(own.span_id),
            flags=int(own.trace_flags),
            state=own.trace_state.to_header(),
        )

    def set(self, attributes: Mapping[str, AttributeValue]) -> None:
        self._span.set_attributes(dict(attributes))

    def end(self, *, error: str | None = None) -> None:
        if error is not None:
            self._span.set_attribute("error.type", error)
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


def _to_otel(context: TraceContext) -> SpanContext:
    return SpanContext(
        trace_id=int(context.trace_id, 16),
        span_id=int(context.span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(context.flags),
        trace_state=TraceState.from_header([context.state]) if context.state else None,
    )
