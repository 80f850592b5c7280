"""The services as processes of their own, started as they are deployed: `python -m gorgon_engine`, settings by
environment.

Each chooses a free port by itself and names it in its log, so that nobody else can be there in between. Whoever waits
for one that has died fails with its log, also where it is the gateway that is waited for and the engine that has died.
"""

import contextlib
import json
import os
import re
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
_LISTEN_POLL_SECONDS = 0.01
_TESTS = Path(__file__).parents[1]
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(slots=True, eq=False)
class Service:
    """A running process that listens at `url`; its log is a file."""

    name: str
    url: str
    process: subprocess.Popen[bytes]
    log_file: Path
    ready_path: str
    engines: tuple["Service", ...] = ()  # that a gateway cannot do without
    is_ended: bool = False  # by the test, which knows

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
            for service in (self, *self.engines):
                service.check()
            with contextlib.suppress(OSError):
                if self.status(self.ready_path) == 200:
                    return
            logs = "\n".join(f"{service.name}:\n{service.log}" for service in (self, *self.engines))
            assert time.monotonic() < end, f"{self.name} was not ready in {seconds:.0f} s:\n{logs}"
            time.sleep(_POLL_SECONDS)

    def check(self) -> None:
        """Fails with the log of a process that has ended, unless the test has ended it."""
        assert self.is_ended or self.process.poll() is None, (
            f"{self.name} ended with {self.process.returncode}:\n{self.log}"
        )

    def kill(self) -> None:
        """As the machine's out-of-memory killer does it."""
        self.is_ended = True
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        """SIGTERM; the exit status."""
        self.is_ended = True
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)


@contextmanager
def engine_service(*, ready: bool = True, port: int = 0, **settings: object) -> Iterator[Service]:
    """`python -m gorgon_engine` with settings by their names in lower case: `model=...`, `num_slots=4`.

    ready: wait until it is; else it listens, and whoever waits for it next finds out.
    """
    environment = _environment("GORGON_ENGINE_", {"port": port, **settings})
    with _process("gorgon_engine", "/ready", ["-m", "gorgon_engine"], environment) as service:
        if ready:
            service.wait_until_ready()
        yield service


@contextmanager
def gateway_service(
    *engines: Service, ready: bool = True, core: int | None = None, **settings: object
) -> Iterator[Service]:
    """`python -m gorgon_gateway` in front of engines; others than processes by `engines=url`.

    core: the only one that it may run on.
    """
    if engines:
        settings = {"engines": ",".join(engine.url for engine in engines), **settings}
    environment = _environment("GORGON_GATEWAY_", {"port": 0, **settings})
    with _process("gorgon_gateway", "/health/ready", ["-m", "gorgon_gateway"], environment, core) as service:
        service.engines = engines
        if ready:
            service.wait_until_ready()
        yield service


@contextmanager
def fake_engine_process(*, core: int | None = None, **arguments: object) -> Iterator[Service]:
    """The engine without a model, in a process: `step_seconds=0.02` is its `--step-seconds 0.02`."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items() if value is not True]
    options += [f"--{name.replace('_', '-')}" for name, value in arguments.items() if value is True]
    command = ["-m", "support.fake_engine", *options]
    with _process("fake engine", "/ready", command, {"PYTHONPATH": str(_TESTS)}, core) as service:
        service.wait_until_ready()
        yield service


def _environment(prefix: str, settings: Mapping[str, object]) -> dict[str, str]:
    return {prefix + name.upper(): str(value) for name, value in settings.items() if value is not None}


@contextmanager
def _process(
    name: str, ready_path: str, command: list[str], environment: Mapping[str, str], core: int | None = None
) -> Iterator[Service]:
    """One that listens."""
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
        service = Service(name, "", process, Path(log.name), ready_path)
        try:
            service.url = _listening(service)
            yield service
        finally:
            process.kill()  # an orderly end is for those who ask for it
            process.wait()


def _listening(service: Service) -> str:
    """Where a process says that it listens."""
    end = time.monotonic() + START_SECONDS
    while True:
        for line in service.log.splitlines():
            if "listening" in line and (address := re.search(r"http://[^\s\"]+:(\d+)", line)):
                return f"http://127.0.0.1:{address[1]}"
        service.check()
        assert time.monotonic() < end, f"{service.name} did not listen:\n{service.log}"
        time.sleep(_LISTEN_POLL_SECONDS)


@contextmanager
def redis_server(*, password: str | None = None) -> Iterator["RedisServer"]:
    with tempfile.NamedTemporaryFile(prefix="redis-", suffix=".log") as log:
        server = RedisServer(Path(log.name), password)
        server.start()
        try:
            yield server
        finally:
            server.stop()


class RedisServer:
    """A real redis-server that keeps nothing on disk, at the same port whenever it is started again."""

    def __init__(self, log_file: Path, password: str | None = None) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = int(listener.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._log_file = log_file
        self._password = password
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        secret = [] if self._password is None else ["--requirepass", self._password]
        options = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", *secret]
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                ["redis-server", "--port", str(self.port), *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        end = time.monotonic() + 20.0
        # Its own word for it: somebody else may listen at the port by now.
        while "Ready to accept connections" not in (said := self._log_file.read_text(errors="replace")):
            assert self._process.poll() is None, f"redis-server did not start:\n{said}"
            assert time.monotonic() < end, f"redis-server did not listen:\n{said}"
            time.sleep(_LISTEN_POLL_SECONDS)

    def stop(self) -> None:
        """At once, as a machine that fails. Harmless when it is down."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
