"""The port at which Prometheus finds a training job's metrics: a thread beside the job, gone when the job is."""

import errno
import socket
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, Final, Self
from urllib.parse import urlsplit

from gorgon_protocol.errors import BadRequestError
from gorgon_trainer.metrics import CONTENT_TYPE, TrainerMetrics

_REQUEST_SECONDS: Final = 10.0  # for a client to ask


class MetricsServer:
    """`GET /metrics` of one job. A context manager: listening when it is made, closed at the end."""

    def __init__(self, metrics: TrainerMetrics, host: str, port: int) -> None:
        """port 0: any free one. Raises `BadRequestError` where that cannot be listened on, naming it and the option."""
        self._listener = _listen(metrics, host, port)
        self._thread = threading.Thread(target=self._listener.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._listener.shutdown()
        self._thread.join()
        self._listener.server_close()

    @property
    def url(self) -> str:
        host, port = self._listener.server_address[:2]
        host = str(host)
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"

    def wait_for_scrape(self, seconds: float) -> bool:
        """Wait until somebody has read all metrics as they are now, for so long at most; whether it happened.

        What a job says last (the version that it published, that it failed) would otherwise be gone with it.
        """
        self._listener.is_last.set()
        return self._listener.was_read.wait(seconds)


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, metrics: TrainerMetrics, family: socket.AddressFamily, address: Any) -> None:
        self.address_family = family
        self.metrics = metrics
        self.is_last, self.was_read = threading.Event(), threading.Event()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # Without the look-up of the host's name that HTTPServer adds, which may take seconds.
        TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no trouble of the job's; anything else is a bug to be seen."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Listener
    timeout = _REQUEST_SECONDS

    def do_GET(self) -> None:
        is_last = self.server.is_last.is_set()
        is_known = urlsplit(self.path).path == "/metrics"
        body = self.server.metrics.render() if is_known else b"see /metrics\n"
        self.send_response(HTTPStatus.OK if is_known else HTTPStatus.NOT_FOUND)
        self.send_header("Content-Type", CONTENT_TYPE if is_known else "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        if is_last and is_known:
            self.server.was_read.set()

    def log_message(self, format: str, *args: object) -> None:
        """The job's output is the job's."""


def _listen(metrics: TrainerMetrics, host: str, port: int) -> _Listener:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise BadRequestError(f"--metrics-host {host}: no such address") from None
    try:
        return _Listener(metrics, family, address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = f"port {port} is in use: end what listens there, or choose another with --metrics-port"
        else:
            message = f"cannot listen on {host} port {port} ({error.strerror}): choose another --metrics-host or port"
        raise BadRequestError(message) from None
