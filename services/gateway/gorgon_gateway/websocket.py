"""WebSocket `/generate_stream`: several generations on a socket, one after another.

Client: a `GenerateRequest`, and while it runs `{"type": "cancel"}`. Server: the generation's messages, exactly one
`finished` or `error` at its end. Whatever else a client sends is answered by an `error`, which ends nothing.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from typing import Final

import orjson
from starlette.types import Message, Receive, Scope, Send

from gorgon_gateway.callers import Caller
from gorgon_gateway.engine_client import RelayedMessage
from gorgon_gateway.generation import Generation
from gorgon_gateway.guard import SUBPROTOCOL
from gorgon_gateway.observability.logs import logger
from gorgon_gateway.observability.metrics import GatewayMetrics
from gorgon_gateway.observability.tracing import outgoing_headers
from gorgon_gateway.outbox import Outbox
from gorgon_gateway.relay import Relay
from gorgon_gateway.responses import error_fields, parse
from gorgon_gateway.settings import GatewaySettings
from gorgon_protocol.errors import BusyError, GorgonError, SlowReaderError
from gorgon_protocol.requests import CancelRequest, GenerateRequest

_GOING_AWAY, _POLICY, _RESTART = 1001, 1008, 1012
_CLOSE_SECONDS: Final = 2.0  # for the last messages to leave
_MAX_UNREAD: Final = 4  # times the bound of a stream: a client that asks on without reading the answers
_HURRY: Final = 32  # unsent messages
_TERMINAL: Final = ("finished", "error")


class GenerateStream:
    """The route: an ASGI application, and the sockets that it serves."""

    def __init__(self, relay: Relay, settings: GatewaySettings, metrics: GatewayMetrics) -> None:
        self._relay = relay
        self._settings = settings
        self._metrics = metrics
        self._sockets: set[Socket] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        socket = Socket(self._relay, self._settings, self._metrics, scope, receive, send)
        self._sockets.add(socket)
        self._metrics.websocket_opened()
        try:
            await socket.run()
        finally:
            self._metrics.websocket_closed()
            self._sockets.discard(socket)

    @property
    def num_sockets(self) -> int:
        return len(self._sockets)

    def drain(self) -> None:
        """Close every socket: idle ones now, the others behind their generation."""
        for socket in list(self._sockets):
            socket.drain()


class Socket:
    """One client's connection."""

    def __init__(
        self,
        relay: Relay,
        settings: GatewaySettings,
        metrics: GatewayMetrics,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        self._relay = relay
        self._settings = settings
        self._metrics = metrics
        self._caller: Caller = scope["state"]["caller"]
        self._subprotocol = SUBPROTOCOL if SUBPROTOCOL in scope["subprotocols"] else None
        self._hurry = min(_HURRY, settings.max_buffered_messages // 2)
        self._receive = receive
        self._send = send
        self._now: Callable[[], float] = asyncio.get_running_loop().time
        self._outbox: Outbox | None = None  # from the first message on: most sockets are idle
        self._sender: asyncio.Task[None] | None = None
        self._generation: Generation | None = None  # that runs
        self._pump: asyncio.Task[None] | None = None
        self._silence: asyncio.Timeout | None = None  # of the client
        self._close: tuple[int, str] | None = None  # code and reason, when it is time

    async def run(self) -> None:
        """From the handshake to the end of the connection."""
        await self._receive()  # websocket.connect
        await self._send({"type": "websocket.accept", "subprotocol": self._subprotocol, "headers": []})
        try:
            seconds = self._settings.first_message_seconds
            while (message := await self._next(seconds)) is not None:
                self._handle(message)
                if self._outbox is not None and len(self._outbox) > _MAX_UNREAD * self._settings.max_buffered_messages:
                    self._close = (_POLICY, "messages are sent and the answers not read")
                    break
                seconds = self._settings.idle_seconds
        finally:
            await self._end()

    def drain(self) -> None:
        """The gateway stops: close once nothing runs."""
        self._close = (_RESTART, "the gateway is stopping")
        if self._generation is None and self._silence is not None:
            self._silence.reschedule(self._now())

    async def _next(self, seconds: float) -> Message | None:
        """The client's next message; None when the connection is over, or silent for too long while nothing runs."""
        if self._close is not None and self._generation is None:
            return None
        try:
            async with asyncio.timeout(seconds if self._generation is None else None) as self._silence:
                message = await self._receive()
        except TimeoutError:
            self._close = self._close or (_GOING_AWAY, f"no message for {seconds:g} s")
            return None
        finally:
            self._silence = None
        if message["type"] == "websocket.receive":
            return message
        if message.get("reason") == SlowReaderError.code:
            self._metrics.slow_reader()
        return None

    def _handle(self, message: Message) -> None:
        data = message.get("text")
        if data is None:
            data = message.get("bytes") or b""
        try:
            if _is_cancel(data):
                parse(CancelRequest, data)
                if self._generation is not None:  # else: it ended while this was on its way
                    self._generation.cancel()
                return
            request = parse(GenerateRequest, data)
            if self._generation is not None:
                raise BusyError("a generation runs on this socket: cancel it, wait for its end, or open another socket")
        except GorgonError as error:
            self._say(error)
            return
        request_id = request.request_id or secrets.token_hex(16)
        self._generation = self._relay.generate(
            request,
            self._caller,
            request_id=request_id,
            headers=outgoing_headers(),
            patience_seconds=self._settings.loading_seconds,
        )
        self._pump = asyncio.get_running_loop().create_task(self._generate(self._generation))

    async def _generate(self, generation: Generation) -> None:
        outbox = self._open_outbox()
        last: RelayedMessage | None = None
        try:
            async with contextlib.aclosing(generation):
                async for message in generation:
                    if message.fields["type"] in _TERMINAL:
                        last = message
                    else:
                        outbox.put(message)
                        if len(outbox) >= self._hurry:
                            await asyncio.sleep(0)  # a burst is no slow reader: the sender's turn
        except GorgonError as error:
            last = _error(error, generation.request_id)
        except Exception:
            logger().exception("generation_failed", request_id=generation.request_id)
        if last is None:
            last = _error(GorgonError("the gateway failed at this request: see its log"), generation.request_id)
        # Only now: who has read the end may ask again at once, and then nothing of this one may be in the way.
        self._generation = None
        outbox.put(last)
        if self._silence is not None:
            seconds = self._settings.idle_seconds if self._close is None else 0.0
            self._silence.reschedule(self._now() + seconds)

    def _say(self, error: GorgonError) -> None:
        """What does not end the generation that runs: so it carries no request's id."""
        self._open_outbox().put(_error(error, None))

    def _open_outbox(self) -> Outbox:
        if self._outbox is None:
            settings = self._settings
            self._outbox = Outbox(max_messages=settings.max_buffered_messages, max_bytes=settings.max_buffered_bytes)
            self._sender = asyncio.get_running_loop().create_task(self._send_all(self._outbox))
        return self._outbox

    async def _send_all(self, outbox: Outbox) -> None:
        """Until the outbox is closed, or the client is gone."""
        send = self._send
        with contextlib.suppress(OSError):
            while (raw := await outbox.get()) is not None:
                await send({"type": "websocket.send", "text": raw.decode()})

    async def _end(self) -> None:
        """Cancel what still runs; where the client is still there, let the last messages leave and close."""
        if self._pump is not None:
            await _cancelled(self._pump)
        if self._outbox is not None and self._sender is not None:
            self._metrics.merged(self._outbox.num_merged)
            if self._close is not None:
                self._outbox.close()
                await asyncio.wait((self._sender,), timeout=_CLOSE_SECONDS)
            await _cancelled(self._sender)
        if self._close is not None:
            code, reason = self._close
            # The client may have closed at the same time.
            with contextlib.suppress(OSError, RuntimeError, TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await self._send({"type": "websocket.close", "code": code, "reason": reason})


def _is_cancel(data: str | bytes) -> bool:
    try:
        fields = orjson.loads(data)
    except orjson.JSONDecodeError:
        return False  # parsing it as what it may be says what is wrong
    return isinstance(fields, dict) and fields.get("type") == "cancel"


def _error(error: GorgonError, request_id: str | None) -> RelayedMessage:
    return RelayedMessage.of({"type": "error", **error_fields(error), "request_id": request_id})


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
