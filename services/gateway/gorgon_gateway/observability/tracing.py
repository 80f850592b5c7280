"""Where a request stands in a distributed trace: W3C Trace Context in and out, and OpenTelemetry where configured.

Without OpenTelemetry a request still carries its trace from the caller to the engine, under an id of its own, and the
logs name it. With `OTEL_EXPORTER_OTLP_ENDPOINT` set, spans and metrics go there by OTLP over HTTP (`otel.py`).

Source: W3C Trace Context, level 1 (https://www.w3.org/TR/trace-context-1/).
"""

import re
import secrets
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final, Literal, Protocol

_TRACEPARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_MAX_TRACESTATE: Final = 512
_SAMPLED: Final = 1

AttributeValue = str | bool | int | float | list[str]
SpanKind = Literal["server", "internal"]


@dataclass(frozen=True, slots=True)
class TraceContext:
    """trace_id: 32, span_id: 16 lower-case hexadecimal digits."""

    trace_id: str
    span_id: str
    flags: int = 0
    state: str = ""

    @property
    def is_sampled(self) -> bool:
        return bool(self.flags & _SAMPLED)

    def child(self) -> "TraceContext":
        """Of the same trace, with a span id of its own."""
        return TraceContext(self.trace_id, _new_id(8), self.flags, self.state)

    def headers(self) -> dict[str, str]:
        """What the next service is sent."""
        headers = {"traceparent": f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"}
        if self.state:
            headers["tracestate"] = self.state
        return headers


class Span(Protocol):
    """One piece of work; `end` exactly once."""

    @property
    def context(self) -> TraceContext: ...

    def set(self, attributes: Mapping[str, AttributeValue]) -> None: ...

    def end(self, *, error: str | None = None) -> None:
        """error: the code of what went wrong."""


class Telemetry(Protocol):
    """Where spans and the GenAI metrics go."""

    def start(
        self, name: str, *, kind: SpanKind, parent: TraceContext | None, attributes: Mapping[str, AttributeValue]
    ) -> Span: ...

    def generation_ended(
        self,
        attributes: Mapping[str, AttributeValue],
        *,
        duration_seconds: float,
        ttft_seconds: float | None,
        seconds_per_token: float | None,
    ) -> None: ...

    def close(self) -> None:
        """Send what is still here. May block for seconds."""


class NoTelemetry:
    """Gives ids and records nothing."""

    def start(
        self, name: str, *, kind: SpanKind, parent: TraceContext | None, attributes: Mapping[str, AttributeValue]
    ) -> Span:
        return _PlainSpan(TraceContext(_new_id(16), _new_id(8)) if parent is None else parent.child())

    def generation_ended(
        self,
        attributes: Mapping[str, AttributeValue],
        *,
        duration_seconds: float,
        ttft_seconds: float | None,
        seconds_per_token: float | None,
    ) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _PlainSpan:
    context: TraceContext

    def set(self, attributes: Mapping[str, AttributeValue]) -> None:
        pass

    def end(self, *, error: str | None = None) -> None:
        pass


def make_telemetry(environment: Mapping[str, str]) -> Telemetry:
    """OpenTelemetry where `OTEL_EXPORTER_OTLP_ENDPOINT` is set and `OTEL_SDK_DISABLED` is not. environment:
    `os.environ`; OpenTelemetry reads its other variables (headers, sampler, service name, intervals) itself."""
    if environment.get("OTEL_EXPORTER_OTLP_ENDPOINT") and environment.get("OTEL_SDK_DISABLED", "").lower() != "true":
        from gorgon_gateway.observability.otel import OpenTelemetry  # the SDK takes 0.3 s to import

        return OpenTelemetry()
    return NoTelemetry()


# Of the request that the running task works on; set by the middleware, seen by the tasks that the request starts.
current_context: Final[ContextVar[TraceContext | None]] = ContextVar("gorgon_trace_context", default=None)


def read_context(traceparent: str | None, tracestate: str = "") -> TraceContext | None:
    """The caller's context; None where there is none or it is not well-formed (then a new trace begins)."""
    match = _TRACEPARENT.fullmatch(traceparent.strip()) if traceparent else None
    if match is None:
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    if version == "ff" or (version == "00" and rest) or set(trace_id) == {"0"} or set(span_id) == {"0"}:
        return None
    state = tracestate.strip()
    if len(state) > _MAX_TRACESTATE or not (state.isascii() and state.isprintable()):
        state = ""
    return TraceContext(trace_id, span_id, int(flags, 16) & _SAMPLED, state)


def _new_id(num_bytes: int) -> str:
    while not int(text := secrets.token_hex(num_bytes), 16):
        pass  # all zeros is no id
    return text


def outgoing_headers() -> dict[str, str]:
    """What the engine is sent about the trace of the request that the running task works on."""
    context = current_context.get()
    return {} if context is None else context.headers()
