"""The services as processes of their own, started as they are deployed: `python -m gorgon_engine`, settings by
environment."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

START_SECONDS = 120.0
STOP_SECONDS = 30.0
_POLL_SECONDS = 0.05
_TESTS = Path(__file__).parents[1]
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Service:
    """A running process that listens at `url`; its log is a file."""

    name: str
    url: str
    process: subprocess.Popen[bytes]
    log_file: Path
    ready_path: str

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    @property
    def rss_bytes(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    @property
    def cpu_seconds(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def get(self, path: str) -> Any:
        """The JSON that it answers, whatever the status."""
        with self._open(path) as response:
            return json.load(response)

    def get_text(self, path: str) -> str:
        with self._open(path) as response:
            return str(response.read(), "utf-8")

    def status(self, path: str) -> int:
        with self._open(path) as response:
            return int(response.status)

    def _open(self, path: str) -> Any:
        try:
            return _DIRECT.open(self.url + path, timeout=10.0)
        except urllib.error.HTTPError as error:
            return error

    def wait_until_ready(self, seconds: float = START_SECONDS) -> None:
        end = time.monotonic() + seconds
        while True:
            assert self.process.poll() is None, f"{self.name} ended with {self.process.returncode}:\n{self.log}"
            with contextlib.suppress(OSError):
                if self.status(self.ready_path) == 200:
                    return
            assert time.monotonic() < end, f"{self.name} was not ready in {seconds:.0f} s:\n{self.log}"
            time.sleep(_POLL_SECONDS)

    def kill(self) -> None:
        """As the machine's out-of-memory killer does it."""
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)


def free_port() -> int:
    """One that nobody listens on; somebody may before you do."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def engine_service(*, ready: bool = True, port: int | None = None, **settings: object) -> Iterator[Service]:
    """`python -m gorgon_engine` with settings by their names in lower case: `model=...`, `num_slots=4`."""
    with _service("gorgon_engine", "GORGON_ENGINE_", "/ready", settings, ready=ready, port=port) as service:
        yield service


@contextmanager
def gateway_service(
    *, ready: bool = True, port: int | None = None, core: int | None = None, **settings: object
) -> Iterator[Service]:
    """`python -m gorgon_gateway`; `core`: the only one that it may run on."""
    with _service(
        "gorgon_gateway", "GORGON_GATEWAY_", "/health/ready", settings, ready=ready, port=port, core=core
    ) as service:
        yield service


@contextmanager
def fake_engine_process(*, core: int | None = None, **arguments: object) -> Iterator[Service]:
    """The engine without a model, in a process: `step_seconds=0.02` is its `--step-seconds 0.02`."""
    port = free_port()
    options = [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items() if value is not True]
    options += [f"--{name.replace('_', '-')}" for name, value in arguments.items() if value is True]
    command = ["-m", "support.fake_engine", f"--port={port}", *options]
    with _process("fake engine", port, "/ready", command, {"PYTHONPATH": str(_TESTS)}, core) as service:
        service.wait_until_ready()
        yield service


@contextmanager
def _service(
    module: str,
    prefix: str,
    ready_path: str,
    settings: Mapping[str, object],
    *,
    ready: bool,
    port: int | None,
    core: int | None = None,
) -> Iterator[Service]:
    port = port or free_port()
    given = {"port": port, **settings}
    environment = {prefix + name.upper(): str(value) for name, value in given.items() if value is not None}
    with _process(module, port, ready_path, ["-m", module], environment, core) as service:
        if ready:
            service.wait_until_ready()
        yield service


@contextmanager
def _process(
    name: str, port: int, ready_path: str, command: list[str], environment: Mapping[str, str], core: int | None
) -> Iterator[Service]:
    pinned = [] if core is None else ["taskset", "--cpu-list", str(core)]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("GORGON_") or "CACHE" in key}
    with tempfile.NamedTemporaryFile(prefix=f"{name.replace(' ', '-')}-", suffix=".log") as log:
        process = subprocess.Popen(
            [*pinned, sys.executable, *command],
            env={**inherited, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield Service(name, f"http://127.0.0.1:{port}", process, Path(log.name), ready_path)
        finally:
            process.kill()  # an orderly end is for those who ask for it
            process.wait()


@contextmanager
def redis_server(port: int | None = None) -> Iterator["RedisServer"]:
    server = RedisServer(port or free_port())
    server.start()
    try:
        yield server
    finally:
        server.stop()


class RedisServer:
    """A real redis-server that keeps nothing on disk."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"redis://127.0.0.1:{port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        end = time.monotonic() + 20.0
        while True:
            assert self._process.poll() is None, "redis-server did not start"
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1.0).close()
                return
            except OSError:
                assert time.monotonic() < end, "redis-server did not listen"
                time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """At once, as a machine that fails. Harmless when it is down."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
