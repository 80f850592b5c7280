"""The command on a pseudo-terminal: what a person types, and what they see."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import psutil
from cli.watching import wait_until

TIMEOUT_SECONDS = 60.0


class PseudoTerminal:
    """`gorgon` with its three streams on a terminal of its own, whose Ctrl-C it gets as a person's would."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        self._master, slave = pty.openpty()
        kept = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        with interruptible():
            self._process = subprocess.Popen(
                # A new session whose controlling terminal is this one.
                ["setsid", "--ctty", sys.executable, "-m", "gorgon_cli", *map(str, arguments)],
                stdin=slave, stdout=slave, stderr=slave, env={**kept, "TERM": "xterm", **environment},
            )  # fmt: skip
        os.close(slave)
        self._bytes = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read_until(self, wanted: str) -> str:
        """What has been shown since the last call, up to and with the wanted text; the rest waits for the next."""
        end = time.monotonic() + TIMEOUT_SECONDS
        while wanted not in self._shown():
            if time.monotonic() > end or not self._read():
                raise AssertionError(f"{wanted!r} never came, but {self._shown()!r}")
        before, _, after = self._shown().partition(wanted)
        self._bytes = after.encode()
        return before + wanted

    def read_at_least(self, num_characters: int) -> None:
        """Until so much waits for the next call."""
        while len(self._shown()) < num_characters:
            assert self._read(), f"it ended with {self._shown()!r}"

    def wait_for_keys(self) -> None:
        """Until the command, which has shown its prompt, sleeps: only then does Ctrl-C find it waiting."""
        wait_until(lambda: psutil.Process(self._process.pid).status() == psutil.STATUS_SLEEPING)

    def read_to_end(self) -> tuple[int, str]:
        """The exit status, and all that has been shown since the last `read_until`."""
        while self._read():
            pass
        return self._process.wait(TIMEOUT_SECONDS), self._shown()

    def _shown(self) -> str:
        return self._bytes.decode(errors="ignore").replace("\r\n", "\n")

    def _read(self) -> bool:
        """Whether there may be more."""
        if not select.select([self._master], [], [], TIMEOUT_SECONDS)[0]:
            return False
        try:
            piece = os.read(self._master, 4096)
        except OSError:  # Linux's way to say that the other end is closed
            return False
        self._bytes += piece
        return bool(piece)


@contextmanager
def interruptible() -> Iterator[None]:
    """Whoever runs in the background of a shell has SIGINT ignored, and its children inherit that: not in here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
