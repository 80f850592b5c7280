"""The native CPU kernels under test."""

from collections.abc import Iterator
from contextlib import contextmanager

from gorgon_engine.kernels.cpu import NativeLibrary


@contextmanager
def num_threads(library: NativeLibrary, count: int) -> Iterator[None]:
    """A library with so many threads, meanwhile."""
    before = library.num_threads
    library.set_num_threads(count)
    try:
        yield
    finally:
        library.set_num_threads(before)
