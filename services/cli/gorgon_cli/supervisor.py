"""Child processes that live and die together: started, listened to, ended in order."""

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import click

# What a child said last, for when it dies: enough for a traceback.
_NUM_TAIL_LINES = 20
_MAX_LINE = 4096
_READ_SIZE = 1 << 16


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """A Python module to run as a process. `environment` is added to this process's own."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] | None = None
    shows_errors: bool = False  # its standard error is ours, as for progress bars; else it is a log
    inherits: tuple[int, ...] = ()  # descriptors, under the same numbers


class Child:
    """One running process. In a session of its own, so that Ctrl-C in the terminal reaches the supervisor alone."""

    def __init__(self, spec: ChildSpec, process: asyncio.subprocess.Process, log: Callable[[str, str], None]) -> None:
        self.spec = spec
        self.tail: deque[str] = deque(maxlen=_NUM_TAIL_LINES)
        self._process = process
        self._log = log
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, spec: ChildSpec, log: Callable[[str, str], None]) -> Self:
        """`log` gets (name of the child, line) of all that it prints."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gorgon_cli.child", str(os.getpid()), spec.module, *spec.arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=None if spec.shows_errors else asyncio.subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(spec.environment or {})},
            start_new_session=True,
            pass_fds=spec.inherits,
        )  # fmt: skip
        return cls(spec, process, log)

    async def wait(self) -> int:
        """Its exit status, negative for a signal, once all that it said has been read."""
        status = await self._process.wait()
        # A grandchild may hold the pipe open: what the child itself said is there by now.
        await asyncio.wait([self._reader], timeout=1.0)
        return status

    async def end(self, *, grace_seconds: float, number: signal.Signals = signal.SIGTERM) -> None:
        """Ask it to end, and make it end once the grace is over; then nothing of its session is left."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), grace_seconds)
        self.kill()
        await self._process.wait()
        self._reader.cancel()

    def kill(self) -> None:
        """At once, with its own children: they are the session's process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        rest = b""
        while block := await stream.read(_READ_SIZE):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                self._take(line)
            if len(rest) > _MAX_LINE:  # no end in sight
                self._take(rest)
                rest = b""
        if rest:
            self._take(rest)

    def _take(self, line: bytes) -> None:
        text = line[:_MAX_LINE].decode(errors="replace").rstrip()
        self.tail.append(text)
        self._log(self.spec.name, text)


class Log:
    """The lines of all children: appended to a file, shown on standard error, both or neither.

    Raises `OSError` where the file cannot be opened. One that cannot be written to later (a full disk) is given up with
    a word: a child must never wait for its log.
    """

    def __init__(self, path: Path | None, *, show: bool) -> None:
        self._file = None if path is None else path.open("a", encoding="utf-8", buffering=1)
        self._show = show

    def __call__(self, name: str, line: str) -> None:
        if self._show:
            click.echo(f"{name} | {line}", err=True)
        if self._file is not None:
            try:
                self._file.write(f"{name} | {line}\n")
            except OSError as error:
                click.echo(f"gorgon: the log ends here: {self._file.name}: {error.strerror}", err=True)
                self.close()

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what could not be written is tried again
                self._file.close()
            self._file = None
