"""Doing device work again without the host: as a CUDA graph, or, where there are none, by doing it anew.

A recording works on fixed memory: what it reads lies where it lay when it was recorded, and so does what it gives.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Recording(Protocol[T_co]):
    """Work on fixed memory that can be done again."""

    def replay(self) -> T_co:
        """Do it. What it gives is good until the next replay."""
        ...


class Recorder(Protocol):
    """Makes recordings."""

    def record(self, work: Callable[[], T]) -> Recording[T]:
        """Of work that has run before, whose every tensor is either made by it or outlives it, and which never looks
        at a value. Does not do the work. Raises `RuntimeError` where it cannot be recorded."""
        ...

    def forget(self) -> None:
        """Wait for recordings that are running: all of them are about to be dropped."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _CudaRecording(Generic[T]):
    graph: torch.cuda.CUDAGraph
    made: T
    work: Callable[[], T]  # what it refers to stays where it is

    def replay(self) -> T:
        self.graph.replay()
        return self.made


class CudaRecorder:
    """CUDA graphs, which share the memory of what they compute on the way: they run one behind the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], T]) -> Recording[T]:
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: heads may be loaded on another one meanwhile.
        with (
            _without_collections(),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            made = work()
        return _CudaRecording(graph, made, work)

    def forget(self) -> None:
        torch.cuda.synchronize(self._device)
        self._pool = torch.cuda.graph_pool_handle()  # one without graphs cannot be used again


@contextmanager
def _without_collections() -> Iterator[None]:
    """Another engine's graphs, found unreachable in the middle of a capture, would be destroyed there and end it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@dataclass(frozen=True, slots=True, eq=False)
class _Repetition(Generic[T]):
    work: Callable[[], T]

    def replay(self) -> T:
        return self.work()


class RepeatingRecorder:
    """The same work again: for devices without graphs. Slower than running each step at its own size."""

    def record(self, work: Callable[[], T]) -> Recording[T]:
        return _Repetition(work)

    def forget(self) -> None:
        pass
