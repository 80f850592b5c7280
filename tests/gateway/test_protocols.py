"""Connections that send half of something, or read nothing: each wait has an end."""

import contextlib
import socket
import struct
import time
from collections.abc import Iterator

import httpx
import pytest

from support.fake_engine import FakeEngine
from support.gateways import RunningGateway, running_gateway

SECONDS = 20.0


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeEngine]:
    with FakeEngine() as engine:
        yield engine


@pytest.fixture(scope="module")
def gateway(engine: FakeEngine) -> Iterator[RunningGateway]:
    with running_gateway(engine.url, header_seconds=0.3, keep_alive_seconds=1, slow_reader_seconds=0.3) as gateway:
        yield gateway


def everything(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            received += part
    return received


@pytest.mark.parametrize(
    "beginning",
    [b"", b"GE", b"GET / HTTP/1.1\r\nHost: a\r\nX-Long: aaa"],
    ids=["silent", "a method", "headers"],
)
def test_headers_have_to_arrive_in_time(gateway: RunningGateway, beginning: bytes) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=SECONDS) as connection:
        connection.sendall(beginning)
        assert b" 408 " in everything(connection)


def test_a_header_at_a_time_does_not_win_time(gateway: RunningGateway) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=SECONDS) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        ended = time.monotonic() + SECONDS
        with contextlib.suppress(OSError):
            while time.monotonic() < ended:
                connection.sendall(b"X-A: b\r\n")
                time.sleep(0.05)
        assert time.monotonic() < ended


@pytest.mark.parametrize("more", [b"", b"GET /he"])
def test_an_idle_connection_is_closed(gateway: RunningGateway, more: bytes) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=SECONDS) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n" + more)
        assert b" 200 " in everything(connection)


def test_what_is_no_http_is_refused(gateway: RunningGateway) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=SECONDS) as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
        assert b" 400 " in everything(connection)


def test_a_response_that_is_not_read_is_given_up(gateway: RunningGateway) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(SECONDS)
        connection.connect(("127.0.0.1", gateway.port))
        request = b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n"
        # Pipelined, and none of the answers read.
        with contextlib.suppress(OSError):
            for _ in range(2000):
                connection.sendall(request)
        end = time.monotonic() + SECONDS
        while gateway.server.server_state.connections:
            assert time.monotonic() < end, "the connection is still there"
            time.sleep(0.02)


def test_too_many_connections_are_told_to_come_back(engine: FakeEngine) -> None:
    with running_gateway(engine.url, max_connections=3) as gateway, contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(socket.create_connection(("127.0.0.1", gateway.port), timeout=SECONDS))
        end = time.monotonic() + SECONDS
        while len(gateway.server.server_state.connections) < 3:
            assert time.monotonic() < end
            time.sleep(0.01)
        refused = httpx.get(f"{gateway.url}/health/live", trust_env=False)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
        assert refused.json()["error"]["code"] == "unavailable"


def test_a_reset_connection_leaves_nothing(gateway: RunningGateway) -> None:
    for beginning in (b"", b"GET", b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{"):
        connection = socket.create_connection(("127.0.0.1", gateway.port), timeout=SECONDS)
        connection.sendall(beginning)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    end = time.monotonic() + SECONDS
    while gateway.server.server_state.connections or gateway.server.server_state.tasks:
        assert time.monotonic() < end
        time.sleep(0.02)
