"""Training that cannot go on says so in one line, and leaves what it had."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gorgon_engine.backbone.base import Backbone
from gorgon_protocol.errors import DataError, HeadsError, TrainingError
from gorgon_trainer.objective import Loss
from gorgon_trainer.package import CheckpointName, checkpoint_manifest, write_checkpoint
from gorgon_trainer.run_log import read_history
from gorgon_trainer.shards import ShardSet, TokenSequence
from gorgon_trainer.training import STATE_FILE
from support.training import (
    CAN_MOUNT,
    CONFIG,
    VOCAB,
    cycle_sequence,
    make_cycles,
    make_shards,
    run_on_small_disk,
    run_training,
)

EAGLE: dict[str, Any] = {"family": "eagle", "num_blocks": 1}

pytestmark = pytest.mark.usefixtures("one_thread")


def refusal(error: type[Exception], shards: ShardSet, folder: Path, backbone: Backbone, **changes: Any) -> str:
    with pytest.raises(error) as caught:
        run_training(shards, folder, backbone, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"learning_rate": 1e-4}, "learning_rate 0.01 and cannot go on with 0.0001"),
        ({"family": "medusa"}, "family hydra and cannot go on with medusa"),
        ({"loss": Loss.KL}, "loss cross-entropy and cannot go on with kl"),
        ({"max_steps": None}, "max_steps 12 and cannot go on with None"),
        ({"dropout": 0.1}, "dropout 0.0 and cannot go on with 0.1"),
        (EAGLE, "family hydra and cannot go on with eagle"),
        ({"seed": 9}, "seed 0 and cannot go on with 9"),
        ({"draft_vocab_size": 9}, "draft_vocab_size None and cannot go on with 9"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(
    cycles: ShardSet, small_backbone: Backbone, finished: Path, changes: dict[str, Any], expected: str
) -> None:
    before = (finished / STATE_FILE).read_bytes()
    message = refusal(TrainingError, cycles, finished, small_backbone, **changes)
    assert message.startswith(f"{finished / STATE_FILE}: the run was begun with {expected}: ")
    assert (finished / STATE_FILE).read_bytes() == before


def test_a_run_does_not_go_on_with_other_data(
    cycles: ShardSet, small_backbone: Backbone, finished: Path, tmp_path: Path
) -> None:
    other = make_cycles(tmp_path / "other", data_sha256="ef" * 32)
    message = refusal(TrainingError, other, finished, small_backbone)
    assert message.startswith(f"{finished / STATE_FILE}: the run was begun on other data: give another folder")


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "pickle", "list", "other"])
def test_a_damaged_state_is_named(
    cycles: ShardSet, small_backbone: Backbone, finished: Path, tmp_path: Path, damage: str
) -> None:
    path = tmp_path / STATE_FILE
    content = (finished / STATE_FILE).read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "pickle":
        torch.save({"fingerprint": Path("code that would be run")}, path)
    elif damage == "list":
        torch.save([1, 2], path)
    elif damage == "other":
        torch.save({"weight": torch.zeros(2)}, path)
    else:
        path.write_text("no state" if damage == "text" else "")
    damaged = path.read_bytes()
    message = refusal(TrainingError, cycles, tmp_path, small_backbone)
    assert message.startswith(f"{path}: cannot be read: ")
    assert message.endswith(": remove it to start the run again")
    assert path.read_bytes() == damaged


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"learning_rate": 1e36}, "the loss is nan at step 3"),
        ({"learning_rate": 1e36, "eval_every": 100}, "the loss is nan at step 4"),
        # The step that breaks the weights still has a loss, of the weights before it.
        ({"weight_decay": 1e45, "save_every": 1}, "weights are not finite at step 1"),
    ],
)
def test_a_run_that_explodes_saves_nothing(
    cycles: ShardSet, small_backbone: Backbone, tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    message = refusal(TrainingError, cycles, tmp_path, small_backbone, warmup_steps=0, **changes)
    assert message == f"{tmp_path}: {expected}: lower the learning rate and start a new run"
    assert not (tmp_path / STATE_FILE).exists()
    assert read_history(tmp_path) == []


def silent(*tokens: int) -> TokenSequence:
    return TokenSequence.from_lists(tokens, [0] * len(tokens))


@pytest.mark.parametrize(
    ("train_set", "heldout_set", "expected"),
    [
        ([cycle_sequence(0)] * 8, [], "the heldout split holds no answers"),
        ([cycle_sequence(0)] * 8, [silent(5, 6, 7)], "the heldout split holds no answers"),
        ([], [cycle_sequence(0)], "the train split holds no answers"),
        ([cycle_sequence(0)] * 8, [cycle_sequence(0, 1, 0)], "the held-out answers are too short for offsets [2, 3]"),
    ],
)
def test_data_that_cannot_be_trained_on(
    small_backbone: Backbone,
    tmp_path: Path,
    train_set: list[TokenSequence],
    heldout_set: list[TokenSequence],
    expected: str,
) -> None:
    shards = make_shards(tmp_path / "shards", train_set, heldout_set)
    assert refusal(DataError, shards, tmp_path / "run", small_backbone).startswith(f"{tmp_path / 'shards'}: {expected}")
    assert not (tmp_path / "run").exists()


def test_too_little_data_for_a_batch(small_backbone: Backbone, cycles: ShardSet, tmp_path: Path) -> None:
    message = refusal(TrainingError, cycles, tmp_path, small_backbone, packs_per_batch=25)
    assert message.startswith("24 packs do not fill one batch of 25 on each of 1 ranks: give more data")


def test_a_run_needs_a_folder(cycles: ShardSet, small_backbone: Backbone, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = refusal(TrainingError, cycles, tmp_path / "file" / "run", small_backbone)
    assert message == f"{tmp_path / 'file' / 'run'}: cannot be made: Not a directory"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_heads": 0}, "num_heads must be at least 1: got 0"),
        ({"family": "medusa", "num_heads": 1}, "medusa heads must be 2 at least"),
        ({"packs_per_batch": 0}, "packs_per_batch must be at least 1: got 0"),
        ({"save_every": 0}, "save_every must be at least 1: got 0"),
        ({"max_steps": 0}, "max_steps must be at least 1: got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0 and finite: got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0 and finite: got nan"),
        ({"num_epochs": float("inf")}, "num_epochs must be above 0 and finite: got inf"),
        ({"decay": -0.5}, "decay must be above 0 and finite: got -0.5"),
        ({"dropout": 1.0}, "dropout must be a share from 0 up to, not including, 1: got 1.0"),
        ({"dropout": -0.1}, "dropout must be a share from 0"),
        ({"dropout": float("nan")}, "dropout must be a share from 0"),
        ({"family": "eagle"}, "an eagle head is one layer: num_blocks must be 1: got 2"),
        (EAGLE | {"own_projection": True}, "an eagle head predicts what the backbone's projection reads"),
        (EAGLE | {"unroll": 3}, "unroll must be between 1 and num_heads 2: got 3"),
        (EAGLE | {"unroll": 0}, "unroll must be between 1 and num_heads 2: got 0"),
        (EAGLE | {"feature_loss_weight": -1.0}, "feature_loss_weight must not be below 0, and finite: got -1.0"),
        (EAGLE | {"feature_loss_weight": float("nan")}, "feature_loss_weight must not be below 0, and finite: got nan"),
        ({"patience": -1}, "patience must not be below 0: got -1"),
        ({"seed": -1}, "seed must not be below 0: got -1"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(TrainingError) as caught:
        replace(CONFIG, **changes)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pack_length": 3}, "pack_length 3 leaves the head of offset 3 no target: make it longer"),
        ({"draft_vocab_size": VOCAB + 1}, f"draft_vocab_size must be between 1 and the vocabulary's {VOCAB}"),
    ],
)
def test_settings_that_do_not_fit_the_data(
    cycles: ShardSet, small_backbone: Backbone, tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    assert refusal(TrainingError, cycles, tmp_path, small_backbone, **changes).startswith(expected)


if CAN_MOUNT:

    def test_a_full_disk(cycles: ShardSet, small_model: Path, small_backbone: Backbone, tmp_path: Path) -> None:
        """The second state does not fit beside the first one, which stays."""
        probe = run_training(cycles, tmp_path / "probe", small_backbone, max_steps=4)
        assert probe.num_steps == 4
        size = (tmp_path / "probe" / STATE_FILE).stat().st_size
        printed = run_on_small_disk(
            tmp_path,
            int(1.5 * size / 1024) + 40,
            "from pathlib import Path\n"
            "from accelerate import Accelerator\n"
            "from gorgon_protocol.errors import TrainingError\n"
            "from gorgon_trainer.shards import ShardSet\n"
            "from gorgon_trainer.training import train\n"
            "from support.training import CONFIG, load_fp32\n"
            f"backbone = load_fp32(Path({str(small_model)!r}))\n"
            "folder = Path('disk/run')\n"
            "try:\n"
            f"    train(ShardSet.open(Path({str(cycles.folder)!r})), folder, backbone=backbone, config=CONFIG,\n"
            "          accelerator=Accelerator(cpu=True), progress=False)\n"
            "except TrainingError as error:\n"
            "    print(error)\n"
            "import torch\n"
            "print(torch.load(folder / 'state.pt', weights_only=True)['progress']['step'], *folder.glob('.*'))\n",
        )
        message, state = printed.splitlines()
        assert message.startswith("disk/run/state.pt: cannot be written: ")
        assert state == "4"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"family": "medusa"}, "the run cannot begin with these heads: family hydra, not medusa"),
        ({"draft_vocab_size": 9}, "the run cannot begin with these heads: drafting vocabulary None, not 9"),
        ({"num_blocks": 3}, "heads other@1 are of another shape than the run's: give the settings that they were"),
    ],
)
def test_heads_that_a_run_cannot_begin_with(
    cycles: ShardSet, small_backbone: Backbone, finished: Path, tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    result = run_training(cycles, finished, small_backbone)
    manifest = checkpoint_manifest(result, cycles, CONFIG, CheckpointName("other", "1"), data="cycles")
    write_checkpoint(result, manifest, tmp_path)
    message = refusal(TrainingError, cycles, tmp_path / "run", small_backbone, initial=tmp_path / "other@1", **changes)
    assert expected in message


def test_heads_that_are_not_there(cycles: ShardSet, small_backbone: Backbone, tmp_path: Path) -> None:
    message = refusal(HeadsError, cycles, tmp_path / "run", small_backbone, initial=tmp_path / "none@1")
    assert "none@1" in message


def test_a_run_does_not_go_on_from_other_weights(
    cycles: ShardSet, small_backbone: Backbone, finished: Path, tmp_path: Path
) -> None:
    result = run_training(cycles, finished, small_backbone)
    manifest = checkpoint_manifest(result, cycles, CONFIG, CheckpointName("first", "1"), data="cycles")
    write_checkpoint(result, manifest, tmp_path)
    run_training(cycles, tmp_path / "run", small_backbone, max_steps=1, initial=tmp_path / "first@1")
    message = refusal(TrainingError, cycles, tmp_path / "run", small_backbone, max_steps=1)
    assert message.endswith("the run was begun with other weights: give the same --init, or another folder")
