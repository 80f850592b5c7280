"""A process that cannot outlive the one that started it: `python -m gorgon_cli.child PARENT_PID MODULE [ARGUMENT...]`.

Linux tells a process when its parent has died, however that came about (`PR_SET_PDEATHSIG`, prctl(2)). Here it does so
with SIGKILL: the parent had no chance to ask for an orderly end, and a process that is busy loading would hear of
nothing less.
"""

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, module, *arguments = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the line above
        sys.exit(1)
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
