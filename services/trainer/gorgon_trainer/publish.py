"""Publishing heads: a version appears whole or not at all, and `latest` names it last.

On a disk the version is copied beside its place and renamed into it. An object store knows no rename, but each of its
files appears whole: the weights go first, `manifest.json` behind them, `latest` in the end. Whoever reads `latest` at
any moment is led to a whole version. Nothing but `latest` is ever overwritten.
"""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from gorgon_engine.heads.checkpoint import LATEST_FILE, verify_heads, written_beside
from gorgon_engine.heads.store import (
    Location,
    backbone_folder,
    check_backbone_folder,
    next_version,
    open_location,
    read_latest,
    store_errors,
)
from gorgon_protocol.errors import HeadsError
from gorgon_protocol.manifest import MANIFEST_FILE, HeadsManifest
from gorgon_trainer.files import written_whole

if TYPE_CHECKING:
    from gorgon_trainer.metrics import TrainerMetrics

NEXT_VERSION = "next"  # in place of a version: the store's next number


def publish(
    checkpoint: Path,
    store: str | Path,
    backbone_name: str | None = None,
    *,
    version: str | None = None,
    move_latest: bool = True,
    metrics: "TrainerMetrics | None" = None,
) -> str:
    """Copy a checkpoint folder to `<store>/<backbone>/<name>@<version>`, point `latest` at it, and return its place.

    store: a folder or an fsspec URL. backbone_name: the backbone's folder in the store, made of its name in the
    manifest if not given. version: published under this one instead of the manifest's; `next`: the store's next number.

    A version that is there already is refused; only the very same checkpoint may be published again, as after a kill,
    and then moves `latest` alone. One publisher at a time for each version. Raises `HeadsError`: a checkpoint that is
    not whole, names that cannot be folders, a folder that holds heads of another backbone, a store that cannot be
    written.
    """
    manifest = verify_heads(checkpoint)
    name = backbone_folder(manifest.backbone.name) if backbone_name is None else check_backbone_folder(backbone_name)
    if version == NEXT_VERSION:
        version = next_version(store, name, manifest.name)
    if version is not None:
        manifest = _with_version(manifest, version)
    backbone = open_location(store).child(name)
    target = backbone.child(f"{manifest.name}@{manifest.version}")
    _check_backbone(backbone, manifest)
    if not _is_published(target, manifest):
        with store_errors(target, "cannot be written"):
            if target.local is not None:
                _copy(checkpoint, target.local, manifest)
            else:
                _upload(checkpoint, target, manifest)
    if move_latest:
        latest = backbone.child(LATEST_FILE)
        with store_errors(latest, "cannot be written"):
            _write_latest(latest, f"{manifest.name}@{manifest.version}\n".encode())
    if metrics is not None:
        metrics.published(manifest.name, manifest.version)
    return target.shown


def _with_version(manifest: HeadsManifest, version: str) -> HeadsManifest:
    try:
        return HeadsManifest.model_validate(manifest.model_dump() | {"version": version})
    except ValidationError as error:
        raise HeadsError(
            f"version {version[:80]!r} cannot be a folder's name: use letters, digits, '.', '_' and '-', at most 64"
        ) from error


def _check_backbone(backbone: Location, manifest: HeadsManifest) -> None:
    """Whoever follows `latest` here expects one backbone: another one's heads would stop every engine that does."""
    try:
        latest = read_latest(backbone)
        content = None if latest is None else backbone.child(latest).child(MANIFEST_FILE).read()
        other = None if content is None else HeadsManifest.from_json(content, source=str(latest))
    except HeadsError:
        # A store that cannot be read fails below, in its own words; a damaged latest is what publishing mends.
        return
    if other is not None and other.backbone.identity != manifest.backbone.identity:
        raise HeadsError(
            f"{backbone.shown}: holds heads for {other.backbone.name} ({other.backbone.identity[:12]}), these are for "
            f"{manifest.backbone.name} ({manifest.backbone.identity[:12]}): give the backbone a folder of its own"
        )


def _is_published(target: Location, manifest: HeadsManifest) -> bool:
    """Whether this very checkpoint is there, whole. Raises `HeadsError` where another one has its place."""
    there = target.child(MANIFEST_FILE).read()
    if there is None and (target.local is None or not os.path.lexists(target.local)):
        return False
    if there != manifest.to_json():
        raise HeadsError(f"{target.shown}: exists already: published heads are never overwritten, give a new version")
    if target.local is not None:
        verify_heads(target.local)
    return True


def _copy(checkpoint: Path, folder: Path, manifest: HeadsManifest) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a publisher that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    with written_beside(folder) as temporary:
        for name in manifest.files:
            shutil.copyfile(checkpoint / name, temporary / name)
        (temporary / MANIFEST_FILE).write_bytes(manifest.to_json())


def _upload(checkpoint: Path, target: Location, manifest: HeadsManifest) -> None:
    filesystem = target.filesystem
    filesystem.makedirs(target.path, exist_ok=True)
    for name, record in manifest.files.items():
        place = target.child(name)
        filesystem.put_file(str(checkpoint / name), place.path)
        size = filesystem.info(place.path)["size"]
        if size != record.size:
            raise HeadsError(f"{place.shown}: {size} bytes arrived of {record.size}: publish again")
    filesystem.pipe_file(target.child(MANIFEST_FILE).path, manifest.to_json())


def _write_latest(latest: Location, content: bytes) -> None:
    if latest.local is None:
        latest.filesystem.pipe_file(latest.path, content)
        return
    with written_whole(latest.local) as file:
        file.write(content)
