"""The engine of a command: imported, told its threads, loaded."""

import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from gorgon_cli.options import EngineArguments
    from gorgon_engine.engine import Engine


def import_engine() -> None:
    """Import what takes its time, and cannot be interrupted safely."""
    with _interrupts_held():
        import transformers.utils  # noqa: F401


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """A Ctrl-C inside raises `KeyboardInterrupt` at the end: raised while torch is imported, some are swallowed and
    others abort the process with a page of C++ frames."""
    received: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if received:
        raise KeyboardInterrupt


def load_engine(arguments: "EngineArguments", *, num_slots: int = 1) -> "Engine":
    """The engine, with its notices on standard error."""
    from gorgon_engine.engine import Engine

    silence_libraries()
    config = arguments.config(num_slots=num_slots)
    set_threads(arguments.device, native=arguments.wants_native_kernels, threads=arguments.threads)
    engine = Engine.load(config)
    for notice in engine.notices:
        click.echo(f"gorgon: {notice}", err=True)
    return engine


def silence_libraries() -> None:
    """Only our own words reach the user: no progress bars, hints and warnings of the libraries below."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(torch|transformers|bitsandbytes|accelerate|tensorboard)\b")


def set_threads(device: str | None, *, native: bool, threads: int | None) -> None:
    """Before loading: the engine measures itself there, and must do so on the threads that will serve.

    native: whether the project's own CPU kernels may serve.
    """
    import torch

    from gorgon_engine.kernels.cpu import NativeKernelsUnavailable, set_num_threads

    on_cpu = device is not None or not torch.cuda.is_available()
    if native and on_cpu:
        # The native kernels have threads of their own; what is left to torch is too small to share, and its waiting
        # threads would take the kernels' cores: half of the speed.
        torch.set_num_threads(1)
        if threads is not None:
            with suppress(NativeKernelsUnavailable):  # loading says what serves instead
                set_num_threads(threads)
    elif threads is not None:
        torch.set_num_threads(threads)
