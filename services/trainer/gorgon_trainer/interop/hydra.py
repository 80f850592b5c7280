"""The layout of the Hydra authors (zankner/Hydra, 2402.05109), architecture `mlp` with grounded heads.

    config.json        hydra_num_heads, hydra_num_layers, hydra_head_arch, grounded_heads, base_model_name_or_path
    hydra_lm_head.pt   hydra_mlp.{i}.{j}.linear.{weight,bias}, hydra_mlp.{i}.0.res_connection.{weight,bias},
                       hydra_lm_head.{i}.{weight,bias}, and often the backbone's embedding as input_embed_fn.weight

The blocks behind the first of a head are one module, repeated: their tensors stand in the file once for each, equal.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gorgon_engine.heads.hydra import HydraHead, HydraHeads, HydraShape
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

WEIGHT_FILES = ("hydra_lm_head.pt", "hydra_lm_head.safetensors")

_LINEAR = r"hydra_mlp\.(\d+)\.(\d+)\.linear\.(weight|bias)"
_EMBEDDING = "input_embed_fn.weight"
_SAME_EMBEDDING = 0.05  # of its norm: what rounding to another precision may change


def is_hydra(names: tuple[str, ...]) -> bool:
    return any(name.startswith("hydra_mlp.") for name in names)


def import_hydra(config: dict[str, Any], tensors: ForeignTensors, backbone: Backbone) -> ImportedHeads:
    """Raises `HeadsError` for other architectures, and for tensors missing, left over, unequal or of other shapes."""
    source, size, vocab_size = tensors.source, backbone.config.hidden_size, backbone.config.vocab_size
    _check_config(config, source)
    linears = tensors.matching(_LINEAR)
    num_heads = count(source, "heads", (match[1] for match in linears))
    num_blocks = count(source, "layers", (match[2] for match in linears))
    _check_embedding(tensors, backbone)
    content: dict[str, Tensor] = {}
    for i in range(num_heads):
        content |= _take_head(tensors, i, num_blocks, size)
    projections = [tensors.take(f"hydra_lm_head.{i}.weight", vocab_size, size) for i in range(num_heads)]
    biases = [tensors.take(f"hydra_lm_head.{i}.bias", vocab_size) for i in range(num_heads)]
    tensors.finish()
    dtype = common_dtype([*content.values(), *projections, *biases])
    content = {name: tensor.to(dtype) for name, tensor in content.items()}
    projections = [projection.to(dtype) for projection in projections]
    has_bias = any(bool(bias.any()) for bias in biases)
    projection = torch.stack(projections) if has_bias else fold_projections(projections, backbone.lm_head())
    if projection is not None:
        content["projection"] = projection
    if has_bias:
        content["projection_bias"] = torch.stack(biases).to(dtype)
    shape = HydraShape(
        hidden_size=size,
        num_heads=num_heads,
        num_blocks=num_blocks,
        normalised=False,
        matrix_residual=not _drop_identity_residuals(content, num_heads),
        own_projection=None if projection is None else vocab_size,
        projection_bias=has_bias,
    )
    heads = HydraHeads(shape, device="meta")
    heads.load_state_dict(content, assign=True)
    return ImportedHeads(heads, None, _notices(config, num_heads, num_blocks))


def _take_head(tensors: ForeignTensors, head: int, num_blocks: int, size: int) -> dict[str, Tensor]:
    """One head's tensors by the names that they have here."""
    taken: dict[str, Tensor] = {}

    def take(ours: str, theirs: str, inputs: int) -> None:
        # Copies: what is repeated in a pickle is one memory, and each block here has its own.
        taken[f"heads.{head}.{ours}.weight"] = tensors.take(f"hydra_mlp.{head}.{theirs}.weight", size, inputs).clone()
        taken[f"heads.{head}.{ours}.bias"] = tensors.take(f"hydra_mlp.{head}.{theirs}.bias", size).clone()

    take("input", "0.linear", (head + 2) * size)
    take("residual", "0.res_connection", (head + 2) * size)
    for j in range(1, num_blocks):
        take(f"blocks.{j - 1}", f"{j}.linear", size)
        for part in ("weight", "bias"):
            if not torch.equal(taken[f"heads.{head}.blocks.{j - 1}.{part}"], taken[f"heads.{head}.blocks.0.{part}"]):
                raise HeadsError(
                    f"{tensors.source}: layers 1 and {j} of head {head} differ, and Hydra repeats one: not a file of "
                    "Hydra's"
                )
    return taken


def check_exportable(heads: HydraHeads) -> None:
    """Raises `HeadsError`, the reason alone, for heads that Hydra cannot compute."""
    if heads.shape.normalised:
        raise HeadsError(
            "its heads normalise their inputs and features, which the Hydra layout cannot say: only hydra heads that "
            "were trained without can be exported"
        )
    for i, blocks in enumerate(map(_later_blocks, heads.heads)):
        for block in blocks[1:]:
            if not all(torch.equal(mine, first) for mine, first in zip(block, blocks[0], strict=True)):
                raise HeadsError(
                    f"the blocks of head {i} differ, and Hydra repeats one: heads of at most two blocks can be exported"
                )


def export_hydra(heads: HydraHeads, manifest: HeadsManifest, *, projections: list[Tensor]) -> ExportedHeads:
    """heads: such that `check_exportable` passes. projections: [V, C] of each head, own or the backbone's."""
    shape = heads.shape
    tensors: dict[str, Tensor] = {}

    def put(name: str, parts: tuple[Tensor, Tensor]) -> None:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = parts

    for i, head in enumerate(heads.heads):
        assert isinstance(head, HydraHead)
        weight, bias = _parts(head.input)
        put(f"hydra_mlp.{i}.0.linear", (weight, bias))
        residual = _identity_residual(weight) if head.residual is None else _parts(head.residual)
        put(f"hydra_mlp.{i}.0.res_connection", residual)
        blocks = _later_blocks(head)
        for j in range(1, shape.num_blocks):
            put(f"hydra_mlp.{i}.{j}.linear", blocks[0])  # one tensor each time: a pickle keeps one copy of it
        projection = projections[i].detach().clone()
        no_bias = weight.new_zeros(projection.shape[0])
        own_bias = None if heads.projection_bias is None else heads.projection_bias[i].detach().clone()
        put(f"hydra_lm_head.{i}", (projection, no_bias if own_bias is None else own_bias))
    config = {
        "hydra_num_heads": shape.num_heads,
        "hydra_num_layers": shape.num_blocks,
        "hydra_head_arch": "mlp",
        "grounded_heads": True,
        "hidden_state_offset": 0,
        "base_model_name_or_path": manifest.backbone.name,
    }
    return ExportedHeads(config, WEIGHT_FILES[0], tensors)


def weight_files(folder: Path) -> list[Path]:
    """The weights of a folder in this layout: one file."""
    return [folder / name for name in WEIGHT_FILES if (folder / name).is_file()][:1]


def _check_config(config: dict[str, Any], source: Path) -> None:
    architecture = config.get("hydra_head_arch", "mlp")
    if architecture != "mlp":
        raise HeadsError(f"{source}: Hydra architecture {str(architecture)[:80]!r} is not supported, only mlp")
    if config.get("grounded_heads", True) is not True:
        raise HeadsError(f"{source}: its heads are not grounded: only heads that see the drafted tokens are supported")
    if config.get("hidden_state_offset", 0) != 0:
        raise HeadsError(
            f"{source}: its heads read an inner layer (hidden_state_offset {config['hidden_state_offset']!r}), only "
            "the last hidden state is supported"
        )


def _check_embedding(tensors: ForeignTensors, backbone: Backbone) -> None:
    """The embedding that training saved along shows whether this is the backbone."""
    if _EMBEDDING not in tensors:
        return
    saved = tensors.take(_EMBEDDING, backbone.config.vocab_size, backbone.config.hidden_size).float()
    own = backbone.embedding().float()
    if float((saved - own).norm()) > _SAME_EMBEDDING * float(own.norm()):
        raise HeadsError(
            f"{tensors.source}: its {_EMBEDDING} is not the embedding of {backbone.name}: another backbone"
        )


def _drop_identity_residuals(content: dict[str, Tensor], num_heads: int) -> bool:
    """Take out the residual matrices where each only passes the hidden state on; whether they did."""
    for i in range(num_heads):
        weight, bias = content[f"heads.{i}.residual.weight"], content[f"heads.{i}.residual.bias"]
        identity, zero = _identity_residual(weight)
        if not (torch.equal(weight, identity) and torch.equal(bias, zero)):
            return False
    for i in range(num_heads):
        del content[f"heads.{i}.residual.weight"], content[f"heads.{i}.residual.bias"]
    return True


def _identity_residual(like: Tensor) -> tuple[Tensor, Tensor]:
    """(weight, bias) that give the hidden state, the first C of the inputs. like: [C, inputs]."""
    size = like.shape[0]
    weight = torch.zeros_like(like)
    weight[:, :size].fill_diagonal_(1.0)
    return weight, like.new_zeros(size)


def _later_blocks(head: nn.Module) -> list[tuple[Tensor, Tensor]]:
    assert isinstance(head, HydraHead)
    return [_parts(block) for block in head.blocks]


def _parts(linear: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(linear, nn.Linear)
    return linear.weight.detach().clone(), linear.bias.detach().clone()


def _notices(config: dict[str, Any], num_heads: int, num_blocks: int) -> tuple[str, ...]:
    counted = (("heads", "hydra_num_heads", num_heads), ("layers", "hydra_num_layers", num_blocks))
    return tuple(
        f"its config counts {said} {what}, the tensors are of {found}: the tensors decide"
        for what, name, found in counted
        if (said := whole_number(config, name)) not in (None, found)
    )
