"""A tiny backbone, heads of every kind for it, and foreign folders written by hand."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gorgon_engine.heads.checkpoint import save_heads
from gorgon_engine.heads.families import DraftHeads, dtype_of, family_fields
from gorgon_engine.heads.hydra import HydraHeads, HydraShape
from gorgon_engine.heads.medusa import MedusaHeads
from gorgon_protocol.manifest import HeadsManifest
from gorgon_trainer.interop.foreign import Backbone
from support.models import VOCAB, tiny_llama

HIDDEN = 48

WriteForeign = Callable[..., Path]


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone(tiny_llama(tmp_path_factory.mktemp("interop") / "tiny"), "Tiny")


@pytest.fixture(scope="session")
def other_backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """Of the same shapes, other weights."""
    return Backbone(tiny_llama(tmp_path_factory.mktemp("interop") / "other", seed=1), "Other")


def filled(heads: DraftHeads) -> DraftHeads:
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return heads


def medusa(*, num_heads: int = 3, num_blocks: int = 1, rows: int | None = None, dtype: str = "float32") -> MedusaHeads:
    """rows: of projections of their own, None = shared."""
    torch.manual_seed(0)
    lm_head = None if rows is None else torch.zeros(rows, HIDDEN)
    heads = MedusaHeads(HIDDEN, num_heads=num_heads, num_blocks=num_blocks, lm_head=lm_head)
    return filled(heads).to(getattr(torch, dtype))


def hydra(*, equal_blocks: bool = True, dtype: str = "float32", **shape: Any) -> HydraHeads:
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_heads": 3, "num_blocks": 3, "normalised": False}
    heads = filled(HydraHeads(HydraShape(hidden_size=HIDDEN, **(options | shape))))
    if equal_blocks:
        for head in heads.heads:
            for block in head.blocks[1:]:
                block.load_state_dict(head.blocks[0].state_dict())
    return heads.to(getattr(torch, dtype))


def save_checkpoint(
    folder: Path, heads: DraftHeads, backbone: Backbone, *, vocabulary: torch.Tensor | None = None, **fields: Any
) -> HeadsManifest:
    values: dict[str, Any] = {
        "name": "tiny",
        "version": "1",
        "backbone": backbone.reference,
        "vocab_size": VOCAB,
        "offsets": tuple(range(2, heads.num_heads + 2)),
        "draft_vocab_size": None if vocabulary is None else vocabulary.numel(),
        "dtype": str(dtype_of(heads)).removeprefix("torch."),
        "quantization": "none",
    }
    manifest = HeadsManifest(**(values | family_fields(heads) | fields))
    return save_heads(folder, heads, manifest, draft_vocabulary=vocabulary)


@pytest.fixture
def write_foreign(tmp_path: Path) -> WriteForeign:
    """A folder with a config and weights, as another project would write it."""

    def write(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], file: str) -> Path:
        folder = tmp_path / "foreign"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        if file.endswith(".safetensors"):
            save_file(dict(tensors), folder / file)
        else:
            torch.save(dict(tensors), folder / file)
        return folder

    return write


def medusa_tensors(*, num_heads: int = 5, num_layers: int = 1, own: bool = True) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    tensors = {}
    for i in range(num_heads):
        for j in range(num_layers):
            tensors[f"{i}.{j}.linear.weight"] = torch.randn(HIDDEN, HIDDEN) * 0.2
            tensors[f"{i}.{j}.linear.bias"] = torch.randn(HIDDEN)
        if own:
            tensors[f"{i}.{num_layers}.weight"] = torch.randn(VOCAB, HIDDEN)
    return tensors


def vllm_tensors(*, num_heads: int = 3, num_layers: int = 2, rows: int = VOCAB) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    tensors = {}
    for i in range(num_heads):
        for j in range(num_layers):
            tensors[f"blocks.{i}.layers.{j}.weight"] = torch.randn(HIDDEN, HIDDEN) * 0.2
            tensors[f"blocks.{i}.layers.{j}.bias"] = torch.randn(HIDDEN)
        tensors[f"lm_heads.{i}.weight"] = torch.randn(rows, HIDDEN)
    return tensors


def hydra_tensors(*, num_heads: int = 3, num_layers: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(4)
    tensors = {}
    for i in range(num_heads):
        for part in ("linear", "res_connection"):
            tensors[f"hydra_mlp.{i}.0.{part}.weight"] = torch.randn(HIDDEN, (i + 2) * HIDDEN) * 0.1
            tensors[f"hydra_mlp.{i}.0.{part}.bias"] = torch.randn(HIDDEN)
        repeated = torch.randn(HIDDEN, HIDDEN) * 0.2, torch.randn(HIDDEN)
        for j in range(1, num_layers):
            tensors[f"hydra_mlp.{i}.{j}.linear.weight"], tensors[f"hydra_mlp.{i}.{j}.linear.bias"] = repeated
        tensors[f"hydra_lm_head.{i}.weight"] = torch.randn(VOCAB, HIDDEN)
        tensors[f"hydra_lm_head.{i}.bias"] = torch.randn(VOCAB)
    return tensors


MEDUSA_CONFIG = {"medusa_num_heads": 5, "medusa_num_layers": 1, "base_model_name_or_path": "org/tiny"}
VLLM_CONFIG = {
    "model_type": "medusa",
    "hidden_size": HIDDEN,
    "vocab_size": VOCAB,
    "num_heads": 3,
    "num_hidden_layers": 2,
    "medusa_fc_bias": True,
}
HYDRA_CONFIG = {"hydra_num_heads": 3, "hydra_num_layers": 3, "hydra_head_arch": "mlp", "grounded_heads": True}
