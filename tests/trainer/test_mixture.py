"""Training over several shard folders: mixed by shares, resumed to the bit, and refused where they do not fit."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator

from gorgon_engine.backbone.base import Backbone
from gorgon_protocol.errors import DataError, TrainingError
from gorgon_protocol.manifest import BackboneReference
from gorgon_trainer.dataset import JoinedPacks, PackedDataset
from gorgon_trainer.feature_cache import Features
from gorgon_trainer.heldout import HeldOut
from gorgon_trainer.mixture import ShardMixture
from gorgon_trainer.package import CheckpointName, checkpoint_manifest
from gorgon_trainer.run_log import read_history
from gorgon_trainer.shards import ShardIndex, ShardSet, ShardWriter, TokenSequence
from gorgon_trainer.train_config import TrainConfig
from gorgon_trainer.training import STATE_FILE, TrainResult, train
from gorgon_trainer.vocabulary import draft_vocabulary
from support.training import (
    CONFIG,
    REFERENCE,
    VOCAB,
    MortalBackbone,
    assert_same_weights,
    cycle_sequence,
    make_shards,
    run_training,
    state_of,
    weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")

MIXED = replace(CONFIG, shares=(3.0, 1.0))
BACKWARDS = (3, 33, 7, 44, 2, 61, 19)  # a cycle that the other folder never shows


def small_sequence(start: int, length: int = 16) -> TokenSequence:
    tokens = [BACKWARDS[(start + step) % len(BACKWARDS)] for step in range(length)]
    return TokenSequence.from_lists(tokens, [step >= 2 for step in range(length)])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """4 packs of training beside the 24 of the cycles."""
    return make_shards(
        tmp_path_factory.mktemp("small") / "shards",
        [small_sequence(start) for start in range(8)],
        [small_sequence(start) for start in range(3)],
        data_sha256="12" * 32,
    )


def train_mixed(
    folders: Sequence[ShardSet], out: Path, backbone: Backbone, config: TrainConfig = MIXED, **changes: Any
) -> TrainResult:
    return train(
        ShardMixture(folders),
        out,
        backbone=backbone,
        config=replace(config, **changes),
        accelerator=Accelerator(cpu=True),
        progress=False,
    )


def test_heads_learn_from_every_folder(
    cycles: ShardSet, small: ShardSet, small_backbone: Backbone, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"max_steps": 60, "eval_every": 60, "save_every": 60}
    result = train_mixed([cycles, small], tmp_path / "both", small_backbone, **changes)
    record = read_history(tmp_path / "both")[-1]
    assert min(record["held_out_of_each"]) > 2.5
    assert record["held_out"]["acceptance_length"] > 2.5
    assert result.held_out.num_positions == (6 + 3) * 14
    alone = run_training(cycles, tmp_path / "alone", small_backbone, **changes)
    assert "held_out_of_each" not in read_history(tmp_path / "alone")[-1]
    assert alone.held_out.num_positions == 6 * 14
    only_one = train_mixed([cycles], tmp_path / "one", small_backbone, **changes, shares=(5.0,))
    assert_same_weights(weights(only_one), weights(alone))


def test_a_small_folder_is_gone_through_more_often(
    cycles: ShardSet, small: ShardSet, small_backbone: Backbone, tmp_path: Path
) -> None:
    """By size the small one is a seventh of the packs, by shares a half."""
    train_mixed([cycles, small], tmp_path / "shares", small_backbone, shares=(1.0, 1.0))
    assert state_of(tmp_path / "shares")["sampler"] == {
        "num_batches": 12,
        "num_items": [24, 4],
        "shares": [0.5, 0.5],
        "batch_size": 2,
        "world_size": 1,
        "seed": 0,
    }
    train_mixed([cycles, small], tmp_path / "size", small_backbone, shares=None, num_epochs=2.0, max_steps=None)
    state = state_of(tmp_path / "size")
    assert state["sampler"]["shares"] == [24 / 28, 4 / 28]
    assert state["progress"]["step"] == 28, "two epochs of the first folder, the second one's packs between"


class Interruption(Exception):
    pass


class FailingBackbone(MortalBackbone):
    """One that raises instead of ending its process."""

    def forward(self, *args: Any, **options: Any) -> Any:
        if self._when():
            raise Interruption
        return self._backbone.forward(*args, **options)


@pytest.mark.parametrize("features", list(Features))
def test_a_mixed_run_goes_on_to_the_same_bits(
    cycles: ShardSet, small: ShardSet, small_backbone: Backbone, tmp_path: Path, features: Features
) -> None:
    whole = train_mixed([cycles, small], tmp_path / "whole", small_backbone)
    folder = tmp_path / "run"
    calls = iter(range(10**6))
    # Behind the passes for held-out text, and for features that are kept.
    limit = 2 + {Features.COMPUTED: 7, Features.MEMORY: 5, Features.DISK: 20}[features]
    failing = FailingBackbone(small_backbone, lambda: next(calls) == limit)
    with pytest.raises(Interruption):
        train_mixed([cycles, small], folder, cast(Backbone, failing), features=features, save_every=2)
    assert (features is Features.DISK) or state_of(folder)["progress"]["step"] >= 2
    torch.manual_seed(123)
    result = train_mixed([cycles, small], folder, small_backbone, features=features, save_every=2)
    assert_same_weights(weights(result), weights(whole))
    assert result.held_out == whole.held_out


@pytest.mark.parametrize(
    ("changes", "number", "expected"),
    [
        ({"shares": (1.0, 1.0)}, 2, "begun with shares 3.0,1.0 and cannot go on with 1.0,1.0"),
        ({"shares": None}, 2, "begun with shares 3.0,1.0 and cannot go on with None"),
        ({"shares": None}, 1, "the run was begun on other data: give another folder"),
    ],
)
def test_a_mixed_run_does_not_go_on_as_another(
    cycles: ShardSet,
    small: ShardSet,
    small_backbone: Backbone,
    tmp_path: Path,
    changes: dict[str, Any],
    number: int,
    expected: str,
) -> None:
    train_mixed([cycles, small], tmp_path, small_backbone, max_steps=4)
    with pytest.raises(TrainingError, match=expected):
        train_mixed([cycles, small][:number], tmp_path, small_backbone, max_steps=4, **changes)


def test_a_run_from_before_there_were_mixtures_goes_on(
    cycles: ShardSet, small_backbone: Backbone, finished: Path, tmp_path: Path
) -> None:
    """Its state knew of no shares."""
    state = torch.load(finished / STATE_FILE, weights_only=True)
    settings = json.loads(state["fingerprint"])
    del settings["config"]["shares"]
    assert isinstance(settings["shards"], str)
    torch.save(state | {"fingerprint": json.dumps(settings)}, tmp_path / STATE_FILE)
    result = run_training(cycles, tmp_path, small_backbone)
    assert_same_weights(weights(result), weights(run_training(cycles, finished, small_backbone)))


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ((1.0,), "1 shares for 2 shard folders: give one number for each --shards"),
        ((1.0, 2.0, 3.0), "3 shares for 2 shard folders"),
        ((1.0, 0.0), "shares must be above 0 and finite: got 1.0, 0.0"),
        ((1.0, float("inf")), "shares must be above 0 and finite"),
        ((1.0, float("nan")), "shares must be above 0 and finite"),
    ],
)
def test_shares_that_do_not_fit(
    cycles: ShardSet,
    small: ShardSet,
    small_backbone: Backbone,
    tmp_path: Path,
    shares: tuple[float, ...],
    expected: str,
) -> None:
    with pytest.raises(TrainingError, match=expected):
        train_mixed([cycles, small], tmp_path / "run", small_backbone, shares=shares)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"backbone": BackboneReference(identity="ef" * 32, name="other")}, "backbone efefefefefef, not abababababab"),
        ({"quantization": "int8"}, "quantization int8, not none"),
        ({"vocab_size": VOCAB + 1}, f"vocab_size {VOCAB + 1}, not {VOCAB}"),
    ],
)
def test_answers_of_different_backbones_are_not_mixed(
    cycles: ShardSet, tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    settings: dict[str, Any] = {"backbone": REFERENCE, "quantization": "none", "vocab_size": VOCAB}
    writer = ShardWriter(tmp_path / "b", ShardIndex(**(settings | changes), data_sha256="34" * 32))
    writer.write("train", 0, [cycle_sequence(0)])
    with pytest.raises(DataError, match=rf"b: cannot be mixed with .*: {expected}: distil both"):
        ShardMixture([cycles, ShardSet.open(tmp_path / "b")])


def test_a_folder_given_twice(cycles: ShardSet, small: ShardSet) -> None:
    with pytest.raises(DataError, match=r"holds the same answers as .*: give each once, and --shares to have some"):
        ShardMixture([cycles, small, ShardSet.open(cycles.folder)])


def test_a_folder_without_answers_is_named(cycles: ShardSet, small_backbone: Backbone, tmp_path: Path) -> None:
    silent = make_shards(tmp_path / "silent", [cycle_sequence(0)], [], data_sha256="56" * 32)
    with pytest.raises(DataError, match=r"silent: the heldout split holds no answers"):
        train_mixed([cycles, silent], tmp_path / "run", small_backbone)


def test_counts_and_vocabulary_are_of_all_folders(
    cycles: ShardSet, small: ShardSet, small_backbone: Backbone, tmp_path: Path
) -> None:
    mixture = ShardMixture([cycles, small])
    assert mixture.num_sequences("train") == 48 + 8
    assert mixture.num_tokens("heldout") == (6 + 3) * 16
    assert mixture.num_targets("train") == (48 + 8) * 14
    chosen = draft_vocabulary(mixture, 14)
    assert chosen is not None
    assert set(chosen.tolist()) & set(BACKWARDS)
    result = train_mixed([cycles, small], tmp_path, small_backbone, max_steps=2)
    manifest = checkpoint_manifest(result, mixture, MIXED, CheckpointName("mixed", "1"), data="two cycles")
    assert manifest.training is not None
    assert manifest.training.figures["train_sequences"] == 56
    assert manifest.training.settings["shares"] == "3.0,1.0"


def test_joined_packs_are_those_of_their_parts(cycles: ShardSet, small: ShardSet) -> None:
    parts = [PackedDataset(one.sequences("train"), pack_length=32, offsets=(2, 3)) for one in (cycles, small)]
    joined = JoinedPacks(parts)
    assert (joined.sizes, len(joined), joined.pack_length) == ((24, 4), 28, 32)
    assert torch.equal(joined[25].tokens, parts[1][1].tokens)
    assert torch.equal(joined[23].targets, parts[0][23].targets)


def test_pooled_figures_are_those_of_all_positions_together() -> None:
    one = HeldOut(accuracies=((0.5, 0.25), (0.25, 0.0)), losses=(1.0, 2.0), num_positions=300)
    other = HeldOut(accuracies=((0.1, 0.05), (0.05, 0.4)), losses=(3.0, 4.0), num_positions=100)
    both = HeldOut.pooled([one, other])
    assert both.num_positions == 400
    assert both.losses == pytest.approx((1.5, 2.5))
    assert both.accuracies[0] == pytest.approx((0.4, 0.2))
    assert both.accuracies[1] == pytest.approx((0.2, 0.1))
    assert HeldOut.pooled([one]) is one
