"""The process: a socket first, then the model behind it; signals, and an orderly end."""

import asyncio
import errno
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
import uvloop

from gorgon_engine.server.app import create_app
from gorgon_engine.server.logs import configure_logs, logger
from gorgon_engine.server.protocol import http_protocol
from gorgon_engine.server.service import EngineService
from gorgon_engine.server.settings import PREFIX, EngineSettings
from gorgon_protocol.errors import BadRequestError, GorgonError

_FLUSH_SECONDS = 2  # for the last lines of what was cut off to leave; whatever finished is read by then
_STEP_SECONDS = 5.0  # for the step in flight to end
_SEND_BUFFER_BYTES = 256 * 1024  # in the kernel: a reader that stands still is noticed before megabytes lie there


def main() -> None:
    """Run an engine by the settings of the environment, and exit the process."""
    try:
        settings = EngineSettings.from_environment()
        secret, redis_password = settings.read_secret(), settings.read_redis_password()
        listener = bind(settings)
    except GorgonError as error:
        sys.exit(f"gorgon engine: {error}")
    configure_logs(form=settings.log_format, level=settings.log_level)
    with listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        status, has_ended = runner.run(serve(settings, listener, secret=secret, redis_password=redis_password))
    if not has_ended:
        # The model's thread is inside of native code, which nobody can end: the interpreter would wait or crash.
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


async def serve(
    settings: EngineSettings, listener: socket.socket, *, secret: bytes | None, redis_password: str | None
) -> tuple[int, bool]:
    """Serve until told to stop, or until the engine fails.

    Returns the exit status, and whether the model's thread has ended.
    """
    port = listener.getsockname()[1]
    service = EngineService(settings, redis_password=redis_password)
    server = make_server(service, secret=secret)
    stop = _Stop(asyncio.get_running_loop())
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    logger().info("listening", url=settings.local_url(port), engine_id=settings.engine_id)
    if secret is None and not settings.is_loopback:
        logger().warning("open_to_all", reason=f"whoever reaches {settings.host} may call: set {PREFIX}SECRET_FILE")
    service.start(port)

    failed = asyncio.create_task(service.has_failed.wait())
    await _first_of(failed, asyncio.create_task(stop.asked.wait()))
    await _first_of(failed, asyncio.create_task(service.drain()), asyncio.create_task(stop.insisted.wait()))
    has_failed = service.has_failed.is_set()
    failed.cancel()
    has_ended = await service.close(join_seconds=0.0 if stop.insisted.is_set() else _STEP_SECONDS)
    server.should_exit = True
    server.force_exit = stop.insisted.is_set()
    await serving
    logger().info("stopped", failed=has_failed)
    return int(has_failed), has_ended


def make_server(service: EngineService, *, secret: bytes | None) -> "EngineServer":
    settings = service.settings
    config = uvicorn.Config(
        create_app(service, secret=secret),
        http=http_protocol(settings.header_seconds),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=settings.keep_alive_seconds,
        timeout_graceful_shutdown=_FLUSH_SECONDS,
    )
    return EngineServer(config)


class EngineServer(uvicorn.Server):
    """uvicorn's server, which leaves the signals to the process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(settings: EngineSettings) -> socket.socket:
    """The socket to listen on. Raises `BadRequestError` that names the setting."""
    host, port = settings.host, settings.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise BadRequestError(f"{PREFIX}HOST {host!r} is no address of this machine: {error}") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)  # connections inherit it
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise BadRequestError(
                f"port {port} of {host} is in use: end what listens there, or choose another with {PREFIX}PORT"
            ) from None
        raise BadRequestError(f"cannot listen on port {port} of {host}: {error.strerror}") from None
    return listener


class _Stop:
    """The wish to stop (SIGTERM, SIGINT), and the second one, to stop at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.asked = asyncio.Event()
        self.insisted = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ask)

    def _ask(self) -> None:
        (self.insisted if self.asked.is_set() else self.asked).set()


async def _first_of(*tasks: "asyncio.Task[object]") -> None:
    """Wait for one; the others are cancelled, except the first of them, which is waited for again."""
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks[1:]:
        task.cancel()
