"""Which drafters an engine runs."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import torch

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.drafters.base import Drafter
from gorgon_engine.drafters.heads import DrawnHeadsDrafter, HeadsDrafter
from gorgon_engine.drafters.ngram import NgramDrafter
from gorgon_engine.heads.checkpoint import LoadedHeads, Quantization, load_heads, resolve_heads
from gorgon_engine.models.identity import backbone_identity
from gorgon_engine.tree.builders import RankPath, cartesian_paths, sparse_paths
from gorgon_engine.tree.tree import MAX_NODES
from gorgon_protocol.errors import BadRequestError, HeadsError
from gorgon_protocol.manifest import HeadsManifest

_WIDTHS = (4, 3, 2, 2)  # of a cartesian tree, as far as there are heads


class DrafterKind(StrEnum):
    HEADS = "heads"
    NGRAM = "ngram"
    BOTH = "both"
    NONE = "none"


class HeadsTree(StrEnum):
    """How the heads' guesses become a tree (`gorgon_engine.tree.builders`)."""

    DYNAMIC = "dynamic"
    SPARSE = "sparse"
    CARTESIAN = "cartesian"


def make_drafters(
    kind: DrafterKind | None,
    heads: Path | None,
    *,
    backbone: Backbone,
    folder: Path,
    tree: HeadsTree = HeadsTree.DYNAMIC,
    draw: bool = False,
) -> tuple[list[Drafter], list[str]]:
    """The drafters of a choice, and notices for the person who made it.

    kind None: all there are. heads: a checkpoint folder, or a backbone's folder in a store. folder: the backbone's.
    draw: draw the heads' guesses, as Leviathan's rule needs them. Raises `BadRequestError` where heads are wanted and
    none given or where the options exclude each other, `HeadsError` for heads that do not fit the backbone.
    """
    if kind is None:
        kind = DrafterKind.NGRAM if heads is None else DrafterKind.BOTH
    drafters: list[Drafter] = []
    notices: list[str] = []
    if kind in (DrafterKind.HEADS, DrafterKind.BOTH):
        if heads is None:
            raise BadRequestError(f"drafter {kind} needs trained heads: give their folder with --heads")
        if draw and kind is DrafterKind.BOTH:
            raise BadRequestError("drawn drafts cannot share a tree with looked-up ones: choose the drafter heads")
        loaded = _load(heads, backbone, folder)
        drafters.append(_heads_drafter(loaded, backbone, tree, draw))
        notices += loaded.notices
    elif heads is not None:
        notices.append(f"heads {heads} are not used: the drafter is {kind}")
    if kind in (DrafterKind.NGRAM, DrafterKind.BOTH):
        drafters.append(NgramDrafter(device=backbone.device))
    return drafters, notices


def _load(path: Path, backbone: Backbone, folder: Path) -> LoadedHeads:
    # Nothing on a CPU gains from narrower heads: their products are small and float32 is its fastest precision.
    dtype = torch.float32 if backbone.device.type == "cpu" else backbone.cache_dtype
    return load_heads(
        resolve_heads(path),
        backbone_identity=backbone_identity(folder),
        config=backbone.config,
        quantization=_quantization(backbone),
        device=backbone.device,
        dtype=dtype,
    )


def _heads_drafter(loaded: LoadedHeads, backbone: Backbone, tree: HeadsTree, draw: bool) -> Drafter:
    manifest = loaded.manifest
    used = manifest.tree_heads
    if not used:
        raise HeadsError(
            f"heads {manifest.name}@{manifest.version} predict offsets {list(manifest.offsets)}: without offset 2 "
            "nothing continues the token that the backbone itself gives"
        )
    accuracies = [manifest.accuracies[head] for head in used] if manifest.accuracies is not None else None
    if draw and accuracies is not None:
        # What is drawn first is oftenest right: a measured order of ranks that differs is noise.
        accuracies = [tuple(sorted(row, reverse=True)) for row in accuracies]
    paths = _paths(tree, manifest, accuracies)
    # The head of offset 1 repeats the root: never computed.
    heads = loaded.heads.select(used)
    if not draw:
        return HeadsDrafter(heads, backbone.project, paths=paths)
    if paths is None:
        raise BadRequestError("drawn drafts need a fixed tree (sparse or cartesian): a dynamic one would bias them")
    return DrawnHeadsDrafter(heads, backbone.project, paths=paths, accuracies=accuracies)


def _paths(
    tree: HeadsTree, manifest: HeadsManifest, accuracies: Sequence[Sequence[float]] | None
) -> Sequence[RankPath] | None:
    """The rank paths of a fixed tree, as many as any budget takes; None for a dynamic one."""
    if tree is HeadsTree.DYNAMIC:
        return None
    if tree is HeadsTree.CARTESIAN:
        return cartesian_paths(_WIDTHS[: len(manifest.tree_heads)], MAX_NODES - 1)
    if manifest.recommended_tree:
        return manifest.recommended_tree
    if accuracies is None:
        raise BadRequestError(
            f"heads {manifest.name}@{manifest.version} carry neither accuracies nor a recommended tree: "
            "a sparse tree needs one of them, use a dynamic tree"
        )
    return sparse_paths(accuracies, MAX_NODES - 1)


def _quantization(backbone: Backbone) -> Quantization:
    kind = backbone.kernels.rpartition("-")[2]
    return "nf4" if kind == "nf4" else "int8" if kind == "int8" else "none"
