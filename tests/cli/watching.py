"""What a command is doing, seen from outside. After a fixed time it may be anywhere: that depends on the machine."""

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

_TIMEOUT_SECONDS = 90.0
_TORCH = re.compile(r"/libtorch\w*\.so")


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + _TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def wait_until_torch_loads(process: subprocess.Popen[bytes]) -> None:
    """Until the first of torch's libraries is mapped: the interpreter has started, and runs the command."""

    def loads() -> bool:
        assert process.poll() is None, "it has ended"
        return _TORCH.search(Path(f"/proc/{process.pid}/maps").read_text()) is not None

    wait_until(loads)
