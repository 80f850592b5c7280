"""From a foreign folder to a Gorgon checkpoint and back."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gorgon_engine.heads.checkpoint import (
    LoadedHeads,
    load_heads,
    read_heads,
    read_manifest,
    save_heads,
    written_beside,
)
from gorgon_engine.heads.eagle import EagleHead
from gorgon_engine.heads.families import dtype_of, family_fields
from gorgon_engine.heads.hydra import HydraHeads
from gorgon_engine.heads.medusa import MedusaHeads
from gorgon_protocol.errors import HeadsError
from gorgon_protocol.manifest import SCHEMA_VERSION, HeadsManifest, TrainingRecord
from gorgon_trainer.interop import hydra, medusa, vllm
from gorgon_trainer.interop.foreign import (
    CONFIG_FILE,
    Backbone,
    ExportedHeads,
    ForeignTensors,
    ImportedHeads,
    read_config,
    read_tensors,
)

Quantization = Literal["none", "nf4", "int8"]


class ImportFormat(StrEnum):
    AUTO = "auto"
    MEDUSA = "medusa"
    VLLM_MEDUSA = "vllm-medusa"
    HYDRA = "hydra"


class ExportFormat(StrEnum):
    MEDUSA_V1 = "medusa-v1"
    MEDUSA_V2 = "medusa-v2"
    VLLM_MEDUSA = "vllm-medusa"
    HYDRA = "hydra"


@dataclass(frozen=True, slots=True)
class ImportResult:
    manifest: HeadsManifest
    format: ImportFormat
    notices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Layout:
    weight_files: Callable[[Path], list[Path]]
    recognises: Callable[[tuple[str, ...]], bool]
    read: Callable[[dict[str, Any], ForeignTensors, Backbone], ImportedHeads]
    expected: str  # what its folder holds


_LAYOUTS = {
    # vLLM's files have no name of their own: tried last.
    ImportFormat.HYDRA: _Layout(hydra.weight_files, hydra.is_hydra, hydra.import_hydra, "hydra_lm_head.pt"),
    ImportFormat.MEDUSA: _Layout(
        medusa.weight_files, medusa.is_medusa, medusa.import_medusa, "medusa_lm_head.safetensors or .pt"
    ),
    ImportFormat.VLLM_MEDUSA: _Layout(vllm.weight_files, vllm.is_vllm, vllm.import_vllm, vllm.WEIGHTS_FILE),
}


def import_heads(
    source: Path,
    out: Path,
    *,
    backbone: Backbone,
    name: str,
    version: str = "1",
    format: ImportFormat = ImportFormat.AUTO,
    quantization: Quantization = "none",
) -> ImportResult:
    """Make the checkpoint folder `out` of a foreign folder.

    backbone: the model that the heads were trained on; their shapes are checked against it. quantization: what it was
    trained in, which no foreign layout says. The tensors keep their precision (float32 where a file mixes several).
    Pickles are read for tensors alone. Raises `HeadsError` where anything is missing, left over or does not fit, with
    nothing written.
    """
    if os.path.lexists(out):
        raise HeadsError(f"{out}: exists already: give a new folder")
    config = read_config(source)
    kind, tensors = _open(source, format)
    imported = _LAYOUTS[kind].read(config, tensors, backbone)
    heads = imported.heads
    size = None if imported.draft_vocabulary is None else imported.draft_vocabulary.numel()
    origin = str(config.get("base_model_name_or_path") or "")
    settings: dict[str, bool | int | float | str] = {"imported_from": str(kind)}
    if origin:
        settings["base_model"] = origin
    fields = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "version": version,
        "backbone": backbone.reference.model_dump(),
        "vocab_size": backbone.config.vocab_size,
        "offsets": list(range(2, heads.num_heads + 2)),
        "draft_vocab_size": size,
        "dtype": str(dtype_of(heads)).removeprefix("torch."),
        "quantization": quantization,
        "training": TrainingRecord(data=f"not known: imported from the layout {kind}", settings=settings).model_dump(),
    }
    manifest = HeadsManifest.from_json(json.dumps(fields | family_fields(heads)).encode(), source=str(out))
    manifest = save_heads(out, heads, manifest, draft_vocabulary=imported.draft_vocabulary)
    notices = list(imported.notices)
    if origin:
        notices.append(f"its config says that it was trained on {origin}: the identity of {backbone.name} goes with it")
    return ImportResult(manifest, kind, tuple(notices))


def export_heads(
    checkpoint: Path, out: Path, *, format: ExportFormat, backbone: Backbone | None = None
) -> tuple[str, ...]:
    """Write a checkpoint as a foreign folder `out`, and return notices for people.

    backbone: needed where the layout holds projections and the checkpoint shares the backbone's. A head of offset 1 is
    left out. Raises `HeadsError` where the layout cannot say what the checkpoint is, with nothing written.
    """
    if os.path.lexists(out):
        raise HeadsError(f"{out}: exists already: give a new folder")
    loaded = _load(checkpoint, backbone)
    try:
        exported = _export(loaded, format, backbone)
    except HeadsError as error:
        raise HeadsError(f"{checkpoint}: not exported as {format}: {error}") from error
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(out) as temporary:
            (temporary / CONFIG_FILE).write_text(json.dumps(exported.config, indent=2) + "\n", encoding="utf-8")
            _write_tensors(temporary / exported.weights_file, exported.tensors)
    except (OSError, SafetensorError, RuntimeError) as error:  # the last is torch.save's on a full disk
        raise HeadsError(f"{out}: cannot be written: {error}") from error
    dropped = len(loaded.manifest.offsets) - len(loaded.manifest.tree_heads)
    notices = [f"the head of offset 1 is left out: {format} begins at offset 2"] if dropped else []
    return (*notices, *exported.notices)


def _open(source: Path, format: ImportFormat) -> tuple[ImportFormat, ForeignTensors]:
    """The layout of a folder, told by its files and the names in them, and its tensors."""
    candidates = list(_LAYOUTS) if format is ImportFormat.AUTO else [format]
    for kind in candidates:
        layout = _LAYOUTS[kind]
        paths = layout.weight_files(source)
        if not paths:
            continue
        tensors = read_tensors(paths)
        where = paths[0] if len(paths) == 1 else source
        if layout.recognises(tuple(tensors)):
            if kind is ImportFormat.VLLM_MEDUSA:
                tensors = vllm.with_plain_names(tensors, where)
            return kind, ForeignTensors(where, tensors)
        if format is not ImportFormat.AUTO or kind is not ImportFormat.VLLM_MEDUSA:
            some = ", ".join(sorted(tensors)[:3])
            raise HeadsError(f"{where}: its tensors ({some}, ...) are not of the layout {kind}")
    expected = "; ".join(f"{kind}: {_LAYOUTS[kind].expected}" for kind in candidates)
    raise HeadsError(f"{source}: no heads of a known layout in it (expected {expected})")


def _load(checkpoint: Path, backbone: Backbone | None) -> LoadedHeads:
    """The checkpoint in its own precision, held against the backbone where one is given."""
    if backbone is None:
        return read_heads(checkpoint)
    manifest = read_manifest(checkpoint)
    return load_heads(
        checkpoint,
        backbone_identity=backbone.reference.identity,
        config=backbone.config,
        quantization=manifest.quantization,
        device=torch.device("cpu"),
        dtype=getattr(torch, manifest.dtype),
    )


def _export(loaded: LoadedHeads, format: ExportFormat, backbone: Backbone | None) -> ExportedHeads:
    """The foreign files' content. Raises `HeadsError` with the reason alone."""
    manifest, heads = loaded.manifest, loaded.heads
    used = manifest.tree_heads
    if isinstance(heads, EagleHead):
        raise HeadsError("its heads are of the family eagle, for which there is no foreign layout yet")
    if not used or len(used) != len(set(manifest.offsets) - {1}):
        raise HeadsError(f"its offsets {list(manifest.offsets)} are not 2, 3, ... without a gap")
    if loaded.draft_vocabulary is not None and format is not ExportFormat.VLLM_MEDUSA:
        raise HeadsError("it drafts from a part of the vocabulary, which only vllm-medusa can say")
    if isinstance(heads, HydraHeads):
        if format is not ExportFormat.HYDRA:
            raise HeadsError("its heads are of the family hydra")
        hydra.check_exportable(heads)
        return hydra.export_hydra(heads, manifest, projections=_projections(loaded, backbone))
    if format is ExportFormat.HYDRA:
        raise HeadsError("its heads are of the family medusa")
    chosen = heads.select(used)
    if format is ExportFormat.VLLM_MEDUSA:
        lm_head = _projections(loaded, backbone)[0] if heads.shares_projection else None
        return vllm.export_vllm(chosen, manifest, lm_head=lm_head, draft_vocabulary=loaded.draft_vocabulary)
    if format is ExportFormat.MEDUSA_V1:
        projections = [_projections(loaded, backbone)[head] for head in used]
        return medusa.export_medusa(chosen, manifest, version=1, projections=projections)
    if not heads.shares_projection:
        raise HeadsError("its heads have projections of their own: use medusa-v1")
    return medusa.export_medusa(chosen, manifest, version=2, projections=None)


def _projections(loaded: LoadedHeads, backbone: Backbone | None) -> list[Tensor]:
    """The projection of every head, [V', C]: own, or the backbone's rows in the heads' precision."""
    assert not isinstance(loaded.heads, EagleHead)
    if loaded.heads.projection is not None:
        return list(loaded.heads.projection)
    if backbone is None:
        remedy = ", or use medusa-v2" if isinstance(loaded.heads, MedusaHeads) else ""
        raise HeadsError(f"this layout holds projections and the heads share their backbone's: give the model{remedy}")
    lm_head = backbone.lm_head().to(dtype_of(loaded.heads))
    if loaded.draft_vocabulary is not None:
        lm_head = lm_head[loaded.draft_vocabulary]
    return [lm_head] * loaded.heads.num_heads


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    if path.suffix == ".pt":
        torch.save(dict(tensors), path)
        return
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes its files private
