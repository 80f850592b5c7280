"""What a job tells Prometheus is what its own records say, and nothing of it is told before it is known."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from accelerate import Accelerator
from prometheus_client.parser import text_string_to_metric_families

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.tokenizer import Tokenizer
from gorgon_protocol.manifest import BackboneReference
from gorgon_trainer.data.records import ChatRecord, Message, Record, TextRecord, to_line
from gorgon_trainer.distill import DistillConfig, distill
from gorgon_trainer.metrics import STAGES, TrainerMetrics
from gorgon_trainer.package import CheckpointName, checkpoint_manifest, write_checkpoint
from gorgon_trainer.publish import publish
from gorgon_trainer.run_log import RunLog, read_history
from gorgon_trainer.shards import ShardSet
from gorgon_trainer.training import STATE_FILE, TrainResult, train
from support.models import tiny_llama
from support.training import CONFIG, REFERENCE, load_fp32, state_of
from support.vocabularies import CHATML, byte_level_bpe, save

pytestmark = pytest.mark.usefixtures("one_thread")

Samples = Mapping[tuple[str, ...], float]


def samples(metrics: TrainerMetrics) -> Samples:
    """(name behind the prefix, label values) -> value, of all that is told."""
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        (sample.name.removeprefix("gorgon_trainer:"), *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith("gorgon_trainer:") and not sample.name.endswith("_created")
    }


def labelled(told: Samples, name: str) -> dict[tuple[str, ...], float]:
    """Label values -> value, of one metric."""
    return {tuple(labels): value for (one, *labels), value in told.items() if one == name}


def training(shards: ShardSet, folder: Path, backbone: Backbone, metrics: TrainerMetrics) -> TrainResult:
    return train(
        shards,
        folder,
        backbone=backbone,
        config=CONFIG,
        accelerator=Accelerator(cpu=True),
        progress=False,
        metrics=metrics,
    )


def test_what_is_not_known_yet_is_absent() -> None:
    told = samples(TrainerMetrics())
    assert {name for name, *_ in told} == {"stage", "outcome", "distilled_tokens_total", "positions_total"}
    assert set(told.values()) == {0.0}


def test_one_stage_at_a_time() -> None:
    metrics = TrainerMetrics()
    for stage in STAGES:
        metrics.begin(stage)
        assert labelled(samples(metrics), "stage") == {(one,): float(one == stage) for one in STAGES}


def test_training_tells_what_its_history_says(cycles: ShardSet, small_backbone: Backbone, tmp_path: Path) -> None:
    metrics = TrainerMetrics()
    result = training(cycles, tmp_path / "run", small_backbone, metrics)
    last = read_history(tmp_path / "run")[-1]
    told = samples(metrics)
    assert told["stage", "train"] == 1
    assert (told["step",], told["max_steps",]) == (12, 12) == (result.num_steps, CONFIG.max_steps)
    assert told["positions_total",] == result.num_positions == last["num_positions"]
    assert told["loss",] == last["loss"]
    assert told["learning_rate",] == last["learning_rate"]
    assert labelled(told, "head_loss") == {(str(n),): loss for n, loss in enumerate(last["head_losses"], 1)}
    assert told["held_out_acceptance_length",] == last["held_out"]["acceptance_length"]
    assert labelled(told, "held_out_accuracy") == {
        (str(n),): row[0] for n, row in enumerate(last["held_out"]["accuracies"], 1)
    }
    assert told["checkpoint_step",] == 12
    assert told["checkpoint_timestamp_seconds",] == pytest.approx(
        (tmp_path / "run" / STATE_FILE).stat().st_mtime, abs=5
    )
    assert told["seconds_left",] == 0


def test_metrics_change_no_weight(cycles: ShardSet, small_backbone: Backbone, tmp_path: Path, finished: Path) -> None:
    training(cycles, tmp_path / "run", small_backbone, TrainerMetrics())
    mine, other = state_of(tmp_path / "run"), state_of(finished)
    assert all(tensor.equal(other["heads"][name]) for name, tensor in mine["heads"].items())


def test_a_resumed_run_has_the_age_of_its_checkpoint(tmp_path: Path) -> None:
    metrics = TrainerMetrics()
    with RunLog(tmp_path, 8, on=True, max_steps=12, saved_at=1_000.0, metrics=metrics) as log:
        told = samples(metrics)
        assert (told["step",], told["checkpoint_step",], told["checkpoint_timestamp_seconds",]) == (8, 8, 1_000.0)
        assert ("seconds_left",) not in told, "nothing has been done yet"
        log.stepped(9, 100)
        told = samples(metrics)
        assert (told["step",], told["positions_total",], told["checkpoint_step",]) == (9, 100, 8)
        log.saved(9)
        told = samples(metrics)
        assert told["checkpoint_step",] == 9
        assert told["checkpoint_timestamp_seconds",] > 1_000.0


def test_resuming_reads_when_the_state_was_saved(cycles: ShardSet, small_backbone: Backbone, tmp_path: Path) -> None:
    training(cycles, tmp_path / "run", small_backbone, TrainerMetrics())
    os.utime(tmp_path / "run" / STATE_FILE, (5_000, 5_000))
    metrics = TrainerMetrics()
    training(cycles, tmp_path / "run", small_backbone, metrics)  # has nothing left to do
    told = samples(metrics)
    assert (told["step",], told["checkpoint_timestamp_seconds",], told["positions_total",]) == (12, 5_000, 0)


def test_other_processes_tell_nothing(tmp_path: Path) -> None:
    metrics = TrainerMetrics()
    with RunLog(tmp_path, 0, on=False, max_steps=12, metrics=metrics) as log:
        log.stepped(1, 100)
        log.saved(1)
        log.write({"step": 1})
    assert samples(metrics) == samples(TrainerMetrics())


def test_time_left_is_at_the_pace_of_this_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("gorgon_trainer.metrics.time.monotonic", lambda: clock[0])
    metrics = TrainerMetrics()
    metrics.training(step=20, max_steps=60, saved_at=None)
    clock[0] += 30.0
    metrics.logged({"step": 30, "loss": 1.0, "learning_rate": 0.1, "head_losses": []})
    assert samples(metrics)["seconds_left",] == pytest.approx(90.0)  # ten steps took thirty seconds
    metrics.begin("evaluate")
    assert ("seconds_left",) not in samples(metrics)
    metrics.distilling(num_prompts=10, num_shards=1, max_seconds=50.0)
    clock[0] += 20.0
    metrics.prompt_ended()
    assert samples(metrics)["seconds_left",] == pytest.approx(30.0)  # not 180: no more is begun then


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("metrics") / "tiny", vocab_size=352)
    return save(byte_level_bpe(), folder, bos="<|endoftext|>", eos="<|im_end|>", chat_template=CHATML)


class Watched(TrainerMetrics):
    """Remembers how much there was to do."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[tuple[int, int]] = []

    def distilling(self, *, num_prompts: int, num_shards: int, max_seconds: float | None) -> None:
        self.begun.append((num_prompts, num_shards))
        super().distilling(num_prompts=num_prompts, num_shards=num_shards, max_seconds=max_seconds)


def test_distilling_tells_what_it_reports(talker: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 10), ("heldout", 3)):
        records: list[Record] = [TextRecord.of(f"{split} " + "cat mat " * 80, "x")]  # too long
        records += [ChatRecord.of([Message(role="user", content=f"the cat {split} {n}")], "x") for n in range(count)]
        (data / f"{split}.jsonl").write_bytes(b"".join(map(to_line, records)))
    config = DistillConfig(num_passes=1, max_new_tokens=8, context=120, max_turns=1, jobs_per_shard=4, num_slots=4)
    metrics = Watched()

    def run() -> int:
        report = distill(
            data,
            tmp_path / "shards",
            backbone=load_fp32(talker),
            tokenizer=Tokenizer.from_folder(talker),
            reference=BackboneReference(identity="ab" * 32, name="tiny"),
            quantization="none",
            config=config,
            progress=False,
            metrics=metrics,
        )
        return report.num_tokens

    num_tokens = run()
    told = samples(metrics)
    assert told["stage", "distill"] == 1
    assert told["distilled_tokens_total",] == num_tokens > 0
    assert (told["prompts_left",], told["shards_left",], told["seconds_left",]) == (0, 0, 0)
    (tmp_path / "shards" / "train-00001.safetensors").unlink()
    num_tokens += run()
    assert metrics.begun[1:] == [(4, 1)], "of what is missing alone"
    assert samples(metrics)["distilled_tokens_total",] == num_tokens


def test_publishing_tells_name_and_version(cycles: ShardSet, small_backbone: Backbone, tmp_path: Path) -> None:
    result = training(cycles, tmp_path / "run", small_backbone, TrainerMetrics())
    manifest = checkpoint_manifest(result, cycles, CONFIG, CheckpointName("cats", "1"), data="cycles")
    write_checkpoint(result, manifest, tmp_path)
    assert manifest.backbone == REFERENCE
    metrics = TrainerMetrics()
    publish(tmp_path / "cats@1", tmp_path / "store", version="next", metrics=metrics)
    publish(tmp_path / "cats@1", tmp_path / "store", version="next", metrics=metrics)
    assert labelled(samples(metrics), "published_info") == {("cats", "1"): 1, ("cats", "2"): 1}
