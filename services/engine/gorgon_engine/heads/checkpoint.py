"""Heads on disk: a folder with `heads.safetensors` and `manifest.json`, written whole or not at all, checked when read.

A store keeps versions as `<store>/<backbone>/<name>@<version>/` beside a one-line text file `latest` that names one.
"""

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gorgon_engine.heads.medusa import MedusaHeads
from gorgon_engine.models.config import BackboneConfig
from gorgon_protocol.errors import HeadsError
from gorgon_protocol.manifest import HEADS_FILE, MANIFEST_FILE, FileRecord, HeadsManifest

Quantization = Literal["none", "nf4", "int8"]

_LATEST_FILE = "latest"
_VERSION_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}@[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_TEXT_BYTES = 1 << 20  # of a manifest or a `latest`: a wrong file must not fill the memory
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class LoadedHeads:
    heads: MedusaHeads  # in evaluation mode, no gradients
    manifest: HeadsManifest
    notices: tuple[str, ...]  # what a person should know, one line each


def save_heads(folder: Path, heads: MedusaHeads, manifest: HeadsManifest) -> HeadsManifest:
    """Write a new checkpoint folder, and return its manifest with the files' checksums filled in.

    The folder appears complete or not at all, and an existing one is never touched. Raises `HeadsError` where it
    exists, where the manifest does not describe the heads, or where it cannot be written.
    """
    if os.path.lexists(folder):
        raise HeadsError(f"{folder}: exists already: published heads are never overwritten, give a new version")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in heads.named_parameters()}
    expected = _expected_shapes(manifest)
    actual = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if actual != expected:
        raise HeadsError(f"{folder}: the heads' tensors are {actual}, the manifest says {expected}")
    tensors = {name: tensor.to(_DTYPES[manifest.dtype]) for name, tensor in tensors.items()}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _written_beside(folder) as temporary:
            weights = temporary / HEADS_FILE
            save_file(tensors, weights, metadata={"format": "pt"})
            # safetensors makes its files private; a store is read by other users: as open as a new folder.
            weights.chmod(temporary.stat().st_mode & 0o666)
            record = FileRecord(sha256=_sha256(weights), size=weights.stat().st_size)
            manifest = manifest.model_copy(update={"files": {HEADS_FILE: record}})
            (temporary / MANIFEST_FILE).write_bytes(manifest.to_json())
    except (OSError, SafetensorError) as error:
        raise HeadsError(f"{folder}: cannot be written: {error}") from error
    return manifest


def load_heads(
    folder: Path,
    *,
    backbone_identity: str,
    config: BackboneConfig,
    quantization: Quantization,
    device: torch.device,
    dtype: torch.dtype,
) -> LoadedHeads:
    """Read and check a checkpoint folder for a backbone served with `quantization`.

    Raises `HeadsError` for a missing, damaged or foreign checkpoint, with both values of what does not fit. Another
    quantisation than the one trained on is only a notice: the output stays exact, fewer guesses may be right.
    """
    manifest = read_manifest(folder)
    _check_backbone(folder, manifest, backbone_identity, config)
    _check_files(folder, manifest)
    tensors = _read_tensors(folder / HEADS_FILE, manifest)
    heads = MedusaHeads.from_tensors({name: t.to(device=device, dtype=dtype) for name, t in tensors.items()})
    notices = []
    if manifest.quantization != quantization:
        notices.append(
            f"heads {manifest.name}@{manifest.version} were trained on the backbone in {_spoken(manifest.quantization)}"
            f" and it is served in {_spoken(quantization)}: the output is exact all the same, acceptance may differ"
        )
    return LoadedHeads(heads=heads.eval().requires_grad_(False), manifest=manifest, notices=tuple(notices))


def resolve_heads(path: Path) -> Path:
    """The checkpoint folder of a path: itself, or for a backbone's folder in a store the version that `latest` names.

    Raises `HeadsError` where there is none.
    """
    if (path / MANIFEST_FILE).is_file():
        return path
    latest = path / _LATEST_FILE
    if not latest.is_file():
        what = "has no manifest.json and no latest" if path.is_dir() else "no such folder"
        raise HeadsError(f"{path}: {what}: give a checkpoint folder, or a store's folder of this backbone")
    name = _read_text(latest).decode(errors="replace").strip()
    if not _VERSION_FOLDER.fullmatch(name):
        raise HeadsError(f"{latest}: {name[:80]!r} is not the name of a version (name@version)")
    folder = path / name
    if folder.resolve().parent != path.resolve():
        raise HeadsError(f"{latest}: {name} leads outside the store")
    if not (folder / MANIFEST_FILE).is_file():
        raise HeadsError(f"{latest}: names {name}, which has no {MANIFEST_FILE}")
    return folder


def read_manifest(folder: Path) -> HeadsManifest:
    """The manifest of a checkpoint folder, its files not looked at. Raises `HeadsError`."""
    path = folder / MANIFEST_FILE
    return HeadsManifest.from_json(_read_text(path), source=str(path))


def _check_backbone(folder: Path, manifest: HeadsManifest, identity: str, config: BackboneConfig) -> None:
    if manifest.backbone.identity != identity:
        raise HeadsError(
            f"{folder}: heads of another backbone: trained for {manifest.backbone.name} "
            f"({manifest.backbone.identity[:12]}), this backbone is {identity[:12]}"
        )
    for name, here in (("hidden_size", config.hidden_size), ("vocab_size", config.vocab_size)):
        if getattr(manifest, name) != here:
            raise HeadsError(f"{folder}: {name} of the heads is {getattr(manifest, name)}, of the backbone {here}")


def _check_files(folder: Path, manifest: HeadsManifest) -> None:
    if HEADS_FILE not in manifest.files:
        raise HeadsError(f"{folder / MANIFEST_FILE}: files does not list {HEADS_FILE}")
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise HeadsError(f"{path}: missing: publish or copy the checkpoint again")
        try:
            size = path.stat().st_size
            digest = _sha256(path) if size == record.size else ""
        except OSError as error:
            raise HeadsError(f"{path}: cannot be read: {error.strerror}") from error
        if size != record.size:
            raise HeadsError(f"{path}: {size} bytes long, the manifest says {record.size}: copy it again")
        if digest != record.sha256:
            raise HeadsError(
                f"{path}: damaged: sha256 is {digest[:12]}..., the manifest says {record.sha256[:12]}...: copy it again"
            )


def _read_tensors(path: Path, manifest: HeadsManifest) -> dict[str, Tensor]:
    expected = _expected_shapes(manifest)
    dtype = _DTYPES[manifest.dtype]
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = set(file.keys())
            if names != set(expected):
                raise HeadsError(f"{path}: holds tensors {sorted(names)}, expected {sorted(expected)}")
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in sorted(names)}
    except (SafetensorError, OSError) as error:
        raise HeadsError(f"{path}: not a readable safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name] or tensor.dtype != dtype:
            raise HeadsError(
                f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, the manifest says {dtype} "
                f"{list(expected[name])}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise HeadsError(f"{path}: {name} holds values that are not finite: the training that made it diverged")
    return tensors


def _expected_shapes(manifest: HeadsManifest) -> dict[str, tuple[int, ...]]:
    heads, blocks, hidden = manifest.num_heads, manifest.num_blocks, manifest.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"weight": (heads, blocks, hidden, hidden), "bias": (heads, blocks, hidden)}
    if manifest.projection == "own":
        shapes["projection"] = (heads, manifest.vocab_size, hidden)
    return shapes


@contextmanager
def _written_beside(folder: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `folder`, on the disk to stay, when the block ends well."""
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        # Fails where another writer was faster: a folder only ever replaces an empty one.
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_text(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_TEXT_BYTES + 1)
    except FileNotFoundError as error:
        raise HeadsError(f"{path}: missing: is {path.parent} a heads checkpoint?") from error
    except OSError as error:
        raise HeadsError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > _MAX_TEXT_BYTES:
        raise HeadsError(f"{path}: longer than {_MAX_TEXT_BYTES} bytes: not what its name says")
    return content


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _spoken(quantization: str) -> str:
    return "its own precision" if quantization == "none" else quantization
