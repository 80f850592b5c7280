"""Heads that come with the program: found for the backbone that they were trained on, and for no other."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gorgon_engine.heads.bundled import BUNDLED_STORE, bundled_heads
from gorgon_engine.heads.checkpoint import save_heads, verify_heads
from gorgon_engine.heads.families import family_fields
from gorgon_engine.heads.hydra import HydraHeads, HydraShape
from gorgon_engine.models.config import BackboneConfig
from gorgon_engine.models.identity import backbone_identity
from gorgon_protocol.errors import HeadsError
from gorgon_protocol.manifest import BackboneReference, HeadsManifest
from support.models import tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


def config_of(folder: Path) -> BackboneConfig:
    return BackboneConfig.from_folder(folder)


def publish(store: Path, name: str, *, folder: Path, version: str = "1", latest: bool = True) -> Path:
    config = config_of(folder)
    torch.manual_seed(0)
    heads = HydraHeads(HydraShape(hidden_size=config.hidden_size, num_heads=2, num_blocks=1))
    fields: dict[str, Any] = {
        "name": name,
        "version": version,
        "backbone": BackboneReference(identity=backbone_identity(folder), name=name),
        "vocab_size": config.vocab_size,
        "offsets": (2, 3),
        "dtype": "float32",
        "quantization": "none",
    }
    checkpoint = store / name / f"{name}@{version}"
    save_heads(checkpoint, heads, HeadsManifest(**(fields | family_fields(heads))))
    if latest:
        (store / name / "latest").write_text(f"{checkpoint.name}\n")
    return checkpoint


def test_heads_are_found_among_those_of_other_backbones(tmp_path: Path, folder: Path) -> None:
    """Others of the same shape, of another shape, before and behind in the alphabet."""
    wide = tiny_llama(tmp_path / "wide", hidden_size=64)
    long = tiny_llama(tmp_path / "long", vocab_size=90)
    other = tiny_llama(tmp_path / "other", seed=1)
    store = tmp_path / "store"
    expected = {}
    for name, backbone in (("b-wide", wide), ("a-other", other), ("m-ours", folder), ("z-long", long)):
        expected[backbone] = publish(store, name, folder=backbone)
    for backbone, checkpoint in expected.items():
        assert bundled_heads(backbone, config_of(backbone), store=store) == checkpoint
    stranger = tiny_llama(tmp_path / "stranger", seed=2)
    assert bundled_heads(stranger, config_of(stranger), store=store) is None


def test_shapes_that_differ_are_enough(tmp_path: Path, folder: Path) -> None:
    """The weights of a backbone that no heads could fit are not read: here there are none."""
    publish(tmp_path, "tiny", folder=folder)
    for values in ({"hidden_size": 64}, {"vocab_size": 90}):
        other = tiny_llama(tmp_path / str(values), **values)
        config = config_of(other)
        shutil.rmtree(other)
        assert bundled_heads(other, config, store=tmp_path) is None


def test_the_latest_version_is_taken(tmp_path: Path, folder: Path) -> None:
    publish(tmp_path, "tiny", folder=folder, version="1")
    newer = publish(tmp_path, "tiny", folder=folder, version="2")
    publish(tmp_path, "tiny", folder=folder, version="3", latest=False)
    assert bundled_heads(folder, config_of(folder), store=tmp_path) == newer


def test_stores_without_heads(tmp_path: Path, folder: Path) -> None:
    publish(tmp_path / "unfinished", "tiny", folder=folder, latest=False)
    (tmp_path / "empty" / "tiny").mkdir(parents=True)
    for name in ("unfinished", "empty", "missing"):
        assert bundled_heads(folder, config_of(folder), store=tmp_path / name) is None


@pytest.mark.parametrize(
    ("latest", "message"),
    [
        ("tiny@9\n", "names tiny@9, which has no manifest.json"),
        ("", "is not the name of a version"),
        ("../tiny@1", "is not the name of a version"),
    ],
)
def test_a_damaged_latest_is_an_error(tmp_path: Path, folder: Path, latest: str, message: str) -> None:
    publish(tmp_path, "tiny", folder=folder)
    (tmp_path / "tiny" / "latest").write_text(latest)
    with pytest.raises(HeadsError, match=message) as caught:
        bundled_heads(folder, config_of(folder), store=tmp_path)
    assert "tiny/latest" in str(caught.value)


def test_a_damaged_manifest_is_an_error(tmp_path: Path, folder: Path) -> None:
    checkpoint = publish(tmp_path, "tiny", folder=folder)
    (checkpoint / "manifest.json").write_text("{")
    with pytest.raises(HeadsError, match=r"manifest\.json: not valid JSON"):
        bundled_heads(folder, config_of(folder), store=tmp_path)


def test_the_store_is_inside_the_package(folder: Path) -> None:
    """Where a built wheel carries it; the tiny backbone of the tests is in none."""
    assert BUNDLED_STORE.parent.name == "gorgon_engine"
    assert bundled_heads(folder, config_of(folder)) is None


def test_the_small_model_comes_with_heads(smollm2: Path) -> None:
    """Whole, for that very model, and small enough for a source repository."""
    checkpoint = bundled_heads(smollm2, config_of(smollm2))
    assert checkpoint is not None
    manifest = verify_heads(checkpoint)
    assert manifest.tree_heads
    assert manifest.training is not None
    assert (checkpoint / "README.md").read_text().count("## ") >= 5, "a model card lies beside the weights"
    weights = [record.size for name, record in manifest.files.items() if name.endswith(".safetensors")]
    assert max(weights) <= 15_000_000
    assert sum(weights) < 32_000_000
