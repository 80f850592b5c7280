"""The layout of the Medusa authors (FasterDecoding/Medusa), which Text Generation Inference serves too.

    config.json                   medusa_num_heads, medusa_num_layers, base_model_name_or_path, version
    medusa_lm_head.safetensors    {head}.{layer}.linear.{weight,bias}, and in version 1 {head}.{num_layers}.weight

Version 1 has a projection a head, version 2 uses the backbone's lm_head. Published configs are known to count other
heads than the file holds: the tensors decide. The original program repeats one block where it says several; TGI
keeps them apart, as here.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gorgon_engine.heads.medusa import MedusaHeads
from gorgon_protocol.errors import HeadsError
from gorgon_protocol.manifest import HeadsManifest
from gorgon_trainer.interop.foreign import (
    Backbone,
    ExportedHeads,
    ForeignTensors,
    ImportedHeads,
    common_dtype,
    count,
    fold_projections,
    whole_number,
)

WEIGHT_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")

_LINEAR = r"(\d+)\.(\d+)\.linear\.(weight|bias)"
_PROJECTION = r"(\d+)\.(\d+)\.weight"


def is_medusa(names: tuple[str, ...]) -> bool:
    return "0.0.linear.weight" in names


def import_medusa(config: dict[str, Any], tensors: ForeignTensors, backbone: Backbone) -> ImportedHeads:
    """Heads of version 1 or 2. Raises `HeadsError` where tensors are missing, left over or of other shapes."""
    source, shape = tensors.source, backbone.config
    linears = tensors.matching(_LINEAR)
    num_heads = count(source, "heads", (match[1] for match in linears))
    num_blocks = count(source, "layers", (match[2] for match in linears))
    size = shape.hidden_size
    has_projections = bool(tensors.matching(_PROJECTION))
    if has_projections == (str(config.get("version", "")) == "2") and "version" in config:
        raise HeadsError(
            f"{source}: {'has' if has_projections else 'has no'} projections of its own, but its config says version "
            f"{config['version']!r}: the file is cut, or of another checkpoint"
        )
    heads, layers = range(num_heads), range(num_blocks)
    weight = [tensors.take(f"{i}.{j}.linear.weight", size, size) for i in heads for j in layers]
    bias = [tensors.take(f"{i}.{j}.linear.bias", size) for i in heads for j in layers]
    projections: list[Tensor] = []
    if has_projections:
        projections = [tensors.take(f"{i}.{num_blocks}.weight", shape.vocab_size, size) for i in heads]
    tensors.finish()
    dtype = common_dtype([*weight, *bias, *projections])
    content = {
        "weight": torch.stack(weight).to(dtype).view(num_heads, num_blocks, size, size),
        "bias": torch.stack(bias).to(dtype).view(num_heads, num_blocks, size),
    }
    projection = fold_projections([p.to(dtype) for p in projections], backbone.lm_head()) if projections else None
    if projection is not None:
        content["projection"] = projection
    notices = [
        f"its config counts {said} {what}, the tensors are of {found}: the tensors decide"
        for what, said, found in (
            ("heads", whole_number(config, "medusa_num_heads"), num_heads),
            ("layers", whole_number(config, "medusa_num_layers"), num_blocks),
        )
        if said not in (None, found)
    ]
    return ImportedHeads(MedusaHeads.from_tensors(content), None, tuple(notices))


def export_medusa(
    heads: MedusaHeads, manifest: HeadsManifest, *, version: int, projections: list[Tensor] | None
) -> ExportedHeads:
    """heads: those of offsets 2, 3, .... projections: [V, C] of each for version 1; None for version 2."""
    tensors: dict[str, Tensor] = {}
    for i in range(heads.num_heads):
        for j in range(heads.num_blocks):
            tensors[f"{i}.{j}.linear.weight"] = heads.weight[i, j].detach().clone()
            tensors[f"{i}.{j}.linear.bias"] = heads.bias[i, j].detach().clone()
        if projections is not None:
            tensors[f"{i}.{heads.num_blocks}.weight"] = projections[i].detach().clone()
    # No `architectures`: Text Generation Inference takes a config with them for another kind of speculator.
    config = {
        "medusa_num_heads": heads.num_heads,
        "medusa_num_layers": heads.num_blocks,
        "base_model_name_or_path": manifest.backbone.name,
        "version": str(version),
    }
    notices = []
    if heads.num_blocks > 1:
        limit = "Text Generation Inference reads one block a head only" if version == 2 else ""
        repeated = "the original Medusa program repeats the last block in place of all" if _blocks_differ(heads) else ""
        notices = [part for part in (limit, repeated) if part]
    return ExportedHeads(config, WEIGHT_FILES[0], tensors, tuple(notices))


def weight_files(folder: Path) -> list[Path]:
    """The weights of a folder in this layout: one file, safetensors preferred."""
    return [folder / name for name in WEIGHT_FILES if (folder / name).is_file()][:1]


def _blocks_differ(heads: MedusaHeads) -> bool:
    weight, bias = heads.weight.detach(), heads.bias.detach()
    return not (torch.equal(weight, weight[:, :1].expand_as(weight)) and torch.equal(bias, bias[:, :1].expand_as(bias)))
