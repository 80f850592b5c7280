"""Native CPU kernels: a row-invariant transformer forward, compiled on first use."""

from gorgon_engine.kernels.cpu.build import NativeKernelsUnavailable
from gorgon_engine.kernels.cpu.library import Kind, NativeLibrary, PackedLinear, load_library, set_num_threads
from gorgon_engine.kernels.cpu.model import NativeLayer, NativeModel

__all__ = [
    "Kind",
    "NativeKernelsUnavailable",
    "NativeLayer",
    "NativeLibrary",
    "NativeModel",
    "PackedLinear",
    "load_library",
    "set_num_threads",
]
