"""The engine of a command: imported, told its threads, loaded."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from gorgon_engine.runtime import set_threads, silence_libraries

if TYPE_CHECKING:
    from gorgon_cli.options import EngineArguments
    from gorgon_engine.engine import Engine


def import_engine() -> None:
    """Import what takes its time, and cannot be interrupted safely."""
    with _interrupts_held():
        # Each by name: none of them is sure to import another.
        import torch  # noqa: F401
        import transformers.utils  # noqa: F401

        import gorgon_engine.engine  # noqa: F401


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
