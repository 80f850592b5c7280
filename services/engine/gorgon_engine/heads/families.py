"""The families of draft heads: from a manifest to weights and back."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gorgon_engine.heads.eagle import EagleHead, EagleShape
from gorgon_engine.heads.hydra import HydraHeads, HydraShape
from gorgon_engine.heads.medusa import MedusaHeads
from gorgon_protocol.manifest import DecoderLayer, HeadsManifest

DraftHeads = MedusaHeads | HydraHeads | EagleHead


def expected_shapes(manifest: HeadsManifest) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight that heads of this manifest have."""
    if manifest.family != "medusa":
        return {name: tuple(tensor.shape) for name, tensor in _empty(manifest).named_parameters()}
    heads, blocks, hidden = manifest.num_heads, manifest.num_blocks, manifest.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"weight": (heads, blocks, hidden, hidden), "bias": (heads, blocks, hidden)}
    if manifest.projection == "own":
        shapes["projection"] = (heads, manifest.num_draft_tokens, hidden)
    return shapes


def build_heads(manifest: HeadsManifest, tensors: Mapping[str, Tensor]) -> DraftHeads:
    """Heads that are the given weights, named and shaped as `expected_shapes` says."""
    if manifest.family == "medusa":
        return MedusaHeads.from_tensors(dict(tensors))
    heads = _empty(manifest)
    heads.load_state_dict(dict(tensors), assign=True)
    return heads


def heads_tensors(heads: DraftHeads) -> dict[str, Tensor]:
    """The weights by name, on the CPU."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in heads.named_parameters()}


def family_fields(heads: DraftHeads) -> dict[str, Any]:
    """The fields of a manifest that describe the heads' architecture."""
    fields: dict[str, Any] = {
        "hidden_size": heads.hidden_size,
        "num_heads": heads.num_heads,
        "projection": "shared" if heads.shares_projection else "own",
    }
    if isinstance(heads, MedusaHeads):
        return fields | {"family": "medusa", "num_blocks": heads.num_blocks}
    if isinstance(heads, EagleHead):
        layer = {name: getattr(heads.shape, name) for name in DecoderLayer.model_fields}
        return fields | {"family": "eagle", "num_blocks": 1, "layer": DecoderLayer(**layer)}
    shape = heads.shape
    return fields | {
        "family": "hydra",
        "num_blocks": shape.num_blocks,
        "normalised": shape.normalised,
        "residual": "matrix" if shape.matrix_residual else "hidden",
        "projection_bias": shape.projection_bias,
    }


def _empty(manifest: HeadsManifest) -> HydraHeads | EagleHead:
    """Heads without weights."""
    if manifest.layer is None:
        return HydraHeads(_hydra_shape(manifest), device="meta")
    layer, size = manifest.layer.model_dump(), manifest.hidden_size
    return EagleHead(EagleShape(hidden_size=size, num_heads=manifest.num_heads, **layer), device="meta")


def _hydra_shape(manifest: HeadsManifest) -> HydraShape:
    return HydraShape(
        hidden_size=manifest.hidden_size,
        num_heads=manifest.num_heads,
        num_blocks=manifest.num_blocks,
        normalised=manifest.normalised,
        matrix_residual=manifest.residual == "matrix",
        own_projection=manifest.num_draft_tokens if manifest.projection == "own" else None,
        projection_bias=manifest.projection_bias,
    )


def dtype_of(heads: DraftHeads) -> torch.dtype:
    return next(heads.parameters()).dtype
