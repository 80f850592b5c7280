"""Heads on disk: a folder with `manifest.json` and the weights, written whole or not at all, checked when read.

The weights are one file, `heads.safetensors`, or several (`heads-00001-of-00003.safetensors`, ...) where a limit was
asked for. A store keeps versions as `<store>/<backbone>/<name>@<version>/` beside a one-line text file `latest` that
names one.
"""

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gorgon_engine.heads.families import DraftHeads, build_heads, expected_shapes, heads_tensors
from gorgon_engine.models.config import BackboneConfig
from gorgon_protocol.errors import HeadsError
from gorgon_protocol.manifest import HEADS_FILE, MANIFEST_FILE, FileRecord, HeadsManifest

Quantization = Literal["none", "nf4", "int8"]

LATEST_FILE = "latest"
DRAFT_VOCABULARY = "draft_vocabulary"  # int32 [V'], ascending token ids: what row i of a projection stands for

_WEIGHT_FILE = re.compile(r"heads(-\d{5}-of-\d{5})?\.safetensors")
_EXTRA_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # what a manifest can list
_VERSION_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}@[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_TEXT_BYTES = 1 << 20  # of a manifest or a `latest`: a wrong file must not fill the memory
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class LoadedHeads:
    heads: DraftHeads  # in evaluation mode, no gradients
    manifest: HeadsManifest
    draft_vocabulary: Tensor | None  # [V'] int64, ascending: the token of each row of a projection; None = all tokens
    notices: tuple[str, ...]  # what a person should know, one line each


def save_heads(
    folder: Path,
    heads: DraftHeads,
    manifest: HeadsManifest,
    *,
    draft_vocabulary: Tensor | None = None,
    max_file_bytes: int | None = None,
    extra_files: Mapping[str, bytes] | None = None,
) -> HeadsManifest:
    """Write a new checkpoint folder, and return its manifest with the files' checksums filled in.

    draft_vocabulary: [V'] ascending token ids, where the manifest has a `draft_vocab_size`. max_file_bytes: split the
    weights into files of about this size. extra_files: name -> content of what lies beside them (a report, a model
    card), listed in the manifest like the weights.

    The folder appears complete or not at all, and an existing one is never touched. Raises `HeadsError` where it
    exists, where the manifest does not describe the heads, or where it cannot be written.
    """
    for name in extra_files or {}:
        assert _EXTRA_FILE.fullmatch(name), name
        assert name != MANIFEST_FILE, name
        assert not _WEIGHT_FILE.fullmatch(name), name
    if os.path.lexists(folder):
        raise HeadsError(f"{folder}: exists already: published heads are never overwritten, give a new version")
    tensors = heads_tensors(heads)
    expected = expected_shapes(manifest)
    actual = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if actual != expected:
        raise HeadsError(f"{folder}: the heads' tensors are {actual}, the manifest says {expected}")
    tensors = {name: tensor.to(_DTYPES[manifest.dtype]) for name, tensor in tensors.items()}
    size = None if draft_vocabulary is None else draft_vocabulary.numel()
    if size != manifest.draft_vocab_size:
        raise HeadsError(
            f"{folder}: the draft vocabulary has {size} tokens, the manifest says {manifest.draft_vocab_size}"
        )
    if draft_vocabulary is not None:
        _check_draft_vocabulary(folder, draft_vocabulary, manifest)
        tensors[DRAFT_VOCABULARY] = draft_vocabulary.to("cpu", torch.int32)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(folder) as temporary:
            for name, part in _file_parts(tensors, max_file_bytes).items():
                save_file(part, temporary / name, metadata={"format": "pt"})
            for name, content in (extra_files or {}).items():
                (temporary / name).write_bytes(content)
            records = {}
            for path in sorted(temporary.iterdir()):
                # safetensors makes its files private; a store is read by other users: as open as a new folder.
                path.chmod(temporary.stat().st_mode & 0o666)
                records[path.name] = FileRecord(sha256=_sha256(path), size=path.stat().st_size)
            manifest = manifest.model_copy(update={"files": records})
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
    tensors = _read_tensors(folder, manifest)
    draft_vocabulary = tensors.pop(DRAFT_VOCABULARY, None)
    heads = build_heads(manifest, {name: t.to(device=device, dtype=dtype) for name, t in tensors.items()})
    notices = []
    if manifest.quantization != quantization:
        notices.append(
            f"heads {manifest.name}@{manifest.version} were trained on the backbone in {_spoken(manifest.quantization)}"
            f" and it is served in {_spoken(quantization)}: the output is exact all the same, acceptance may differ"
        )
    return LoadedHeads(
        heads=heads.eval().requires_grad_(False),
        manifest=manifest,
        draft_vocabulary=None if draft_vocabulary is None else draft_vocabulary.to(device, torch.int64),
        notices=tuple(notices),
    )


def read_heads(folder: Path) -> LoadedHeads:
    """A checkpoint as it is, on the CPU and in its own precision, held against no backbone. Raises `HeadsError`."""
    manifest = read_manifest(folder)
    _check_files(folder, manifest)
    tensors = _read_tensors(folder, manifest)
    draft_vocabulary = tensors.pop(DRAFT_VOCABULARY, None)
    return LoadedHeads(
        heads=build_heads(manifest, tensors).eval().requires_grad_(False),
        manifest=manifest,
        draft_vocabulary=None if draft_vocabulary is None else draft_vocabulary.long(),
        notices=(),
    )


def verify_heads(folder: Path) -> HeadsManifest:
    """Check a checkpoint folder in itself: manifest, checksums, tensors. Raises `HeadsError` for the first fault."""
    manifest = read_manifest(folder)
    _check_files(folder, manifest)
    _read_tensors(folder, manifest)
    return manifest


def resolve_heads(path: Path) -> Path:
    """The checkpoint folder of a path: itself, or for a backbone's folder in a store the version that `latest` names.

    Raises `HeadsError` where there is none.
    """
    if (path / MANIFEST_FILE).is_file():
        return path
    latest = path / LATEST_FILE
    if not latest.is_file():
        what = "has no manifest.json and no latest" if path.is_dir() else "no such folder"
        raise HeadsError(f"{path}: {what}: give a checkpoint folder, or a store's folder of this backbone")
    name = _read_text(latest).decode(errors="replace").strip()
    if not is_version_folder(name):
        raise HeadsError(f"{latest}: {name[:80]!r} is not the name of a version (name@version)")
    folder = path / name
    if folder.resolve().parent != path.resolve():
        raise HeadsError(f"{latest}: {name} leads outside the store")
    if not (folder / MANIFEST_FILE).is_file():
        raise HeadsError(f"{latest}: names {name}, which has no {MANIFEST_FILE}")
    return folder


def is_version_folder(name: str) -> bool:
    """Whether this can be the name of a version's folder in a store: name@version, nothing that leads elsewhere."""
    return _VERSION_FOLDER.fullmatch(name) is not None


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
    if not _weight_files(manifest):
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


def _read_tensors(folder: Path, manifest: HeadsManifest) -> dict[str, Tensor]:
    """Every weight of the manifest, and the draft vocabulary where there is one, as stored."""
    shapes, dtype = expected_shapes(manifest), _DTYPES[manifest.dtype]
    expected = {name: (shape, dtype) for name, shape in shapes.items()}
    if manifest.draft_vocab_size is not None:
        expected[DRAFT_VOCABULARY] = ((manifest.draft_vocab_size,), torch.int32)
    tensors: dict[str, Tensor] = {}
    origin: dict[str, Path] = {}
    files = [folder / name for name in _weight_files(manifest)]
    for path in files:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in list(file.keys()):
                    tensors[name], origin[name] = file.get_tensor(name), path
        except (SafetensorError, OSError) as error:
            raise HeadsError(f"{path}: not a readable safetensors file: {error}") from error
    if set(tensors) != set(expected):
        where = files[0] if len(files) == 1 else folder
        raise HeadsError(f"{where}: holds tensors {sorted(tensors)}, expected {sorted(expected)}")
    for name, tensor in tensors.items():
        shape, kind = expected[name]
        if tuple(tensor.shape) != shape or tensor.dtype != kind:
            raise HeadsError(
                f"{origin[name]}: {name} is {tensor.dtype} {list(tensor.shape)}, the manifest says {kind} {list(shape)}"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise HeadsError(
                f"{origin[name]}: {name} holds values that are not finite: the training that made it diverged"
            )
    if DRAFT_VOCABULARY in tensors:
        _check_draft_vocabulary(origin[DRAFT_VOCABULARY], tensors[DRAFT_VOCABULARY], manifest)
    return tensors


def _check_draft_vocabulary(where: Path, tokens: Tensor, manifest: HeadsManifest) -> None:
    ids = tokens.long()
    ascending = bool((ids.diff() > 0).all())
    if not ascending or int(ids[0]) < 0 or int(ids[-1]) >= manifest.vocab_size:
        raise HeadsError(f"{where}: {DRAFT_VOCABULARY} must be ascending token ids below {manifest.vocab_size}")


def _weight_files(manifest: HeadsManifest) -> list[str]:
    return sorted(name for name in manifest.files if _WEIGHT_FILE.fullmatch(name))


def _file_parts(tensors: Mapping[str, Tensor], max_bytes: int | None) -> dict[str, dict[str, Tensor]]:
    """File name -> its tensors, in order, each file about `max_bytes` at most: a single tensor is never cut."""
    parts: list[dict[str, Tensor]] = [{}]
    room = max_bytes
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if room is not None and max_bytes is not None:
            if size > room and parts[-1]:
                parts.append({})
                room = max_bytes
            room -= size
        parts[-1][name] = tensor
    if len(parts) == 1:
        return {HEADS_FILE: parts[0]}
    return {f"heads-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, start=1)}


@contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `folder`, on the disk to stay, when the block ends well.

    A block that raises leaves nothing. Raises `OSError`, also where `folder` is there by then and not empty.
    """
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
