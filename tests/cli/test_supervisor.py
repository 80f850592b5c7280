"""Child processes: what they say is kept, how they end is told, and none is left behind."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gorgon_cli.supervisor import Child, ChildSpec, Log

Write = Callable[[str], ChildSpec]


@pytest.fixture
def module(tmp_path: Path) -> Write:
    """A child that runs this source."""

    def write(source: str) -> ChildSpec:
        (tmp_path / "fixture_child.py").write_text(source)
        return ChildSpec("child", "fixture_child", ("first", "second"), {"PYTHONPATH": str(tmp_path)})

    return write


def run(spec: ChildSpec) -> tuple[int, list[str]]:
    """The exit status and the last lines."""

    async def start() -> tuple[int, list[str]]:
        child = await Child.start(spec, Log(None, show=False))
        return await child.wait(), list(child.tail)

    return asyncio.run(start())


def is_running(pid: int) -> bool:
    """Whether it is there and not a zombie that nobody has waited for yet."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pid: int) -> None:
    end = time.monotonic() + 20
    while is_running(pid):
        assert time.monotonic() < end, f"process {pid} is still there"
        time.sleep(0.02)


def test_a_child_is_run_as_python_runs_a_module(module: Write) -> None:
    status, lines = run(module("import sys\nprint(__name__, *sys.argv[1:])\nprint('on error', file=sys.stderr)"))
    assert (status, lines) == (0, ["__main__ first second", "on error"])


@pytest.mark.parametrize(
    ("source", "status"), [("import sys; sys.exit(3)", 3), ("import os; os.kill(os.getpid(), 15)", -signal.SIGTERM)]
)
def test_how_it_ended_is_told(module: Write, source: str, status: int) -> None:
    assert run(module(source))[0] == status


def test_only_the_last_lines_are_kept_and_no_line_is_endless(module: Write) -> None:
    _, lines = run(module("for i in range(1000): print(i)\nprint('x' * 100_000)"))
    assert len(lines) == 20
    assert lines[0].isdigit()
    assert max(map(len, lines)) <= 4096


def test_bytes_that_are_no_text_do_no_harm(module: Write) -> None:
    assert run(module("import sys; sys.stdout.buffer.write(b'a\\xff\\n')"))[1] == ["a\ufffd"]


def test_the_log_is_appended_to(module: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")

    async def start() -> None:
        log = Log(path, show=True)
        await (await Child.start(module("print('hello')"), log)).wait()
        log.close()

    asyncio.run(start())
    assert path.read_text() == "before\nchild | hello\n"
    assert capfd.readouterr().err == "child | hello\n"


def test_a_full_disk_ends_the_log_and_not_the_child(module: Write, capfd: pytest.CaptureFixture[str]) -> None:
    async def start() -> int:
        log = Log(Path("/dev/full"), show=False)
        child = await Child.start(module("print('x' * 4000 + '\\n' + 'y\\n' * 100_000)"), log)
        status = await child.wait()
        log.close()
        return status

    assert asyncio.run(start()) == 0
    assert capfd.readouterr().err == "gorgon: the log ends here: /dev/full: No space left on device\n"


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: None)
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), helper.pid, flush=True)
while True: time.sleep(1)
"""


def test_a_child_that_does_not_listen_is_killed_with_its_own_children(module: Write) -> None:
    async def start() -> list[int]:
        child = await Child.start(module(STUBBORN), Log(None, show=False))
        while not child.tail:
            await asyncio.sleep(0.01)
        pids = [int(pid) for pid in child.tail[0].split()]
        assert all(map(is_running, pids))
        await child.end(grace_seconds=0.1)
        return pids

    for pid in asyncio.run(start()):
        wait_until_gone(pid)


def test_a_child_dies_with_a_supervisor_that_was_killed(module: Write, tmp_path: Path) -> None:
    spec = module("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)")
    source = """
import asyncio
from gorgon_cli.supervisor import Child, ChildSpec, Log
async def main():
    child = await Child.start(ChildSpec("child", "fixture_child"), lambda name, line: print(line, flush=True))
    await child.wait()
asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", source], env={**os.environ, **(spec.environment or {})}, stdout=subprocess.PIPE
    ) as supervisor:
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline())
        assert is_running(pid)
        supervisor.kill()
    wait_until_gone(pid)
