"""A finished run as a checkpoint: what its manifest says is true, and the heads come back as they were."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.heads.checkpoint import load_heads, verify_heads
from gorgon_engine.tree.builders import Topology
from gorgon_protocol.errors import HeadsError
from gorgon_protocol.manifest import HeadsManifest
from gorgon_trainer.evaluation.predicted import predicted_acceptance_length
from gorgon_trainer.package import CheckpointName, checkpoint_manifest, write_checkpoint
from gorgon_trainer.shards import ShardSet
from gorgon_trainer.train_config import TrainConfig
from gorgon_trainer.training import TrainResult
from support.training import CONFIG, REFERENCE, run_training

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = CheckpointName("tiny-heads", "3")
KINDS: dict[str, dict[str, Any]] = {
    "hydra": {"draft_vocab_size": 40, "num_heads": 3},
    "hydra, own projection": {"own_projection": True},
    "medusa": {"family": "medusa", "num_heads": 3},
    "eagle": {"family": "eagle", "num_heads": 3, "num_blocks": 1, "unroll": 2, "draft_vocab_size": 40},
    "medusa, own projection": {"family": "medusa", "own_projection": True, "draft_vocab_size": 40},
}


@pytest.fixture(params=list(KINDS.values()), ids=list(KINDS))
def config(request: pytest.FixtureRequest) -> TrainConfig:
    return replace(CONFIG, **request.param)


@pytest.fixture
def result(cycles: ShardSet, small_backbone: Backbone, config: TrainConfig, tmp_path: Path) -> TrainResult:
    return run_training(cycles, tmp_path / "run", small_backbone, config)


def test_the_manifest_of_a_run(cycles: ShardSet, config: TrainConfig, result: TrainResult) -> None:
    manifest = checkpoint_manifest(result, cycles, config, NAME, data="cycles")
    assert (manifest.name, manifest.version, NAME.folder) == ("tiny-heads", "3", "tiny-heads@3")
    assert manifest.backbone == REFERENCE
    assert manifest.family == config.family
    assert (manifest.num_heads, manifest.num_blocks) == (config.num_heads, config.num_blocks)
    assert (
        manifest.offsets
        == config.offsets
        == tuple(
            range(1 if config.family == "medusa" else 2, config.num_heads + (1 if config.family == "medusa" else 2))
        )
    )
    assert manifest.projection == ("own" if config.own_projection else "shared")
    assert manifest.draft_vocab_size == config.draft_vocab_size
    assert manifest.normalised is (config.family == "hydra")
    assert (manifest.layer is not None) is (config.family == "eagle")
    assert (manifest.vocab_size, manifest.hidden_size) == (cycles.index.vocab_size, result.heads.hidden_size)
    assert (manifest.quantization, manifest.dtype) == ("none", "bfloat16")

    assert manifest.accuracies is not None
    for row, measured in zip(manifest.accuracies, result.held_out.accuracies, strict=True):
        assert row == pytest.approx(measured, abs=1e-5)
    assert manifest.recommended_tree
    assert len(manifest.recommended_tree) <= 63
    assert Topology.of(manifest.recommended_tree, torch.device("cpu")).max_depth <= len(manifest.tree_heads)

    assert manifest.training is not None
    assert manifest.training.data == "cycles"
    assert manifest.training.created is not None
    figures, settings = manifest.training.figures, manifest.training.settings
    assert figures["train_sequences"] == 48
    assert figures["train_tokens"] == 48 * 16
    assert figures["train_answer_tokens"] == 48 * 14
    assert figures["train_steps"] == 12
    assert figures["train_positions"] == result.num_positions
    assert figures["held_out_positions"] == result.held_out.num_positions
    assert figures["train_seconds"] >= 0
    rows = [manifest.accuracies[head] for head in manifest.tree_heads]
    expected = predicted_acceptance_length(rows, 32)
    assert figures["held_out_acceptance_length_32"] == pytest.approx(expected, abs=1e-3)
    assert "peak_gpu_memory_gib" not in figures, "it ran on a CPU"
    assert settings["learning_rate"] == config.learning_rate
    assert settings["loss"] == "cross-entropy"
    assert settings["dropout"] == 0.0
    assert ("unroll" in settings) is ("feature_loss_weight" in settings) is (config.family == "eagle")
    assert ("draft_vocab_size" in settings) is (config.draft_vocab_size is not None)
    assert json.loads(manifest.to_json())["training"]["settings"] == settings
    assert HeadsManifest.from_json(manifest.to_json(), source="here") == manifest


def test_the_checkpoint_is_what_the_engine_loads(
    cycles: ShardSet, small_backbone: Backbone, config: TrainConfig, result: TrainResult, tmp_path: Path
) -> None:
    manifest = checkpoint_manifest(result, cycles, config, NAME, data="cycles")
    written = write_checkpoint(
        result, manifest, tmp_path, max_file_bytes=20_000, extra_files={"report.md": b"# Tiny heads\n"}
    )
    folder = tmp_path / "tiny-heads@3"
    assert verify_heads(folder) == written
    assert "report.md" in written.files
    assert len([name for name in written.files if name.startswith("heads-")]) > 1, "the weights are split"
    loaded = load_heads(
        folder,
        backbone_identity=REFERENCE.identity,
        config=small_backbone.config,
        quantization="none",
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    assert loaded.notices == ()
    trained = dict(result.heads.named_parameters())
    assert dict(loaded.heads.named_parameters()).keys() == trained.keys()
    for name, tensor in loaded.heads.named_parameters():
        assert torch.equal(tensor, trained[name].bfloat16().float()), name
    if config.draft_vocab_size is None:
        assert loaded.draft_vocabulary is None
    else:
        assert loaded.draft_vocabulary is not None
        assert result.draft_vocabulary is not None
        assert torch.equal(loaded.draft_vocabulary, result.draft_vocabulary)

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(HeadsError, match="exists already"):
        write_checkpoint(result, manifest, tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "tiny-heads@3"]


def test_heads_that_are_never_right_recommend_no_tree(
    cycles: ShardSet, small_backbone: Backbone, tmp_path: Path
) -> None:
    result = run_training(cycles, tmp_path, small_backbone, replace(CONFIG, max_steps=1))
    zeros = tuple((0.0,) * 10 for _ in CONFIG.offsets)
    never = replace(result, held_out=replace(result.held_out, accuracies=zeros))
    manifest = checkpoint_manifest(never, cycles, CONFIG, NAME, data="cycles")
    assert manifest.recommended_tree is None
    assert manifest.training is not None
    assert manifest.training.figures["held_out_acceptance_length_32"] == 1.0


def test_gpu_memory_is_a_figure_where_there_is_one(cycles: ShardSet, small_backbone: Backbone, tmp_path: Path) -> None:
    result = run_training(cycles, tmp_path, small_backbone, replace(CONFIG, max_steps=1))
    manifest = checkpoint_manifest(replace(result, peak_memory_bytes=3 * 2**29), cycles, CONFIG, NAME, data="cycles")
    assert manifest.training is not None
    assert manifest.training.figures["peak_gpu_memory_gib"] == 1.5
