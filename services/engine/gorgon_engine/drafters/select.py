"""Which drafters an engine runs."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.drafters.base import Drafter
from gorgon_engine.drafters.beam import BeamLimits
from gorgon_engine.drafters.eagle import EagleDrafter
from gorgon_engine.drafters.heads import DrawnHeadsDrafter, HeadsDrafter
from gorgon_engine.drafters.hydra import HydraDrafter
from gorgon_engine.drafters.ngram import NgramDrafter
from gorgon_engine.heads.bundled import bundled_heads
from gorgon_engine.heads.checkpoint import LoadedHeads, Quantization, load_heads, resolve_heads
from gorgon_engine.heads.eagle import EagleHead
from gorgon_engine.heads.hydra import HydraHeads, Projection
from gorgon_engine.heads.native import native_eagle, native_hydra, pack_eagle_for_cpu, pack_for_cpu
from gorgon_engine.models.identity import backbone_identity
from gorgon_engine.tree.builders import RankPath, cartesian_paths, sparse_paths
from gorgon_engine.tree.tree import MAX_NODES
from gorgon_protocol.errors import BadRequestError, HeadsError
from gorgon_protocol.manifest import HeadsManifest

_WIDTHS = (4, 3, 2, 2)  # of a cartesian tree, as far as there are heads

# On a CPU every row and every depth of the search costs a noticeable part of a plain step: what is unlikely to be
# accepted is not looked below (docs/experiments.md).
_CPU_LIMITS = BeamLimits(num_choices=6, width=4, min_path_prob=0.2)

# On a GPU a pass of eight rows costs what one of one row does; more paths than that seldom reach the tree.
_GPU_LIMITS = BeamLimits(num_choices=8, width=8)
_LAYERS_PER_PASS = 1.7  # what a pass of the head costs, with its projection, in layers of a backbone
_GPU_DEPTHS = 5  # of heads without measured accuracies


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

    kind None: all there are. heads: a checkpoint folder, or a backbone's folder in a store; None: those that come with
    the program for this backbone, if any. folder: the backbone's.
    draw: draw the heads' guesses, as Leviathan's rule needs them. Raises `BadRequestError` where heads are wanted and
    none given or where the options exclude each other, `HeadsError` for heads that do not fit the backbone.
    """
    bundled = heads is None and kind in (None, DrafterKind.HEADS, DrafterKind.BOTH)
    if bundled:
        heads = bundled_heads(folder, backbone.config)
    if kind is None:
        kind = DrafterKind.NGRAM if heads is None else DrafterKind.BOTH
    drafters: list[Drafter] = []
    notices: list[str] = []
    if kind in (DrafterKind.HEADS, DrafterKind.BOTH):
        if heads is None:
            raise BadRequestError(
                f"drafter {kind} needs trained heads, and none come with the program for this model: give their folder "
                "with --heads"
            )
        if draw and kind is DrafterKind.BOTH:
            raise BadRequestError("drawn drafts cannot share a tree with looked-up ones: choose the drafter heads")
        loaded = load_heads_for(backbone, folder, heads)
        drafter, drafter_notices = heads_drafter(loaded, backbone, tree, draw)
        drafters.append(drafter)
        notices += drafter_notices
        if not bundled:  # nobody chose those: what they do in the default precision is documented with them
            notices += loaded.notices
    elif heads is not None:
        notices.append(f"heads {heads} are not used: the drafter is {kind}")
    if kind in (DrafterKind.NGRAM, DrafterKind.BOTH):
        drafters.append(NgramDrafter(device=backbone.device))
    return drafters, notices


def load_heads_for(backbone: Backbone, folder: Path, path: Path) -> LoadedHeads:
    """The heads of a checkpoint folder (or a store's folder of this backbone) as this loaded backbone runs them.

    folder: the backbone's. Raises `HeadsError` for heads that cannot be read or do not fit.
    """
    # Nothing on a CPU gains from narrower heads: their products are small and float32 is its fastest precision.
    dtype = torch.float32 if backbone.device.type == "cpu" else backbone.cache_dtype
    return load_heads(
        resolve_heads(path),
        backbone_identity=backbone_identity(folder),
        config=backbone.config,
        quantization=served_quantization(backbone),
        device=backbone.device,
        dtype=dtype,
    )


def heads_drafter(loaded: LoadedHeads, backbone: Backbone, tree: HeadsTree, draw: bool) -> tuple[Drafter, list[str]]:
    """The drafter of heads that are there, and notices. The arguments are those of `make_drafters`.

    Raises `HeadsError` for heads that do not continue the backbone's own token, `BadRequestError` where the options
    exclude each other or ask for what these heads cannot give.
    """
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
    if draw and manifest.family != "medusa":
        raise BadRequestError(f"drawn drafts need heads of the medusa family: these are {manifest.family} heads")
    if isinstance(loaded.heads, HydraHeads):
        return _hydra_drafter(loaded.heads, backbone, loaded.draft_vocabulary, paths), []
    if isinstance(loaded.heads, EagleHead):
        return _eagle_drafter(loaded.heads, backbone, loaded.draft_vocabulary, paths, accuracies)
    vocabulary = loaded.draft_vocabulary
    project = _projection(backbone, vocabulary)
    # The head of offset 1 repeats the root: never computed.
    heads = loaded.heads.select(used)
    if not draw:
        return HeadsDrafter(heads, project, paths=paths, draft_vocabulary=vocabulary), []
    if paths is None:
        raise BadRequestError("drawn drafts need a fixed tree (sparse or cartesian): a dynamic one would bias them")
    drawn = DrawnHeadsDrafter(
        heads,
        project,
        paths=paths,
        accuracies=accuracies,
        draft_vocabulary=vocabulary,
        vocab_size=backbone.config.vocab_size,
    )
    return drawn, []


def _projection(backbone: Backbone, vocabulary: Tensor | None) -> Projection:
    return backbone.project if vocabulary is None else backbone.project_to(vocabulary)


def _hydra_drafter(
    heads: HydraHeads, backbone: Backbone, vocabulary: Tensor | None, paths: Sequence[RankPath] | None
) -> HydraDrafter:
    on_cpu = backbone.device.type == "cpu"
    if on_cpu:
        heads = pack_for_cpu(heads, backbone)
    native = native_hydra(heads, backbone, vocabulary) if paths is None else None
    return HydraDrafter(
        heads,
        embed=backbone.embed,
        project=_projection(backbone, vocabulary) if native is None else None,  # a copy: not made for nothing
        draft_vocabulary=vocabulary,
        paths=paths,
        limits=_CPU_LIMITS if on_cpu else BeamLimits(),
        native=native,
    )


def _eagle_drafter(
    head: EagleHead,
    backbone: Backbone,
    vocabulary: Tensor | None,
    paths: Sequence[RankPath] | None,
    accuracies: Sequence[Sequence[float]] | None,
) -> tuple[Drafter, list[str]]:
    """And a notice where the GPU's kernels cannot run the head."""
    on_cpu = backbone.device.type == "cpu"
    notices = []
    if not on_cpu:
        reason = "a fixed tree is followed" if paths is not None else _gpu_refusal(head, backbone)
        if reason is None:
            return eagle_on_gpu(head, backbone, vocabulary, accuracies), []
        notices.append(f"the heads draft by tensor operations, several times slower than the GPU's kernels: {reason}")
    if on_cpu:
        vocabulary = _affordable(head, vocabulary)
        head = pack_eagle_for_cpu(head, backbone)
    native = native_eagle(head, backbone, vocabulary) if paths is None else None
    drafter = EagleDrafter(
        head,
        embed=backbone.embed,
        project=_projection(backbone, vocabulary) if native is None else None,  # a copy: not made for nothing
        draft_vocabulary=vocabulary,
        paths=paths,
        limits=_CPU_LIMITS if on_cpu else BeamLimits(),
        native=native,
    )
    return drafter, notices


def _gpu_refusal(head: EagleHead, backbone: Backbone) -> str | None:
    # Here and below: torch for CPUs comes without Triton.
    try:
        from gorgon_engine.drafters.eagle_gpu import refusal
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return refusal(head, backbone)


def eagle_on_gpu(
    head: EagleHead, backbone: Backbone, vocabulary: Tensor | None, accuracies: Sequence[Sequence[float]] | None
) -> Drafter:
    """A head on the GPU's kernels (which `refusal` says can run it), as precise as the backbone is: one in NF4 gets a
    layer in NF4. As deep as its accuracies promise to pay."""
    from gorgon_engine.drafters.eagle_gpu import drafter_of, profitable_depths

    num_depths = min(head.num_heads, _GPU_DEPTHS)
    if accuracies is not None:
        num_depths = profitable_depths(accuracies, pass_share=_LAYERS_PER_PASS / backbone.config.num_layers)
    four_bit = served_quantization(backbone) == "nf4"
    return drafter_of(head, backbone, vocabulary, four_bit=four_bit, num_depths=num_depths, limits=_GPU_LIMITS)


def _affordable(head: EagleHead, vocabulary: Tensor | None) -> Tensor | None:
    """Of a drafting vocabulary [V] so many tokens that the projection to them is no larger than the layer itself.

    Each depth of the search reads both, and on a CPU that is what it costs. Tokenizers number the most frequent tokens
    first, so that the lowest ids are kept: 7,296 of SmolLM2's 16,384, for 1-2 % fewer accepted tokens and a draft that
    is a quarter cheaper (docs/experiments.md).
    """
    if vocabulary is None:
        return None
    size = sum(parameter.numel() for parameter in head.parameters() if parameter.ndim == 2)
    return vocabulary[: size // head.hidden_size]


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


def served_quantization(backbone: Backbone) -> Quantization:
    """As a manifest names it."""
    parts = backbone.kernels.split("-")  # `native-int8`, `triton-nf4-gluon`, ...
    return "nf4" if "nf4" in parts else "int8" if "int8" in parts else "none"
