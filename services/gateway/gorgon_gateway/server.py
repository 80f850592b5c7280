"""The gateway as a process: sockets, signals, and an orderly end."""

import asyncio
import errno
import gc
import resource
import socket
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Final

import uvicorn
import uvloop
from starlette.types import ASGIApp, Receive, Scope, Send

from gorgon_gateway.app import create_app
from gorgon_gateway.gateway import Gateway
from gorgon_gateway.observability.logs import configure_logs, logger
from gorgon_gateway.observability.metrics import CONTENT_TYPE, GatewayMetrics
from gorgon_gateway.protocols import GatewayConfig, GatewayHttpProtocol, GatewayWebSocketProtocol
from gorgon_gateway.settings import PREFIX, GatewaySettings
from gorgon_protocol.errors import BadRequestError

_BACKLOG: Final = 4096
_CLOSE_SECONDS: Final = 5  # for connections that are left behind the drain
_PING_SECONDS: Final = 20.0


class GatewayServer(uvicorn.Server):
    """Drains on the first SIGTERM or SIGINT, ends at once on the second, and then simply returns."""

    def __init__(self, config: GatewayConfig, gateway: Gateway) -> None:
        super().__init__(config)
        self._gateway = gateway

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._gateway.drain(is_forced=lambda: self.force_exit)
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves it out then
            await self.lifespan.shutdown()


class _SideServer(uvicorn.Server):
    """A second listener in the same loop: signals are the first one's."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def serve(settings: GatewaySettings) -> None:
    """Serve until a signal comes. Raises `BadRequestError` where that cannot begin."""
    configure_logs(form=settings.log_format, level=settings.log_level)
    app = create_app(settings)
    gateway: Gateway = app.state.gateway
    listener = listen(settings.host, settings.port, "PORT")
    side = None
    if settings.metrics_port is not None:
        side = listen(settings.metrics_host, settings.metrics_port, "METRICS_PORT")
    _raise_file_limit(settings.max_connections)
    if settings.is_open and not settings.is_loopback:
        logger().warning("open_to_all", host=settings.host, remedy=f"set {PREFIX}API_KEYS_FILE, or listen on 127.0.0.1")
    server = GatewayServer(make_config(app, settings), gateway)
    gc.freeze()  # what is here now stays: a full collection would walk over it while streams wait
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(server, listener, side, gateway.metrics))


async def _serve(
    server: GatewayServer, listener: socket.socket, side: socket.socket | None, metrics: GatewayMetrics
) -> None:
    others: list[asyncio.Task[None]] = []
    side_server = None
    if side is not None:
        side_server = _SideServer(
            uvicorn.Config(_metrics_app(metrics), log_config=None, log_level="warning", lifespan="off")
        )
        others.append(asyncio.get_running_loop().create_task(side_server.serve([side])))
        logger().info("metrics", address=_address(side))
    logger().info("listening", address=_address(listener))
    await server.serve([listener])
    if side_server is not None:
        side_server.should_exit = True
    await asyncio.gather(*others)
    logger().info("stopped")


def make_config(app: ASGIApp, settings: GatewaySettings) -> GatewayConfig:
    """How uvicorn runs the application."""
    config = GatewayConfig(
        app,
        loop="uvloop",
        http=GatewayHttpProtocol,
        ws=GatewayWebSocketProtocol,
        ws_max_size=settings.max_body_bytes,
        ws_per_message_deflate=False,  # 35 KB a socket
        ws_ping_interval=_PING_SECONDS,
        ws_ping_timeout=settings.slow_reader_seconds + _PING_SECONDS,  # the pong waits behind what is not read yet
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=list(settings.trusted_proxies),
        timeout_keep_alive=settings.keep_alive_seconds,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
        backlog=_BACKLOG,
    )
    config.gateway = settings
    return config


def listen(host: str, port: int, setting: str) -> socket.socket:
    """A listening socket. Raises `BadRequestError` that names the port and what to do."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise BadRequestError(f"{host}: no such address: set {PREFIX}{setting.replace('PORT', 'HOST')}") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not count
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise BadRequestError(
                f"port {port} is in use: end what listens there, or choose another with {PREFIX}{setting}"
            ) from None
        raise BadRequestError(f"cannot listen on {host} port {port}: {error.strerror}") from None
    listener.setblocking(False)
    return listener


def _metrics_app(metrics: GatewayMetrics) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        is_known = scope["type"] == "http" and scope["path"] == "/metrics"
        body = metrics.render() if is_known else b"see /metrics\n"
        headers = [
            (b"content-type", (CONTENT_TYPE if is_known else "text/plain").encode()),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200 if is_known else 404, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _raise_file_limit(max_connections: int) -> None:
    """Two descriptors a stream, where the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * max_connections + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
