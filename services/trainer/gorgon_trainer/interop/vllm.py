"""vLLM's layout of Medusa heads (its `MedusaConfig` and `Medusa` model).

    config.json          model_type medusa, hidden_size, vocab_size, num_heads, num_hidden_layers, ...
    model.safetensors    blocks.{i}.layers.{j}.{weight,bias}, lm_heads.{i}.weight, token_map

- Biases are read only where the config's `medusa_fc_bias` is true, and dropped without a word elsewhere.
- `original_lm_head`: one projection for all heads, the backbone's, taken from `lm_heads.0.weight`.
- `token_map` lists the tokens that can be drafted, in any order, where `truncated_vocab_size` is below `vocab_size`.
  Projections then have its rows, or those of the whole vocabulary, of which vLLM picks.
- Config keys that hold "num" with "heads" or "layers" are aliases, and names may begin with `medusa_heads.`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
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

WEIGHTS_FILE = "model.safetensors"
TOKEN_MAP = "token_map"

_PREFIX = "medusa_heads."
_LAYER = r"blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)"
_LM_HEAD = r"lm_heads\.(\d+)\.weight"


def is_vllm(names: tuple[str, ...]) -> bool:
    return "blocks.0.layers.0.weight" in map(_plain_name, names)


def with_plain_names(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The tensors without the prefix that their names may have. Raises `HeadsError` where two become one."""
    plain = {_plain_name(name): tensor for name, tensor in tensors.items()}
    if len(plain) != len(tensors):
        raise HeadsError(f"{source}: holds tensors twice, with and without {_PREFIX}")
    return plain


@dataclass(frozen=True, slots=True)
class _Projections:
    stacked: Tensor | None  # [K, V', C], None where they are the backbone's
    draft_vocabulary: Tensor | None  # [V'] ascending
    notices: tuple[str, ...]


def import_vllm(config: dict[str, Any], tensors: ForeignTensors, backbone: Backbone) -> ImportedHeads:
    """Raises `HeadsError` where tensors are missing, left over, of other shapes or at odds with the config."""
    source, size = tensors.source, backbone.config.hidden_size
    _check_config(config, source, backbone)
    linears = tensors.matching(_LAYER)
    num_heads = count(source, "blocks", (match[1] for match in linears))
    num_blocks = count(source, "layers", (match[2] for match in linears))
    pairs = [(i, j) for i in range(num_heads) for j in range(num_blocks)]
    weight = [tensors.take(f"blocks.{i}.layers.{j}.weight", size, size) for i, j in pairs]
    has_bias = any(match[3] == "bias" for match in linears)
    bias = [
        tensors.take(f"blocks.{i}.layers.{j}.bias", size) if has_bias else weight[0].new_zeros(size) for i, j in pairs
    ]
    projections = _take_projections(config, tensors, backbone, num_heads)
    tensors.finish()
    dtype = common_dtype([*weight, *bias, *([] if projections.stacked is None else [projections.stacked])])
    content = {
        "weight": torch.stack(weight).to(dtype).view(num_heads, num_blocks, size, size),
        "bias": torch.stack(bias).to(dtype).view(num_heads, num_blocks, size),
    }
    if projections.stacked is not None:
        content["projection"] = projections.stacked.to(dtype)
    notices = list(projections.notices)
    if config.get("medusa_fc_bias") is not True and bool(content["bias"].any()):
        notices.append("its config has no medusa_fc_bias, so that vLLM drops the biases: they are used here")
    for what, found in (("heads", num_heads), ("layers", num_blocks)):
        said = _counted(config, what)
        if said not in (None, found):
            notices.append(f"its config counts {said} {what}, the tensors are of {found}: the tensors decide")
    return ImportedHeads(MedusaHeads.from_tensors(content), projections.draft_vocabulary, tuple(notices))


def export_vllm(
    heads: MedusaHeads,
    manifest: HeadsManifest,
    *,
    lm_head: Tensor | None,
    draft_vocabulary: Tensor | None,
) -> ExportedHeads:
    """heads: those of offsets 2, 3, .... lm_head: [V', C], the backbone's rows, for heads that share them."""
    tensors: dict[str, Tensor] = {}
    has_bias = bool(heads.bias.any())
    for i in range(heads.num_heads):
        for j in range(heads.num_blocks):
            tensors[f"blocks.{i}.layers.{j}.weight"] = heads.weight[i, j].detach().clone()
            if has_bias:
                tensors[f"blocks.{i}.layers.{j}.bias"] = heads.bias[i, j].detach().clone()
        if heads.projection is not None:
            tensors[f"lm_heads.{i}.weight"] = heads.projection[i].detach().clone()
    if heads.projection is None:
        assert lm_head is not None, "shared projections are written with the backbone's rows"
        tensors["lm_heads.0.weight"] = lm_head
    if draft_vocabulary is not None:
        tensors[TOKEN_MAP] = draft_vocabulary.cpu().long()
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": heads.hidden_size,
        "vocab_size": manifest.vocab_size,
        "truncated_vocab_size": manifest.num_draft_tokens,
        "num_heads": heads.num_heads,
        "num_hidden_layers": heads.num_blocks,
        "medusa_fc_bias": has_bias,
        "original_lm_head": heads.projection is None,
        "torch_dtype": manifest.dtype,
    }
    return ExportedHeads(config, WEIGHTS_FILE, tensors)


def weight_files(folder: Path) -> list[Path]:
    """The weights of a folder in this layout: all its safetensors, as vLLM reads them."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _plain_name(name: str) -> str:
    return name.replace(_PREFIX, "")


def _check_config(config: dict[str, Any], source: Path, backbone: Backbone) -> None:
    for name, here in (("hidden_size", backbone.config.hidden_size), ("vocab_size", backbone.config.vocab_size)):
        if config.get(name, here) != here:
            raise HeadsError(f"{source}: {name} in its config is {config[name]!r}, of {backbone.name} {here}")
    if config.get("logit_scale", 1.0) != 1.0:
        raise HeadsError(f"{source}: logit_scale {config['logit_scale']!r} is not supported, only 1.0")


def _counted(config: dict[str, Any], what: str) -> int | None:
    names = [name for name in config if "num" in name and what in name and "attention" not in name]
    return whole_number(config, names[0]) if names else None


def _take_projections(
    config: dict[str, Any], tensors: ForeignTensors, backbone: Backbone, num_heads: int
) -> _Projections:
    """Own or shared projections, and the tokens of their rows, in ascending order of those."""
    notices: list[str] = []
    tokens = _take_token_map(config, tensors, backbone, notices)
    given = _take_lm_heads(config, tensors, backbone, num_heads)
    vocab_size = backbone.config.vocab_size
    rows = vocab_size if tokens is None else tokens.numel()
    own: list[Tensor] = []
    for projection in given:
        if projection.shape[0] == vocab_size and tokens is not None:
            projection = projection[tokens]
        if projection.shape[0] != rows:
            raise HeadsError(
                f"{tensors.source}: a projection has {projection.shape[0]} rows, the tokens to draft are {rows}"
            )
        own.append(projection)
    order = None if tokens is None else tokens.argsort()
    vocabulary = None if tokens is None or order is None else tokens[order]
    if not own:
        return _Projections(None, vocabulary, tuple(notices))
    own = own if order is None else [projection[order] for projection in own]
    lm_head = backbone.lm_head()
    stacked = fold_projections(own, lm_head if vocabulary is None else lm_head[vocabulary])
    if stacked is not None and len(own) < num_heads:
        notices.append("its original_lm_head is not this backbone's lm_head: every head gets a copy of its own")
        stacked = own[0].expand(num_heads, -1, -1).contiguous()
    return _Projections(stacked, vocabulary, tuple(notices))


def _take_lm_heads(config: dict[str, Any], tensors: ForeignTensors, backbone: Backbone, num_heads: int) -> list[Tensor]:
    """One projection a head; with `original_lm_head` one for all, or none, which is the backbone's."""
    size = backbone.config.hidden_size
    if config.get("original_lm_head") is not True:
        return [tensors.take_rows(f"lm_heads.{i}.weight", size) for i in range(num_heads)]
    names = sorted(match[0] for match in tensors.matching(_LM_HEAD))
    names += ["lm_head.weight"] if "lm_head.weight" in tensors else []
    found = [tensors.take_rows(name, size) for name in names]
    if not all(torch.equal(found[0], other) for other in found):
        raise HeadsError(f"{tensors.source}: its config says original_lm_head, but the heads' projections differ")
    return found[:1]


def _take_token_map(
    config: dict[str, Any], tensors: ForeignTensors, backbone: Backbone, notices: list[str]
) -> Tensor | None:
    """[V'] token of each row, in the file's order; None where all tokens can be drafted."""
    source, vocab_size = tensors.source, backbone.config.vocab_size
    truncated = config.get("truncated_vocab_size") or vocab_size
    if TOKEN_MAP not in tensors:
        if truncated != vocab_size:
            raise HeadsError(f"{source}: truncated_vocab_size is {truncated} and {TOKEN_MAP} is missing")
        return None
    tokens = tensors.take_token_ids(TOKEN_MAP)
    if truncated == vocab_size:
        notices.append(f"its {TOKEN_MAP} is not used, as truncated_vocab_size is the whole vocabulary")
        return None
    if tokens.numel() != truncated:
        raise HeadsError(f"{source}: {TOKEN_MAP} has {tokens.numel()} tokens, truncated_vocab_size is {truncated}")
    if tokens.unique().numel() != tokens.numel() or int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
        raise HeadsError(f"{source}: {TOKEN_MAP} must be different token ids below {vocab_size}")
    return tokens
