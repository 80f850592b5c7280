"""The lifted model (`lifting`), ready to be served: made on the device itself, in seconds, with its heads and controls.

Quantising and dequantising are a few torch operations here, in bitsandbytes' format and with its results: a machine
that measures need not have it.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from lifting import Lift
from torch import Tensor

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.backbone.select import serve_weights
from gorgon_engine.backbone.torch_backbone import TorchBackbone
from gorgon_engine.drafters.base import Drafter
from gorgon_engine.drafters.ngram import NgramDrafter
from gorgon_engine.drafters.select import HeadsTree, heads_drafter
from gorgon_engine.engine import LoadedParts
from gorgon_engine.heads.bundled import bundled_heads
from gorgon_engine.heads.checkpoint import LoadedHeads, read_heads, resolve_heads
from gorgon_engine.heads.eagle import EagleHead
from gorgon_engine.models.linear import DenseLinear, Linear, LinearRole
from gorgon_engine.models.loading import BackboneWeights, LayerWeights, load_weights
from gorgon_engine.models.nf4 import BLOCK_SIZE, Nf4Linear, Nf4Tensor, quantize_nf4
from gorgon_engine.prepared import HeadsDescription
from gorgon_engine.tokenizer import Tokenizer
from gorgon_protocol.errors import HeadsError, ModelError
from gorgon_protocol.manifest import DecoderLayer

_CODE_DEVIATION = 0.58  # of a code's value whose index is uniform


def load_nf4(folder: Path, *, device: torch.device, dtype: torch.dtype) -> BackboneWeights:
    """A folder's weights with the layers' linears in NF4 and the norms in float32. Raises `ModelError`."""

    def make(weight: Tensor, bias: Tensor | None, role: LinearRole) -> Linear:
        if bias is not None:
            raise ModelError(f"{folder}: its {role} has a bias, which is not lifted: give a model of the Llama family")
        weight = weight.to(device)
        if role is LinearRole.LM_HEAD:
            return DenseLinear(weight.to(dtype, copy=True))
        return Nf4Linear(quantize_nf4(weight))

    return load_weights(folder, dtype=dtype, device=device, norm_dtype=torch.float32, make_linear=make)


def dequantize_nf4(weight: Nf4Tensor) -> Tensor:
    """[out, in] float32: code times scale."""
    indices = torch.stack((weight.packed >> 4, weight.packed & 15), dim=-1).view(-1, BLOCK_SIZE)
    values = weight.code[indices.int()] * weight.absmax[:, None]
    return values.view(weight.out_features, weight.in_features)


def in_float32(weights: BackboneWeights) -> BackboneWeights:
    """The same numbers, every matrix dense in float32: eight times the memory."""

    def wide(linear: Linear) -> Linear:
        if isinstance(linear, Nf4Linear):
            return DenseLinear(dequantize_nf4(linear.weight))
        assert isinstance(linear, DenseLinear)
        return DenseLinear(linear.weight.float(), None if linear.bias is None else linear.bias.float())

    layers = tuple(_with_linears(layer, wide) for layer in weights.layers)
    return replace(weights, embedding=weights.embedding.float(), layers=layers, lm_head=wide(weights.lm_head))


def with_random_layers(weights: BackboneWeights, generator: torch.Generator) -> BackboneWeights:
    """The control: every matrix of the layers random throughout, nothing zero, nothing computed for a reason. The rest
    stays, so that the tokens are those of the tokenizer."""

    def junk(linear: Linear) -> Linear:
        assert isinstance(linear, Nf4Linear)
        like = linear.weight
        device = like.packed.device
        packed = torch.randint(0, 256, like.packed.shape, dtype=torch.uint8, device=device, generator=generator)
        scales = 0.5 + torch.rand(like.absmax.shape, device=device, generator=generator)
        # Outputs as large as inputs: nothing overflows on the way through the layers.
        return Nf4Linear(replace(like, packed=packed, absmax=scales / (_CODE_DEVIATION * like.in_features**0.5)))

    return replace(weights, layers=tuple(_with_linears(layer, junk) for layer in weights.layers))


def _with_linears(layer: LayerWeights, change: Callable[[Linear], Linear]) -> LayerWeights:
    return replace(
        layer,
        qkv=change(layer.qkv),
        o=change(layer.o),
        gate_up=change(layer.gate_up),
        down=change(layer.down),
    )


def serve_float32(weights: BackboneWeights) -> Backbone:
    """The reference: torch's own operations, in float32 throughout."""
    device = weights.embedding.device
    return TorchBackbone(in_float32(weights), device=device, dtype=torch.float32, quantization="none")


def serve(weights: BackboneWeights, dtype: torch.dtype, heads: LoadedHeads | None, folder: Path) -> LoadedParts:
    """What `load_parts` makes of a folder, of lifted weights and heads: the kernels that the engine chooses for this
    device, and the lookup beside the heads.

    dtype: of the activations. folder: of the small model, whose tokenizer it is.
    """
    backbone, notices = serve_weights(weights, device=weights.embedding.device, dtype=dtype)
    drafters: list[Drafter] = []
    described = None
    if heads is not None:
        # Behind `make_drafters`, which reads heads from folders: these exist in memory alone.
        drafter, more = heads_drafter(heads, backbone, HeadsTree.DYNAMIC, False)
        drafters.append(drafter)
        notices += more
        manifest = heads.manifest
        described = HeadsDescription(manifest.name, manifest.version, manifest.family, manifest.num_heads)
    return LoadedParts(
        backbone=backbone,
        tokenizer=Tokenizer.from_folder(folder),
        drafters=(*drafters, NgramDrafter(device=backbone.device)),
        notices=tuple(notices),
        heads=described,
    )


def lift_heads(
    lift: Lift, folder: Path, heads: Path | None, *, device: torch.device, dtype: torch.dtype
) -> LoadedHeads | None:
    """The heads of the small model in `folder`, lifted; None where there are none.

    heads: a checkpoint of EAGLE heads; None = those that come with the program. Raises `HeadsError`.
    """
    checkpoint = bundled_heads(folder, lift.small) if heads is None else resolve_heads(heads)
    if checkpoint is None:
        return None
    loaded = read_heads(checkpoint)
    if not isinstance(loaded.heads, EagleHead):
        raise HeadsError(f"{checkpoint}: {loaded.manifest.family} heads are not lifted: give eagle heads")
    head = lift.eagle(loaded.heads.to(device, dtype)).eval().requires_grad_(False)
    layer = DecoderLayer(**{name: getattr(head.shape, name) for name in DecoderLayer.model_fields})
    sizes = {"hidden_size": head.hidden_size, "vocab_size": lift.target.vocab_size, "layer": layer}
    vocabulary = loaded.draft_vocabulary
    return LoadedHeads(
        heads=head,
        manifest=loaded.manifest.model_copy(update=sizes),
        # Tokens keep their ids, so that the drafting vocabulary is the small model's.
        draft_vocabulary=None if vocabulary is None else vocabulary.to(device),
        notices=loaded.notices,
    )
