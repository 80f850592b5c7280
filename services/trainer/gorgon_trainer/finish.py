"""What follows training: measuring a checkpoint with the engine, the report, and the card inside the checkpoint."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gorgon_engine.backbone.select import BackboneOptions
from gorgon_engine.drafters.select import DrafterKind
from gorgon_engine.engine import EngineConfig
from gorgon_engine.heads.checkpoint import read_heads, read_manifest, save_heads
from gorgon_protocol.errors import TrainingError
from gorgon_protocol.manifest import HeadsManifest
from gorgon_trainer.evaluation.card import CARD_FILE, model_card
from gorgon_trainer.evaluation.engines import EngineParts
from gorgon_trainer.evaluation.figures import Measurement
from gorgon_trainer.evaluation.hardware import describe_hardware
from gorgon_trainer.evaluation.history import HistoryRecord
from gorgon_trainer.evaluation.measured import MeasureSettings, measure_nodes
from gorgon_trainer.evaluation.prompts import EvaluationPrompt
from gorgon_trainer.evaluation.report import ReportInputs, write_report
from gorgon_trainer.files import folder_written_whole, written_whole
from gorgon_trainer.run_log import read_history

MEASUREMENTS_FILE = "measurements.json"
HEADS, BOTH = "heads", "heads + lookup"
_FIGURE_NODES = 32


@dataclass(frozen=True, slots=True)
class EvaluateConfig:
    nodes: tuple[int, ...] = (4, 8, 16, 32, 64)
    drafters: tuple[str, ...] = (HEADS, BOTH)
    num_slots: int = 1


def evaluate(
    checkpoint: Path,
    prompts: Sequence[EvaluationPrompt],
    out: Path,
    *,
    model: str,
    options: BackboneOptions,
    settings: MeasureSettings,
    config: EvaluateConfig,
) -> dict[str, list[Measurement]]:
    """Tokens a step of a checkpoint's heads by the engine itself, for every drafter and tree size.

    Results are written to `<out>/measurements.json` as they come; what is there already, of the same checkpoint and
    settings, is not measured again.
    """
    key = _key(checkpoint)
    path = out / MEASUREMENTS_FILE
    found = _read(path, key, settings, len(prompts))
    parts: EngineParts | None = None
    for name in config.drafters:
        done = found.setdefault(name, [])
        missing = [nodes for nodes in config.nodes if nodes not in {one.max_nodes for one in done}]
        if not missing:
            continue
        if parts is None:
            engine = EngineConfig(
                model=model,
                backbone=options,
                heads=checkpoint,
                drafter=DrafterKind.BOTH,
                num_slots=config.num_slots,
            )
            parts = EngineParts.load(engine)
        chosen = parts.only("head") if name == HEADS else parts
        for measurement in measure_nodes(chosen.maker(prompts, settings), prompts, settings, missing):
            done.append(measurement)
            done.sort(key=lambda one: one.max_nodes)
            _write(path, key, settings, found)
    return found


def report(
    checkpoint: Path,
    out: Path,
    *,
    measurements: Mapping[str, Sequence[Measurement]],
    run: Path | None,
    device: str,
    commands: Sequence[str] = (),
    seconds: Mapping[str, float] | None = None,
) -> ReportInputs:
    """Write `<out>/report.md` and its plots. run: the training's folder, for its history."""
    manifest = read_manifest(checkpoint)
    training = manifest.training
    figures = training.figures if training else {}
    inputs = ReportInputs(
        title=f"{manifest.name}@{manifest.version}: {manifest.family} heads for {manifest.backbone.name}",
        offsets=manifest.offsets,
        accuracies=manifest.accuracies or (),
        history=[HistoryRecord.from_json(record) for record in read_history(run)] if run is not None else (),
        measurements=measurements,
        settings=dict(training.settings) if training else {},
        data={name: value for name, value in figures.items() if name.startswith(("train_", "held_out_positions"))},
        seconds=seconds or {},
        hardware=describe_hardware(device),
        commands=commands,
    )
    write_report(out, inputs)
    return inputs


def complete_checkpoint(checkpoint: Path, inputs: ReportInputs, *, max_file_bytes: int | None = None) -> HeadsManifest:
    """Put the measured figures into a checkpoint's manifest and a model card beside its weights, in one rename."""
    loaded = read_heads(checkpoint)
    manifest = loaded.manifest
    if manifest.training is not None:
        figures = {**manifest.training.figures, **_measured_figures(inputs.measurements)}
        training = manifest.training.model_copy(update={"figures": figures})
        manifest = manifest.model_copy(update={"training": training, "files": {}})
    try:
        with folder_written_whole(checkpoint, replace=True) as temporary:
            made = temporary / "checkpoint"
            manifest = save_heads(
                made,
                loaded.heads,
                manifest,
                draft_vocabulary=loaded.draft_vocabulary,
                max_file_bytes=max_file_bytes,
                extra_files={CARD_FILE: model_card(manifest, inputs).encode()},
            )
            for file in made.iterdir():
                file.rename(temporary / file.name)
            made.rmdir()
    except OSError as error:
        raise TrainingError(f"{checkpoint}: cannot be completed: {error.strerror}") from error
    return manifest


def _measured_figures(measurements: Mapping[str, Sequence[Measurement]]) -> dict[str, float]:
    """The figures that are compared between checkpoints: tokens a step with trees of 32 rows."""
    figures = {}
    for name, prefix in ((HEADS, "tokens_per_step"), (BOTH, "tokens_per_step_with_lookup")):
        for measurement in measurements.get(name, ()):
            if measurement.max_nodes != _FIGURE_NODES:
                continue
            for result in measurement.results:
                length = result.answers.mean_acceptance_length
                suffix = "" if result.temperature == 0.0 else f"_t{result.temperature:g}"
                if length is not None:
                    figures[f"{prefix}{suffix}"] = round(length, 4)
    return figures


def _key(checkpoint: Path) -> str:
    """The weights of a checkpoint, whatever its manifest says about them."""
    files = read_manifest(checkpoint).files
    return ",".join(record.sha256 for name, record in sorted(files.items()) if name.startswith("heads"))


def _read(path: Path, key: str, settings: MeasureSettings, num_prompts: int) -> dict[str, list[Measurement]]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    if content.get("weights") != key or content.get("settings") != repr((settings, num_prompts)):
        return {}
    return {
        name: [Measurement.from_json(values) for values in series] for name, series in content["measurements"].items()
    }


def _write(path: Path, key: str, settings: MeasureSettings, found: Mapping[str, Sequence[Measurement]]) -> None:
    num_prompts = next(one.num_prompts + one.num_skipped for series in found.values() for one in series)
    content = {
        "weights": key,
        "settings": repr((settings, num_prompts)),
        "measurements": {name: [one.as_json() for one in series] for name, series in found.items()},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            file.write(json.dumps(content, indent=1).encode() + b"\n")
    except OSError as error:
        raise TrainingError(f"{path}: cannot be written: {error.strerror}") from error
