"""What a process that runs an engine sets up before it loads one: threads, and silence from the libraries below."""

import warnings
from contextlib import suppress


def silence_libraries() -> None:
    """Only our own words reach the user: no progress bars, hints and warnings of the libraries below."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(torch|transformers|bitsandbytes|accelerate|tensorboard)\b")


def may_run_native(device: str | None, kernels: str, quantization: str | None) -> bool:
    """Whether the project's own CPU kernels are asked for, or free to serve, by what a person chose."""
    return device in (None, "cpu") and kernels in ("auto", "native") and quantization != "nf4"


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
