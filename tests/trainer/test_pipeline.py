"""The whole chain on the real small model: prompts in, published heads out, better than untrained ones."""

import json
from pathlib import Path

import pytest

from gorgon_engine.backbone.select import BackboneOptions
from gorgon_engine.heads.checkpoint import read_heads, read_manifest, resolve_heads, save_heads, verify_heads
from gorgon_engine.heads.hydra import HydraHeads
from gorgon_trainer import pipeline
from gorgon_trainer.evaluation.measured import MeasureSettings
from gorgon_trainer.evaluation.prompts import read_prompts
from gorgon_trainer.finish import HEADS, EvaluateConfig, evaluate
from gorgon_trainer.presets import PRESETS
from gorgon_trainer.run_log import read_history


@pytest.fixture(scope="module")
def run(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """The smoke preset, published: (folder, store, what was said)."""
    out, store = tmp_path_factory.mktemp("smoke") / "run", tmp_path_factory.mktemp("smoke-store")
    said: list[str] = []
    pipeline.run_preset(PRESETS["smoke"], out, store=str(store), device="cpu", say=said.append)
    return out, store, said


def test_trained_heads_beat_untrained_ones(run: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    out, _, _ = run
    checkpoint = out / "heads" / "smoke-hydra@1"
    loaded = read_heads(checkpoint)
    assert isinstance(loaded.heads, HydraHeads)
    untrained = HydraHeads(loaded.heads.shape)
    untrained.start_as_pass_through(hidden_rms=2.2)
    manifest = loaded.manifest.model_copy(update={"name": "untrained", "files": {}})
    folder = tmp_path / "untrained@1"
    save_heads(folder, untrained, manifest, draft_vocabulary=loaded.draft_vocabulary)
    settings = MeasureSettings(max_tokens=48, seeds=())
    config = EvaluateConfig(nodes=(16,), drafters=(HEADS,))
    prompts = read_prompts(out / "data" / "heldout.jsonl", limit=4)

    def length(heads: Path) -> float:
        measured = evaluate(
            heads, prompts, tmp_path / heads.name, model="smollm2",
            options=BackboneOptions(device="cpu"), settings=settings, config=config,
        )  # fmt: skip
        (result,) = measured[HEADS][0].results
        assert result.answers.mean_acceptance_length is not None
        return result.answers.mean_acceptance_length

    trained, before = length(checkpoint), length(folder)
    assert trained > before + 0.2 > 1.2, (trained, before)


def test_the_run_leaves_everything_that_was_promised(run: tuple[Path, Path, list[str]]) -> None:
    out, store, said = run
    checkpoint = out / "heads" / "smoke-hydra@1"
    manifest = verify_heads(checkpoint)
    assert {"README.md", "heads.safetensors"} == set(manifest.files)
    assert manifest.recommended_tree
    assert manifest.accuracies
    assert (out / "report" / "report.md").read_text().startswith("# smoke-hydra@1")
    assert {path.suffix for path in (out / "report").iterdir()} == {".md", ".png", ".json"}
    assert list((out / "run" / "tensorboard").iterdir())
    history = read_history(out / "run")
    assert history[-1]["loss"] < history[0]["loss"]
    published = resolve_heads(store / "SmolLM2-135M-Instruct")
    assert read_manifest(published) == read_manifest(checkpoint)
    assert any("tokens per step" in line for line in said)


def test_a_second_call_does_nothing_again(run: tuple[Path, Path, list[str]]) -> None:
    out, store, _ = run
    watched = [p for folder in ("shards", "run", "heads") for p in (out / folder).rglob("*") if p.is_file()]
    before = {path: path.read_bytes() for path in watched if path.suffix in (".safetensors", ".pt", ".jsonl")}
    measured = json.loads((out / "report" / "measurements.json").read_text())
    pipeline.run_preset(PRESETS["smoke"], out, store=str(store), device="cpu", say=lambda line: None)
    assert {path: path.read_bytes() for path in before} == before
    assert json.loads((out / "report" / "measurements.json").read_text()) == measured
