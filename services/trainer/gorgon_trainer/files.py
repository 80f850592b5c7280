"""Files and folders that appear whole or not at all: written beside their place, synced, renamed into it."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import BinaryIO


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A temporary sibling to write to, which becomes `path`, on the disk to stay, when the block ends well.

    A block that raises leaves `path` as it was and nothing beside it. What a killed process left behind for this path
    is removed first, so that every path has one writer at a time: of two, the slower one fails and hurts nothing.
    Raises `OSError`.
    """
    for leftover in path.parent.glob(f".{escape(path.name)}.*.tmp"):
        leftover.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Have the disk keep a file's content or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def folder_written_whole(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary sibling folder to fill, which becomes `folder`, on the disk to stay, when the block ends well.

    replace: take the place of a folder with contents; otherwise that is an error. A block that raises leaves what was
    there; so does a kill, except between the two renames of a replacement: see `restore_replaced`. Leftovers and
    writers as in `written_whole`. Raises `OSError`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    restore_replaced(folder)
    old = _aside(folder)
    for leftover in folder.parent.glob(f".{escape(folder.name)}.*.tmp"):
        shutil.rmtree(leftover)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        if replace and folder.exists():
            folder.rename(old)
        # Fails where a folder with contents is: it only ever replaces an empty one.
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_replaced(folder: Path) -> None:
    """Put back the folder that a killed replacement had moved aside, or remove it where its successor had come."""
    old = _aside(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(folder)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")
