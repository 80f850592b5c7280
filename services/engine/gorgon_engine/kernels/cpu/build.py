"""Compiles the C++ sources beside this file into the user's cache, once per (sources, flags, compiler, CPU)."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gorgon_engine.cache import cache_dir

SOURCES = Path(__file__).parent / "src"
COMPILERS = ("g++", "clang++", "c++")
# -ffp-contract=off: a multiply-add is fused where the source says so and nowhere else, or two row counts could round
# differently. -fno-strict-aliasing: packed words are read as fp32, bf16 pairs or bytes.
FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-fPIC", "-pthread"),
    *("-ffp-contract=off", "-fno-strict-aliasing", "-fvisibility=hidden"),
)
COMPILE_TIMEOUT_SECONDS = 300


class NativeKernelsUnavailable(RuntimeError):
    """The CPU kernels cannot be used here; the message says why."""


def find_compiler() -> str:
    candidates = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    for name in candidates:
        if path := shutil.which(name):
            return path
    raise NativeKernelsUnavailable(f"no C++ compiler found (looked for {', '.join(candidates)})")


def cpu_identity() -> str:
    """What -march=native depends on: a cache shared between machines must not mix their libraries."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("flags", "features", "model", "cpu part")
    found = {line for line in lines if line.split(":")[0].strip().lower() in wanted}
    return platform.machine() + "\n" + "\n".join(sorted(found))


def build_library(extra_flags: tuple[str, ...] = ()) -> Path:
    """Path of the shared library, compiled now if the cache has none for these sources, flags, compiler and CPU."""
    if os.environ.get("GORGON_NATIVE") == "0":
        raise NativeKernelsUnavailable("disabled by GORGON_NATIVE=0")
    if sys.platform == "win32":
        raise NativeKernelsUnavailable("not supported on Windows")
    compiler = find_compiler()
    flags = (*FLAGS, *extra_flags)
    directory = cache_dir() / "native" / _key(compiler, flags)
    library = directory / "libgorgon_cpu.so"
    if library.exists():
        return library
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            built = _compile(compiler, flags, Path(scratch))
            os.replace(built, library)  # atomic: two processes that compile at once both end with a whole file
    except OSError as error:
        raise NativeKernelsUnavailable(f"cannot write to {directory}: {error}") from error
    return library


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    for text in (compiler, version, cpu_identity(), *flags):
        digest.update(text.encode() + b"\0")
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def _compile(compiler: str, flags: tuple[str, ...], scratch: Path) -> Path:
    units = sorted(SOURCES.glob("*.cpp"))
    objects = [scratch / f"{unit.stem}.o" for unit in units]
    _run_all([[compiler, *flags, "-c", str(u), "-o", str(o)] for u, o in zip(units, objects, strict=True)])
    output = scratch / "libgorgon_cpu.so"
    _run_all([[compiler, "-shared", "-pthread", *map(str, objects), "-o", str(output)]])
    return output


def _run_all(commands: list[list[str]]) -> None:
    """Runs the commands side by side: the units are few and the first user waits for them."""
    running: list[subprocess.Popen[str]] = []
    try:
        for command in commands:
            running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
        for process in running:
            _, errors = process.communicate(timeout=COMPILE_TIMEOUT_SECONDS)
            if process.returncode != 0:
                first = next((line for line in errors.splitlines() if "error" in line), errors.strip()[:200])
                raise NativeKernelsUnavailable(f"compilation failed: {first}")
    except subprocess.TimeoutExpired as error:
        raise NativeKernelsUnavailable(f"compilation took over {COMPILE_TIMEOUT_SECONDS} s") from error
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
