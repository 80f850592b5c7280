"""Around every request and WebSocket: an id, its place in a trace, one line of the access log, a count.

Pure ASGI: nothing is buffered, and a body chunk or a frame costs one call more.
"""

import re
import secrets
import time
from dataclasses import dataclass
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, reset_contextvars

from gorgon_gateway.observability.logs import logger
from gorgon_gateway.observability.metrics import GatewayMetrics
from gorgon_gateway.observability.tracing import Span, Telemetry, current_context, read_context

REQUEST_ID_HEADER: Final = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,99}")  # room for a choice's number in an engine's 128
_QUIET_ROUTES: Final = frozenset({"/health/live", "/health/ready", "/metrics"})
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "WEBSOCKET"})
_CLIENT_GONE: Final = 499  # nginx's, for the log alone


@dataclass(slots=True)
class RequestRecord:
    """What is known about a request; routes add what they learn. At `scope["state"]["record"]`."""

    request_id: str
    caller_id: str | None = None
    error_code: str | None = None


def record_of(scope: Scope) -> RequestRecord:
    """Of a request that came through `RequestMiddleware`."""
    record = scope["state"]["record"]
    assert isinstance(record, RequestRecord)
    return record


class RequestMiddleware:
    """The outermost middleware of the gateway."""

    def __init__(self, app: ASGIApp, *, metrics: GatewayMetrics, telemetry: Telemetry) -> None:
        self._app = app
        self._metrics = metrics
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = _headers(scope, b"x-request-id", b"traceparent", b"tracestate")
        given = headers[0]
        record = RequestRecord(given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16))
        scope["state"] = {**scope.get("state", {}), "record": record}
        method = str(scope.get("method", "WEBSOCKET"))
        span = self._telemetry.start(
            method,
            kind="server",
            parent=read_context(headers[1], headers[2]),
            attributes={
                "http.request.method": method,
                "url.path": scope["path"][:200],
                "gorgon.request_id": record.request_id,
            },
        )
        watched = _Watched(scope, receive, send, record)
        trace = current_context.set(span.context)
        logged = bind_contextvars(request_id=record.request_id, trace_id=span.context.trace_id)
        try:
            await self._app(scope, watched.receive, watched.send)
        except Exception:
            watched.status = watched.status or 500
            raise
        finally:
            self._ended(watched, span, method)
            reset_contextvars(**logged)
            current_context.reset(trace)

    def _ended(self, watched: "_Watched", span: Span, method: str) -> None:
        scope, record = watched.scope, watched.record
        route = _route(scope)
        status = watched.status or _CLIENT_GONE
        if scope["type"] == "http":
            self._metrics.http_request(route=route, method=method if method in _METHODS else "other", code=status)
        span.set({"http.route": route, "http.response.status_code": status})
        span.end(error=record.error_code or (str(status) if status >= 500 else None))
        log = logger()
        write = log.debug if route in _QUIET_ROUTES and status < 400 else log.info
        client = scope.get("client")
        write(
            "request",
            method=method,
            path=scope["path"][:500],
            route=route,
            status=status,
            seconds=round(time.perf_counter() - watched.started_at, 6),
            client=client[0] if client else None,
            caller=record.caller_id,
            **({} if record.error_code is None else {"code": record.error_code}),
        )


class _Watched:
    """One request's channels."""

    __slots__ = ("_receive", "_send", "record", "scope", "started_at", "status")

    def __init__(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord) -> None:
        self.scope = scope
        self.record = record
        self.started_at = time.perf_counter()
        self.status: int | None = None  # of HTTP; of a WebSocket 101, or what it was closed with
        self._receive = receive
        self._send = send

    async def receive(self) -> Message:
        return await self._receive()

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)[REQUEST_ID_HEADER] = self.record.request_id
        elif kind == "websocket.accept":
            self.status = 101
            MutableHeaders(scope=message)[REQUEST_ID_HEADER] = self.record.request_id
        elif kind == "websocket.close" and self.status is None:
            self.status = 403  # closed before it was accepted: what the server answers
        elif kind == "websocket.http.response.start":
            self.status = message["status"]
        await self._send(message)


def _headers(scope: Scope, *names: bytes) -> list[str]:
    found: dict[bytes, str] = {}
    for name, value in scope["headers"]:
        if name in names:
            text = value.decode("latin-1")
            # Several tracestate headers are one list; of the others several are none.
            found[name] = f"{found[name]},{text}" if name in found else text
    return [found.get(name, "") for name in names]


def _route(scope: Scope) -> str:
    """The path's template: a path itself would make a metric without bounds."""
    path = getattr(scope.get("route") or _serving(scope), "path", None)
    return path if isinstance(path, str) else "other"


def _serving(scope: Scope) -> object:
    """The route of a WebSocket or of a mounted application: FastAPI tells of those only what serves them."""
    endpoint = scope.get("endpoint")
    if endpoint is None:
        return None
    routes = scope["app"].routes
    return next((r for r in routes if endpoint in (getattr(r, "endpoint", None), getattr(r, "app", None))), None)
