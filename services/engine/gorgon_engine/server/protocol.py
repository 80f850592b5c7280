"""uvicorn's HTTP protocol with what it lacks: an end to silent connections, and a way to drop one."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_EXTENSION = "gorgon.transport"


def http_protocol(header_seconds: float) -> type[HttpToolsProtocol]:
    """A protocol class for uvicorn's `http` setting.

    header_seconds: a new connection has until its first request's headers are complete, and a later request's from its
    first byte; uvicorn itself would wait for ever.
    """

    class EngineProtocol(HttpToolsProtocol):
        _header_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._await_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._have_headers()
            super().connection_lost(exc)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.scope["extensions"] = {_EXTENSION: {"transport": self.transport}}
            if self._header_timer is None:
                self._await_headers()

        def on_headers_complete(self) -> None:
            self._have_headers()
            super().on_headers_complete()

        def _await_headers(self) -> None:
            self._header_timer = self.loop.call_later(header_seconds, self.transport.abort)

        def _have_headers(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

    return EngineProtocol


def abort_connection(scope: Scope) -> None:
    """Drop the connection of a request together with what was not read of it."""
    _transport(scope).abort()


@contextmanager
def unbuffered(scope: Scope) -> Iterator[None]:
    """Within the block a write waits until the system has taken everything that was written before."""
    transport = _transport(scope)
    if not transport.is_closing():
        transport.set_write_buffer_limits(0)
    try:
        yield
    finally:
        if not transport.is_closing():
            transport.set_write_buffer_limits()


def _transport(scope: Scope) -> asyncio.Transport:
    extension: dict[str, Any] = scope["extensions"][_EXTENSION]
    transport: asyncio.Transport = extension["transport"]
    return transport
