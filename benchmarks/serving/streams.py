"""WebSocket and HTTP streams read with as little work as can be: the client must not be what is measured.

RFC 6455 as far as the gateway's messages need it: whole text frames, no extensions.
"""

import asyncio
import base64
import os
import struct
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

_TEXT, _CLOSE, _PING, _PONG = 1, 8, 9, 10

OnMessage = Callable[[bytes], None]


class WebSocketClient(asyncio.Protocol):
    """One socket. `on_message` gets the payload of each text frame, in the event loop, as it comes."""

    def __init__(self, url: str, on_message: OnMessage) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._url = urlsplit(url)
        self._on_message = on_message
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def open(cls, url: str, on_message: OnMessage) -> "WebSocketClient":
        """`url` as http://host:port/path. Raises `ConnectionError` where the handshake is refused."""
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(lambda: cls(url, on_message), *_address(url))
        await client._opened
        return client

    def send(self, text: bytes) -> None:
        """One frame, masked with zeros, which leave the payload as it is."""
        assert self._transport is not None
        self._transport.write(_frame(_TEXT, text))

    def close(self) -> None:
        assert self._transport is not None
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        key = base64.b64encode(os.urandom(16)).decode()
        transport.write(
            f"GET {self._url.path} HTTP/1.1\r\nHost: {self._url.netloc}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )

    def connection_lost(self, error: Exception | None) -> None:
        if not self._opened.done():
            self._opened.set_exception(ConnectionError("closed before the handshake was over"))
        if not self.closed.done():
            self.closed.set_result(None)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        if not self._opened.done() and not self._finish_handshake():
            return
        start = 0
        while len(buffer) - start >= 2:
            opcode, length, header = buffer[start] & 15, buffer[start + 1], 2
            if length == 126:
                header = 4
            elif length == 127:
                header = 10
            if len(buffer) - start < header:
                break
            if header == 4:
                (length,) = struct.unpack_from(">H", buffer, start + 2)
            elif header == 10:
                (length,) = struct.unpack_from(">Q", buffer, start + 2)
            end = start + header + length
            if end > len(buffer):
                break
            self._take(opcode, bytes(buffer[start + header : end]))
            start = end
        del buffer[:start]

    def _finish_handshake(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        status = bytes(self._buffer[: self._buffer.find(b"\r\n")])
        del self._buffer[: end + 4]
        if b" 101 " not in status:
            self._opened.set_exception(ConnectionError(status.decode(errors="replace")))
            self.close()
            return False
        self._opened.set_result(None)
        return True

    def _take(self, opcode: int, payload: bytes) -> None:
        assert self._transport is not None
        if opcode == _TEXT:
            self._on_message(payload)
        elif opcode == _PING:
            self._transport.write(_frame(_PONG, payload))
        elif opcode == _CLOSE:
            self._transport.write(_frame(_CLOSE, payload))
            self._transport.close()


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname is not None, url
    return parts.hostname, parts.port or 80


def _frame(opcode: int, payload: bytes) -> bytes:
    size = len(payload)
    if size < 126:
        head = struct.pack(">BB", 0x80 | opcode, 0x80 | size)
    elif size < 1 << 16:
        head = struct.pack(">BBH", 0x80 | opcode, 0x80 | 126, size)
    else:
        head = struct.pack(">BBQ", 0x80 | opcode, 0x80 | 127, size)
    return head + b"\0\0\0\0" + payload


class LineStream(asyncio.Protocol):
    """One `POST` whose streamed answer is lines of JSON objects, one or more whole lines a chunk."""

    def __init__(self, head: bytes, body: bytes, on_message: OnMessage, prefix: bytes) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = head + body
        self._on_message = on_message
        self._prefix = prefix
        self._rest = b""
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def open(cls, url: str, body: bytes, on_message: OnMessage, *, prefix: bytes = b"{") -> "LineStream":
        """`on_message` gets each line that begins with `prefix`, without what ends it."""
        parts = urlsplit(url)
        head = (
            f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        ).encode()
        loop = asyncio.get_running_loop()
        _, stream = await loop.create_connection(lambda: cls(head, body, on_message, prefix), *_address(url))
        return stream

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)
        transport.write(self._request)

    def close(self) -> None:
        assert self._transport is not None
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(self._prefix):  # the others are headers and the sizes of chunks
                self._on_message(line)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():  # cancelled with who waited for it
            self.closed.set_result(None)
