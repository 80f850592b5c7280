"""uvicorn's connections with an end to every wait: for headers, for a reader, for a closing handshake.

uvicorn alone keeps half-sent headers and silent sockets for ever, and a connection whose client reads nothing.
"""

import asyncio
from typing import Any, Final, cast

import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame, Opcode

from gorgon_gateway.responses import error_fields
from gorgon_gateway.settings import GatewaySettings
from gorgon_protocol.errors import BadRequestError, GorgonError, SlowReaderError, TooLargeError

_LINGER_SECONDS: Final = 5.0  # for the last words to be read
_NORMAL_CLOSE, _BAD_TEXT, _TOO_SLOW, _TOO_LARGE = 1000, 1007, 1008, 1009


class GatewayConfig(uvicorn.Config):
    """uvicorn's configuration with the gateway's settings, which its connections read."""

    gateway: GatewaySettings


def _settings(config: uvicorn.Config) -> GatewaySettings:
    return cast(GatewayConfig, config).gateway


class GatewayHttpProtocol(HttpToolsProtocol):
    """Closes connections that send no complete headers in time, and those whose response is not read."""

    def __init__(self, config: uvicorn.Config, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._is_upgraded = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _settings(self.config).max_connections:
            self._refuse(b"503 Service Unavailable", b"Retry-After: 5\r\n", "unavailable", "too many connections")
        else:
            self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        is_waiting = self.cycle is None or self.cycle.response_complete
        if is_waiting and self._header_timer is None and not self._is_upgraded and not self.transport.is_closing():
            self._await_headers()

    def on_headers_complete(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        super().on_headers_complete()

    def handle_websocket_upgrade(self) -> None:
        self._is_upgraded = True
        self._stop_timers()
        super().handle_websocket_upgrade()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timer is None:
            seconds = _settings(self.config).slow_reader_seconds
            self._stall_timer = self.loop.call_later(seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _await_headers(self) -> None:
        self._header_timer = self.loop.call_later(_settings(self.config).header_seconds, self._give_up)

    def _give_up(self) -> None:
        self._header_timer = None
        if not self.transport.is_closing():
            self._refuse(b"408 Request Timeout", b"", "timeout", "the request's headers did not arrive in time")

    def _refuse(self, status: bytes, headers: bytes, code: str, message: str) -> None:
        body = orjson.dumps({"error": {"code": code, "message": message, "retry_after_seconds": None}})
        length = str(len(body)).encode()
        self.transport.write(
            b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %b\r\n%bConnection: close\r\n\r\n%b"
            % (status, length, headers, body)
        )
        self.transport.close()

    def _stop_timers(self) -> None:
        for timer in (self._header_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        self._header_timer = self._stall_timer = None


class GatewayWebSocketProtocol(WebSocketsSansIOProtocol):
    """Tells a client what was wrong before it closes, and never waits for one that does not read."""

    def __init__(self, config: uvicorn.Config, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._stall_timer: asyncio.TimerHandle | None = None
        self._end_timer: asyncio.TimerHandle | None = None
        self._has_failed = False
        self._is_lost = False

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        self._stop_stall_timer()
        if self._end_timer is not None:
            self._end_timer.cancel()
        super().connection_lost(exc)

    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        super().on_task_complete(task)
        self._end_soon()

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body", False):
            # A refusal in full is an answer, and no error of this program's to be logged.
            self.handshake_complete = True

    def data_received(self, data: bytes) -> None:
        if not self._has_failed:  # else: what comes until the client has closed
            super().data_received(data)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timer is None and not self._has_failed:
            self._stall_timer = self.loop.call_later(_settings(self.config).slow_reader_seconds, self._stalled)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_stall_timer()

    def send_receive_event_to_app(self) -> None:
        if self.curr_msg_data_type == "text":
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:
                # RFC 6455, 8.1: the connection must fail.
                self._fail(BadRequestError("this is not JSON in UTF-8: the connection ends here"), _BAD_TEXT)
                return
        super().send_receive_event_to_app()

    def handle_parser_exception(self) -> None:
        closing = self.conn.close_sent
        code = closing.code if closing is not None else _NORMAL_CLOSE
        error: GorgonError = BadRequestError("the connection broke the WebSocket protocol")
        if code == _TOO_LARGE:
            error = TooLargeError(f"the message is larger than {_settings(self.config).max_body_bytes} bytes")
        elif code == _BAD_TEXT:
            error = BadRequestError("this is not JSON in UTF-8: the connection ends here")
        self._fail(error, code)

    def _stalled(self) -> None:
        self._stall_timer = None
        if self.transport.is_closing():
            self.transport.abort()
            return
        seconds = _settings(self.config).slow_reader_seconds
        self._fail(SlowReaderError(f"the client has read nothing for {seconds:g} s"), _TOO_SLOW)

    def _fail(self, error: GorgonError, code: int) -> None:
        """Say why, close, and wait a little for the client to read that."""
        if self._has_failed or self.transport.is_closing():
            return
        self._has_failed = True
        self._stop_stall_timer()
        self.stop_keepalive()
        text = orjson.dumps({"type": "error", **error_fields(error), "request_id": None})
        output = [Frame(Opcode.TEXT, text).serialize(mask=False)]
        if self.conn.close_sent is None:
            self.conn.send_close(code, error.code)
        output += self.conn.data_to_send()
        self.transport.write(b"".join(output))
        self.transport.write_eof()  # and read on: closing over unread bytes would take back what was said
        self.close_sent = self.disconnected = True
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": error.code})
        self.writable.set()  # nobody is to wait for this client
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        self._end_soon()
        self.close_timer = self._end_timer  # uvicorn does not close before it

    def _end_soon(self) -> None:
        """Whether the client has read everything by then or not."""
        if self._end_timer is None and not self._is_lost:
            seconds = min(_LINGER_SECONDS, _settings(self.config).slow_reader_seconds)
            self._end_timer = self.loop.call_later(seconds, self.transport.abort)

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
