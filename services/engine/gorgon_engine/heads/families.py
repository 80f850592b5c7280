"""The families of draft heads: from a manifest to weights and back."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gorgon_engine.heads.hydra import HydraHeads, HydraShape
from gorgon_engine.heads.medusa import MedusaHeads
from gorgon_protocol.manifest import HeadsManifest

DraftHeads = MedusaHeads | HydraHeads


def expected_shapes(manifest: HeadsManifest) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight that heads of this manifest have."""
    if manifest.family == "hydra":
        weights = HydraHeads(_hydra_shape(manifest), device="meta").named_parameters()
        return {name: tuple(tensor.shape) for name, tensor in weights}
    heads, blocks, hidden = manifest.num_heads, manifest.num_blocks, manifest.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"weight": (heads, blocks, hidden, hidden), "bias": (heads, blocks, hidden)}
    if manifest.projection == "own":
        shapes["projection"] = (heads, manifest.num_draft_tokens, hidden)
    return shapes


def build_heads(manifest: HeadsManifest, tensors: Mapping[str, Tensor]) -> DraftHeads:
    """Heads that are the given weights, named and shaped as `expected_shapes` says."""
    if manifest.family == "medusa":
        return MedusaHeads.from_tensors(dict(tensors))
    heads = HydraHeads(_hydra_shape(manifest), device="meta")
    heads.load_state_dict(dict(tensors), assign=True)
    return heads


def heads_tensors(heads: DraftHeads) -> dict[str, Tensor]:
    """The weights by name, on the CPU."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in heads.named_parameters()}


def family_fields(heads: DraftHeads) -> dict[str, str | int | bool]:
    """The fields of a manifest that describe the heads' architecture."""
    fields: dict[str, str | int | bool] = {
        "hidden_size": heads.hidden_size,
        "num_heads": heads.num_heads,
        "projection": "shared" if heads.shares_projection else "own",
    }
    if isinstance(heads, MedusaHeads):
        return fields | {"family": "medusa", "num_blocks": heads.num_blocks}
    shape = heads.shape
    return fields | {
        "family": "hydra",
        "num_blocks": shape.num_blocks,
        "normalised": shape.normalised,
        "residual": "matrix" if shape.matrix_residual else "hidden",
        "projection_bias": shape.projection_bias,
    }


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
