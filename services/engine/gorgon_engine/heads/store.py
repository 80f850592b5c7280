"""Stores of published heads, read: `<store>/<backbone>/<name>@<version>/` beside a one-line file `latest`.

A store is a folder, or any URL that fsspec knows (`s3://bucket/heads`, ...). A version is there when its
`manifest.json` is: whoever uploads writes that file last.
"""

import errno
import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gorgon_engine.cache import cache_dir
from gorgon_engine.heads.bundled import BUNDLED_STORE
from gorgon_engine.heads.checkpoint import (
    LATEST_FILE,
    is_version_folder,
    read_manifest,
    resolve_heads,
    verify_heads,
    written_beside,
)
from gorgon_protocol.errors import HeadsError
from gorgon_protocol.manifest import MANIFEST_FILE, HeadsManifest

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::|://)")
_SECRET = re.compile(r"//[^/@]*@")  # user and password of a URL: never shown
_BACKBONE_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MAX_TEXT_BYTES = 1 << 20  # of a manifest or a `latest`: a wrong file must not fill the memory


@dataclass(frozen=True, slots=True)
class Location:
    """A folder on this machine or behind a URL."""

    filesystem: "AbstractFileSystem"
    path: str  # as the filesystem names it
    shown: str  # as people do

    @property
    def local(self) -> Path | None:
        """The folder, where it is on this machine."""
        protocol = self.filesystem.protocol
        return Path(self.path) if "file" in ((protocol,) if isinstance(protocol, str) else protocol) else None

    def child(self, name: str) -> "Location":
        return Location(self.filesystem, f"{self.path.rstrip('/')}/{name}", f"{self.shown.rstrip('/')}/{name}")

    def exists(self) -> bool:
        """Raises `HeadsError` where the store cannot be reached."""
        with store_errors(self, "cannot be read"):
            return bool(self.filesystem.exists(self.path))

    def names(self) -> list[str]:
        """What the folder holds, sorted; nothing where it does not exist. Raises `HeadsError`."""
        with store_errors(self, "cannot be read"):
            self.filesystem.invalidate_cache()  # others publish too
            try:
                entries = self.filesystem.ls(self.path, detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
            return sorted({str(entry).rstrip("/").rpartition("/")[2] for entry in entries})

    def read(self) -> bytes | None:
        """The content of a small file, None where there is none. Raises `HeadsError`."""
        with store_errors(self, "cannot be read"):
            try:
                with self.filesystem.open(self.path, "rb") as file:
                    content: bytes = file.read(_MAX_TEXT_BYTES + 1)
            except (FileNotFoundError, NotADirectoryError):
                return None
        if len(content) > _MAX_TEXT_BYTES:
            raise HeadsError(f"{self.shown}: longer than {_MAX_TEXT_BYTES} bytes: not what its name says")
        return content


@dataclass(frozen=True, slots=True)
class PublishedHeads:
    """One version in a store."""

    backbone: str  # the folder's name
    version: str  # name@version
    place: str  # path or URL
    manifest: HeadsManifest | None  # None where it cannot be read
    fault: str | None  # why not
    is_latest: bool


def open_location(place: str | Path) -> Location:
    """A path, `file://` or any other fsspec URL. Nothing is looked up yet.

    Raises `HeadsError` where the protocol is not known or its Python package is missing.
    """
    text = str(place)
    if not text:
        raise HeadsError("an empty name is no place for heads: give a folder or a URL")
    from fsspec.core import url_to_fs

    if not _URL.match(text):
        text = str(Path(text).expanduser().absolute())
        shown = str(place)
    else:
        shown = _SECRET.sub("//", text)
    with store_errors(shown, "cannot be opened"):
        filesystem, path = url_to_fs(text if _URL.match(text) else f"file://{text}")
    return Location(filesystem, str(path), shown)


@contextmanager
def store_errors(where: Location | str, what: str) -> Iterator[None]:
    """Every failure inside as one `HeadsError` line: where, `what`, why."""
    shown = where if isinstance(where, str) else where.shown
    try:
        yield
    except HeadsError:
        raise
    except ImportError as error:
        raise HeadsError(f"{shown}: {what}: its Python package is missing: {_one_line(error)}") from error
    except OSError as error:
        reason = error.strerror or _one_line(error)
        if isinstance(error, FileNotFoundError) and not error.strerror:
            reason = f"not found: {reason}"
        if error.errno == errno.ENOSPC:
            reason += ": free some space there, or choose another store"
        raise HeadsError(f"{shown}: {what}: {reason}") from error
    except Exception as error:  # each filesystem has a client library with errors of its own: they share no base
        raise HeadsError(f"{shown}: {what}: {_one_line(error)}") from error


def backbone_folder(name: str) -> str:
    """The folder of a backbone in a store: its name with what a file name cannot hold replaced.

    `meta-llama/Meta-Llama-3-8B-Instruct` -> `meta-llama--Meta-Llama-3-8B-Instruct`.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]", "-", name.replace("/", "--")).lstrip("._-")[:128]
    return safe or "backbone"


def check_backbone_folder(name: str) -> str:
    """The name, where it can be a backbone's folder in a store. Raises `HeadsError`."""
    # An @ would make it a version's name, a slash or a leading dot another place.
    if not _BACKBONE_FOLDER.fullmatch(name):
        raise HeadsError(f"{name[:80]!r} cannot be a backbone's folder in a store: use {backbone_folder(name)}")
    return name


def list_versions(store: str | Path) -> tuple[PublishedHeads, ...]:
    """Every version in a store, or in one backbone's folder of it, by backbone and name; versions count upwards.

    Raises `HeadsError` where the store does not exist or cannot be read, or where a `latest` is no version's name.
    """
    root = open_location(store)
    names = root.names()
    if not (root.local.is_dir() if root.local else names or root.exists()):
        raise HeadsError(f"{root.shown}: no such store")
    if LATEST_FILE in names or any(map(is_version_folder, names)):
        return tuple(_versions(root, root.path.rstrip("/").rpartition("/")[2]))
    found: list[PublishedHeads] = []
    for name in filter(_BACKBONE_FOLDER.fullmatch, names):
        found += _versions(root.child(name), name)
    return tuple(found)


def read_latest(backbone: Location) -> str | None:
    """The version that `latest` names, None where there is none. Raises `HeadsError` for anything else in it."""
    location = backbone.child(LATEST_FILE)
    content = location.read()
    if content is None:
        return None
    name = content.decode(errors="replace").strip()
    if not is_version_folder(name):
        raise HeadsError(f"{location.shown}: {name[:80]!r} is not the name of a version (name@version)")
    return name


def next_version(store: str | Path, backbone: str, name: str) -> str:
    """The first free number, from 1, above all numbered versions of heads `name`. Raises `HeadsError`."""
    folder = open_location(store).child(check_backbone_folder(backbone))
    numbers = [0]
    for entry in filter(is_version_folder, folder.names()):
        entry_name, _, version = entry.partition("@")
        # On a disk a folder holds its place; elsewhere one without a manifest is an upload that can be made again.
        if entry_name == name and re.fullmatch(r"[1-9][0-9]*", version) and _is_taken(folder.child(entry)):
            numbers.append(int(version))
    return str(max(numbers) + 1)


def local_heads(place: str | Path) -> Path:
    """The folder of a checkpoint given by path or URL, itself or as a backbone's folder with a `latest` in it.

    What lies elsewhere is fetched. Raises `HeadsError`.
    """
    location = open_location(place)
    return resolve_heads(location.local) if location.local else fetch_remote(str(place))


def version_folder(backbone: Location, version: str) -> Path:
    """The folder of one version (name@version) of a backbone's folder in a store, fetched where that lies elsewhere.

    Raises `HeadsError` for what is not a version's name, is not there, leads outside the store, or says in its manifest
    that it is another version. The files themselves are checked by whoever loads them.
    """
    if not is_version_folder(version):
        raise HeadsError(f"{backbone.shown}: {version[:80]!r} is not the name of a version (name@version)")
    place = backbone.child(version)
    root, folder = backbone.local, place.local
    if root is None or folder is None:
        folder = _fetch(place)
    else:
        with store_errors(place, "cannot be read"):
            if folder.resolve().parent != root.resolve():
                raise HeadsError(f"{place.shown}: leads outside the store")
            if not (folder / MANIFEST_FILE).is_file():
                raise HeadsError(f"{place.shown}: has no {MANIFEST_FILE}: not published, or not to its end")
    manifest = read_manifest(folder)
    if (says := f"{manifest.name}@{manifest.version}") != version:
        raise HeadsError(f"{place.shown}: its manifest says {says}: publish it under its own name")
    return folder


def fetch_remote(url: str, *, cache: Path | None = None) -> Path:
    """Copy a published checkpoint into the cache (the user's, if not given), check it, and return its folder.

    A copy that is there already is checked and used. Raises `HeadsError`.
    """
    return _fetch(_resolve_remote(open_location(url)), cache=cache)


def _fetch(source: Location, *, cache: Path | None = None) -> Path:
    content = source.child(MANIFEST_FILE).read()
    if content is None:
        raise HeadsError(f"{source.shown}: has no {MANIFEST_FILE}: not published, or not to its end")
    manifest = HeadsManifest.from_json(content, source=source.child(MANIFEST_FILE).shown)
    # The manifest names every file's checksum: its own stands for the whole.
    key = hashlib.sha256(content).hexdigest()[:32]
    folder = (cache or cache_dir()) / "remote-heads" / key / f"{manifest.name}@{manifest.version}"
    if folder.is_dir():
        try:
            verify_heads(folder)
            return folder
        except HeadsError:  # damaged since: fetched again
            shutil.rmtree(folder, ignore_errors=True)
    with store_errors(source, "cannot be fetched"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(folder) as temporary:
            for name in manifest.files:
                source.filesystem.get_file(source.child(name).path, str(temporary / name))
            (temporary / MANIFEST_FILE).write_bytes(content)
            try:
                verify_heads(temporary)
            except HeadsError as error:
                raise HeadsError(str(error).replace(str(temporary), source.shown)) from error
    return folder


def bundled_store() -> Path | None:
    """The store that comes with the program, if any."""
    return BUNDLED_STORE if BUNDLED_STORE.is_dir() else None


def _versions(folder: Location, backbone: str) -> list[PublishedHeads]:
    latest = read_latest(folder)
    found = []
    for name in filter(is_version_folder, folder.names()):
        place = folder.child(name)
        content = place.child(MANIFEST_FILE).read()
        if content is None:
            continue
        manifest, fault = None, None
        try:
            manifest = HeadsManifest.from_json(content, source=place.child(MANIFEST_FILE).shown)
        except HeadsError as error:
            fault = str(error)
        found.append(PublishedHeads(backbone, name, place.shown, manifest, fault, is_latest=name == latest))
    return sorted(found, key=lambda heads: _counting(heads.version))


def _counting(version: str) -> list[Any]:
    """A sort key that puts 10 behind 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", version)]


def _is_taken(version: Location) -> bool:
    return version.local is not None or version.child(MANIFEST_FILE).exists()


def _resolve_remote(location: Location) -> Location:
    """The version's folder: the location itself, or what its `latest` names."""
    if location.child(MANIFEST_FILE).exists():
        return location
    latest = read_latest(location)
    if latest is None:
        raise HeadsError(
            f"{location.shown}: has no {MANIFEST_FILE} and no {LATEST_FILE}: give a checkpoint, or a backbone's folder "
            "in a store"
        )
    return location.child(latest)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
