"""Checks of Triton kernels: on a GPU where there is one, else in Triton's interpreter.

The interpreter has to be chosen before Triton is imported, so each check is a program of its own.
"""

import os
import subprocess
import sys

import torch

# Triton 3.6 turns one-element arrays into integers in a way that numpy 2.4 refuses.
_PRELUDE = """
import os
import torch
if os.environ.get("TRITON_INTERPRET"):
    import triton.runtime.interpreter as interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend
device = "cuda" if torch.cuda.is_available() else "cpu"
"""


def run_check(program: str) -> str:
    """Run a program that fails where the kernel is wrong; what it printed. It finds `device`, and torch imported."""
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    environment = os.environ | interpreted
    done = subprocess.run([sys.executable, "-c", _PRELUDE + program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
