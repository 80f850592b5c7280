"""Training: it learns, goes on after a kill to the same bits, and stops with one clear error where it cannot."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.heads.eagle import EagleHead
from gorgon_engine.heads.hydra import HydraHeads
from gorgon_engine.heads.medusa import MedusaHeads
from gorgon_trainer.dataset import PackedDataset, collate
from gorgon_trainer.feature_cache import Features
from gorgon_trainer.features import examples, hidden_states
from gorgon_trainer.heldout import held_out
from gorgon_trainer.objective import Loss
from gorgon_trainer.package import CheckpointName, checkpoint_manifest, write_checkpoint
from gorgon_trainer.run_log import HISTORY_FILE, read_history
from gorgon_trainer.shards import ShardSet
from gorgon_trainer.training import STATE_FILE
from support.training import (
    CONFIG,
    CYCLE,
    MortalBackbone,
    assert_same_weights,
    environment,
    frozen_of,
    run_killed,
    run_training,
    state_of,
    weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")


EAGLE: dict[str, Any] = {"family": "eagle", "num_blocks": 1}
LEARNING: dict[str, dict[str, Any]] = {
    "medusa": {"family": "medusa", "num_heads": 3},
    "medusa, own projection": {"family": "medusa", "num_heads": 3, "own_projection": True, "num_blocks": 1},
    "hydra": {"family": "hydra", "decay": 0.8},
    "hydra, own projection": {"family": "hydra", "own_projection": True},
    "hydra, drafting vocabulary": {"family": "hydra", "draft_vocab_size": len(CYCLE)},
    "hydra, dropout": {"family": "hydra", "dropout": 0.1},
    # Without the features, as this random backbone's own do not say what follows.
    "eagle": EAGLE | {"unroll": 2, "feature_loss_weight": 0.0},
    "eagle, drafting vocabulary": EAGLE
    | {"unroll": 2, "feature_loss_weight": 0.0, "draft_vocab_size": len(CYCLE), "dropout": 0.05},
}


@pytest.mark.parametrize("changes", LEARNING.values(), ids=LEARNING)
def test_heads_learn_what_can_be_learned(
    cycles: ShardSet, small_backbone: Backbone, tmp_path: Path, changes: dict[str, Any]
) -> None:
    result = run_training(cycles, tmp_path, small_backbone, **changes, max_steps=60, eval_every=20, save_every=100)
    config = replace(CONFIG, **changes)
    history = read_history(tmp_path)
    assert [record["step"] for record in history] == [20, 40, 60]
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    untrained = run_training(cycles, tmp_path / "new", small_backbone, **changes, max_steps=1, learning_rate=1e-12)
    for head, row in enumerate(result.held_out.accuracies):
        assert untrained.held_out.accuracies[head][0] < 0.3
        assert row[0] > 0.9
    assert result.held_out.acceptance_length(config.offsets) > 2.5
    assert (
        untrained.held_out.acceptance_length(config.offsets) < result.held_out.acceptance_length(config.offsets) - 0.5
    )

    assert result.num_steps == 60
    assert not result.stopped_early
    assert result.peak_memory_bytes is None
    assert result.positions_per_second > 0
    assert result.seconds > 0
    assert isinstance(result.heads, {"medusa": MedusaHeads, "hydra": HydraHeads, "eagle": EagleHead}[config.family])
    assert result.heads.num_heads == config.num_heads
    assert result.heads.shares_projection is not config.own_projection
    assert not result.heads.training
    expected = None if config.draft_vocab_size is None else sorted(CYCLE)
    vocabulary = result.draft_vocabulary
    assert (vocabulary if vocabulary is None else vocabulary.tolist()) == expected


@pytest.mark.parametrize("changes", [{"family": "medusa"}, {"family": "hydra"}, EAGLE, EAGLE | {"unroll": 2}])
def test_heads_learn_the_backbones_own_distribution(
    cycles: ShardSet, small_backbone: Backbone, tmp_path: Path, changes: dict[str, Any]
) -> None:
    run_training(cycles, tmp_path, small_backbone, **changes, loss=Loss.KL, max_steps=30, eval_every=5)
    losses = [record["loss"] for record in read_history(tmp_path)]
    assert losses[-1] < 0.8 * losses[0]


def test_the_result_is_the_best_of_the_run(cycles: ShardSet, small_backbone: Backbone, tmp_path: Path) -> None:
    """Measured again by hand, over all held-out answers."""
    result = run_training(cycles, tmp_path, small_backbone, eval_every=2)
    lengths = [record["held_out"]["acceptance_length"] for record in read_history(tmp_path) if "held_out" in record]
    assert len(lengths) == 6
    assert result.held_out.acceptance_length(CONFIG.offsets) == pytest.approx(max(lengths), abs=1e-6)

    dataset = PackedDataset(cycles.sequences("heldout"), pack_length=32, offsets=CONFIG.offsets, seed=CONFIG.seed)
    batch = collate([dataset[index] for index in range(len(dataset))])
    made = examples(batch, hidden_states(small_backbone, batch), CONFIG.offsets, teachers=False)
    frozen = frozen_of(small_backbone)
    measured = held_out(result.heads, frozen, [made])
    assert measured.accuracies == result.held_out.accuracies
    assert measured.num_positions == result.held_out.num_positions == 6 * 14


def test_positions_and_steps_are_counted(cycles: ShardSet, small_backbone: Backbone, tmp_path: Path) -> None:
    """48 answers; a position counts where one of its targets is the assistant's."""
    result = run_training(cycles, tmp_path, small_backbone, max_steps=None, num_epochs=1.5)
    assert result.num_steps == 18
    per_sequence = len({p for p in range(16) for offset in CONFIG.offsets if 2 <= p + offset < 16})
    assert result.num_positions == 48 * per_sequence * 1.5


def test_a_run_killed_in_the_middle_ends_with_the_same_bits(
    cycles: ShardSet, small_model: Path, small_backbone: Backbone, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run_killed(
        "from pathlib import Path\n"
        "import torch\n"
        "from accelerate import Accelerator\n"
        "from gorgon_trainer.shards import ShardSet\n"
        "from gorgon_trainer.run_log import read_history\n"
        "from gorgon_trainer.training import train\n"
        "from support.training import CONFIG, load_fp32, mortal\n"
        "torch.set_num_threads(1)\n"
        f"folder, backbone = Path({str(folder)!r}), load_fp32(Path({str(small_model)!r}))\n"
        # Saved at step 4, logged at step 6, killed during step 7.
        "backbone = mortal(backbone, lambda: any(record['step'] == 6 for record in read_history(folder)))\n"
        f"train(ShardSet.open(Path({str(cycles.folder)!r})), folder, backbone=backbone, config=CONFIG,\n"
        "      accelerator=Accelerator(cpu=True), progress=False)\n"
    )
    assert [record["step"] for record in read_history(folder)] == [3, 4, 6]
    assert state_of(folder)["progress"]["step"] == 4
    with (folder / HISTORY_FILE).open("ab") as file:
        file.write(b'{"step": 7, "lo')  # a line cut off by the kill

    result = run_training(cycles, folder, small_backbone)
    whole = run_training(cycles, finished, small_backbone)
    assert_same_weights(weights(result), weights(whole))
    assert result.num_positions == whole.num_positions
    assert result.held_out == whole.held_out
    for name in ("heads", "best"):
        assert_same_weights(state_of(folder)[name], state_of(finished)[name])
    timed = {"positions_per_second"}
    histories = [
        [{name: value for name, value in record.items() if name not in timed} for record in read_history(one)]
        for one in (folder, finished)
    ]
    assert [record["step"] for record in histories[0]] == [3, 4, 6, 8, 9, 12]
    assert histories[0] == histories[1]
    assert sorted(path.name for path in folder.iterdir()) == [HISTORY_FILE, STATE_FILE, "tensorboard"]


class Interruption(Exception):
    pass


class FailingBackbone(MortalBackbone):
    """One that raises instead of ending its process."""

    def forward(self, *args: Any, **options: Any) -> Any:
        if self._when():
            raise Interruption
        return self._backbone.forward(*args, **options)


@pytest.mark.parametrize(
    "changes", [{"dropout": 0.2}, EAGLE | {"dropout": 0.2, "unroll": 2}, EAGLE], ids=["hydra", "eagle", "no dropout"]
)
def test_what_is_dropped_is_dropped_again(
    cycles: ShardSet, small_backbone: Backbone, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """A run that was interrupted between two states ends with the bits of one that was not."""
    whole = run_training(cycles, tmp_path / "whole", small_backbone, **changes)
    folder = tmp_path / "run"
    failing = FailingBackbone(small_backbone, lambda: any(record["step"] == 6 for record in read_history(folder)))
    with pytest.raises(Interruption):
        run_training(cycles, folder, cast(Backbone, failing), **changes)
    assert state_of(folder)["progress"]["step"] == 4
    torch.manual_seed(123)  # another process's random state
    result = run_training(cycles, folder, small_backbone, **changes)
    assert_same_weights(weights(result), weights(whole))
    assert result.held_out == whole.held_out
    if "dropout" in changes:
        plain = run_training(cycles, tmp_path / "plain", small_backbone, **(changes | {"dropout": 0.0}))
        assert any(not torch.equal(tensor, weights(plain)[name]) for name, tensor in weights(whole).items())


def test_a_finished_run_does_nothing_more(cycles: ShardSet, small_backbone: Backbone, finished: Path) -> None:
    before = (finished / STATE_FILE).stat().st_mtime_ns, read_history(finished)
    one, other = run_training(cycles, finished, small_backbone), run_training(cycles, finished, small_backbone)
    assert_same_weights(weights(one), weights(other))
    assert one.num_steps == 12
    assert ((finished / STATE_FILE).stat().st_mtime_ns, read_history(finished)) == before


def test_the_seed_decides(cycles: ShardSet, small_backbone: Backbone, finished: Path, tmp_path: Path) -> None:
    first, again = (
        run_training(cycles, finished, small_backbone),
        run_training(cycles, tmp_path / "again", small_backbone),
    )
    other = run_training(cycles, tmp_path / "other", small_backbone, seed=1)
    assert_same_weights(weights(first), weights(again))
    assert any(not torch.equal(tensor, weights(other)[name]) for name, tensor in weights(first).items())


@pytest.mark.parametrize("changes", [{}, {"draft_vocab_size": len(CYCLE)}, EAGLE], ids=["hydra", "part", "eagle"])
def test_a_run_may_begin_with_the_weights_of_another(
    cycles: ShardSet, small_backbone: Backbone, tmp_path: Path, changes: dict[str, Any]
) -> None:
    first = run_training(cycles, tmp_path / "first", small_backbone, **changes)
    config = replace(CONFIG, **changes)
    manifest = checkpoint_manifest(first, cycles, config, CheckpointName("first", "1"), data="cycles")
    write_checkpoint(first, manifest, tmp_path)
    gentle = {"learning_rate": 1e-9, "max_steps": 1, **changes}
    second = run_training(cycles, tmp_path / "second", small_backbone, initial=tmp_path / "first@1", **gentle)
    for name, tensor in weights(first).items():
        assert torch.equal(weights(second)[name].bfloat16(), tensor.bfloat16()), name
    fresh = run_training(cycles, tmp_path / "fresh", small_backbone, **gentle)
    assert any(
        not torch.equal(weights(fresh)[name].bfloat16(), weights(first)[name].bfloat16()) for name in weights(first)
    )
    if first.draft_vocabulary is not None:
        assert second.draft_vocabulary is not None
        assert torch.equal(second.draft_vocabulary, first.draft_vocabulary)


@pytest.mark.parametrize("kept", [Features.DISK, Features.MEMORY])
def test_kept_features_give_the_same_weights(
    cycles: ShardSet, small_backbone: Backbone, finished: Path, tmp_path: Path, kept: Features
) -> None:
    result = run_training(cycles, tmp_path, small_backbone, features=kept)
    assert (tmp_path / "features").exists() == (kept is Features.DISK)
    assert_same_weights(weights(result), weights(run_training(cycles, finished, small_backbone)))


def test_tensorboard_and_history_say_the_same(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    history = read_history(finished)
    scalars = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    assert scalars["loss"] == {record["step"]: pytest.approx(record["loss"], rel=1e-5) for record in history}
    measured = {record["step"]: record["held_out"] for record in history if "held_out" in record}
    assert sorted(measured) == [3, 6, 9, 12]
    assert scalars["held_out/acceptance_length"] == {
        step: pytest.approx(one["acceptance_length"], rel=1e-5) for step, one in measured.items()
    }
    assert {f"head_loss/{head}" for head in (1, 2)} | {f"held_out/top_1/{head}" for head in (1, 2)} <= scalars.keys()
    for record in history:
        assert record["loss"] == pytest.approx(sum(record["head_losses"]), rel=1e-4)
        assert len(record["head_losses"]) == 2
        assert 0 < record["learning_rate"] <= CONFIG.learning_rate
    assert history[-1]["learning_rate"] == pytest.approx(CONFIG.learning_rate * CONFIG.min_learning_rate_share)
    assert history[-1]["epoch"] == 1.0


def test_it_stops_early_where_nothing_gets_better(cycles: ShardSet, small_backbone: Backbone, tmp_path: Path) -> None:
    still: dict[str, Any] = {
        "learning_rate": 1e-12,
        "max_steps": 1000,
        "eval_every": 2,
        "save_every": 1000,
        "patience": 3,
    }
    result = run_training(cycles, tmp_path, small_backbone, **still)
    assert result.stopped_early
    assert result.num_steps == 8, "the first evaluation is the best one, three more are not better"
    again = run_training(cycles, tmp_path, small_backbone, **still)
    assert (again.stopped_early, again.num_steps) == (True, 8), "a run that stopped early is finished"
    assert_same_weights(weights(result), weights(again))


@pytest.mark.parametrize("changes", [{}, EAGLE | {"unroll": 2}], ids=["hydra", "eagle"])
def test_two_processes_train_together(
    cycles: ShardSet, small_model: Path, small_backbone: Backbone, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Half of every batch on each, out of features that they have cached together."""
    script = tmp_path / "two.py"
    script.write_text(
        "from dataclasses import replace\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from accelerate import Accelerator\n"
        "from gorgon_trainer import feature_cache\n"
        "from gorgon_trainer.shards import ShardSet\n"
        "from gorgon_trainer.training import train\n"
        "from support.training import CONFIG, load_fp32\n"
        "torch.set_num_threads(1)\n"
        "feature_cache._PACKS_PER_FILE = 5\n"
        "accelerator = Accelerator(cpu=True)\n"
        "assert accelerator.num_processes == 2\n"
        f"backbone = load_fp32(Path({str(small_model)!r}))\n"
        f"config = replace(CONFIG, features=feature_cache.Features.DISK, **{changes!r})\n"
        f"result = train(ShardSet.open(Path({str(cycles.folder)!r})), Path({str(tmp_path / 'run')!r}),\n"
        "               backbone=backbone, config=config, accelerator=accelerator, progress=False)\n"
        f"here = Path({str(tmp_path)!r}) / f'rank-{{accelerator.process_index}}.pt'\n"
        "torch.save({'weights': dict(result.heads.state_dict()), 'positions': result.num_positions,\n"
        "            'accuracies': result.held_out.accuracies}, here)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same_weights(first["weights"], second["weights"])
    assert first["accuracies"] == second["accuracies"]
    records = [json.loads(line) for line in (tmp_path / "run" / HISTORY_FILE).read_text().splitlines()]
    assert [record["step"] for record in records] == [3, 4, 6, 8, 9, 12], "one process writes the log"
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    assert_same_weights(state_of(tmp_path / "run")["best"], first["weights"])
    assert len(list((tmp_path / "run" / "features").iterdir())) == 5

    # Every cycle sequence has as many targets as every other: then the mean of means is the mean.
    one = run_training(cycles, tmp_path / "one", small_backbone, packs_per_batch=4, **changes)
    assert one.num_positions == first["positions"]
    for name, tensor in weights(one).items():
        torch.testing.assert_close(first["weights"][name], tensor, rtol=1e-3, atol=1e-4)
