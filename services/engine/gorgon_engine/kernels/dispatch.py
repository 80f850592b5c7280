"""Which tensors the Triton kernels of a step work on.

Tests send CPU tensors through them, in Triton's interpreter, by replacing `uses_triton`: the one switch there is. So
callers ask `dispatch.uses_triton(tensor)`, never a name imported from here.
"""

from functools import cache
from importlib.util import find_spec

from torch import Tensor


def uses_triton(tensor: Tensor) -> bool:
    """On a GPU, where Triton is installed; else torch operations or the native library do the same."""
    return tensor.is_cuda and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
