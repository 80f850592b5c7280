"""The stages of a run, one after the other, each resumable: data, shards, heads, evaluation, publishing.

<out>/data        prompts: train.jsonl, heldout.jsonl
<out>/shards      the backbone's answers as tokens
<out>/run         the training's state, history and TensorBoard logs
<out>/heads       the checkpoint, <name>@<version>
<out>/report      report.md and its plots
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.backbone.select import BackboneOptions, load_backbone
from gorgon_engine.drafters.select import served_quantization
from gorgon_engine.models.catalog import CATALOG, resolve_model
from gorgon_engine.models.fetch import fetch_model
from gorgon_engine.models.identity import backbone_identity
from gorgon_engine.tokenizer import Tokenizer
from gorgon_protocol.errors import TrainingError
from gorgon_protocol.manifest import BackboneReference
from gorgon_trainer.data.fetch import fetch_data
from gorgon_trainer.data.prepare import PrepareConfig, prepare
from gorgon_trainer.distill import DistillConfig, DistillReport, distill
from gorgon_trainer.evaluation.measured import MeasureSettings
from gorgon_trainer.evaluation.prompts import read_prompts
from gorgon_trainer.finish import BOTH, HEADS, EvaluateConfig, complete_checkpoint, evaluate, report
from gorgon_trainer.mixture import ShardMixture
from gorgon_trainer.package import CheckpointName, checkpoint_manifest, write_checkpoint
from gorgon_trainer.presets import Preset
from gorgon_trainer.publish import publish
from gorgon_trainer.shards import ShardSet
from gorgon_trainer.train_config import TrainConfig
from gorgon_trainer.training import train

if TYPE_CHECKING:
    from gorgon_trainer.metrics import Stage, TrainerMetrics

Say = Callable[[str], None]


def backbone_reference(model: str, folder: Path) -> BackboneReference:
    """Who a backbone is: its hash, and a name for people."""
    title = CATALOG[model].title if model in CATALOG else Path(model).name
    return BackboneReference(identity=backbone_identity(folder), name=title)


def distill_with(
    records: Path,
    out: Path,
    backbone: Backbone,
    *,
    model: str,
    config: DistillConfig,
    progress: bool = True,
    metrics: "TrainerMetrics | None" = None,
) -> DistillReport:
    """`distill` with everything but the backbone taken from the model's folder."""
    folder = resolve_model(model)
    return distill(
        records,
        out,
        backbone=backbone,
        tokenizer=Tokenizer.from_folder(folder),
        reference=backbone_reference(model, folder),
        quantization=served_quantization(backbone),
        config=config,
        progress=progress,
        metrics=metrics,
    )


def make_accelerator(device: str | None) -> Accelerator:
    """One process's view of the devices: all by itself, or as torchrun started it."""
    import torch

    on_gpu = torch.cuda.is_available() and device != "cpu"
    return Accelerator(cpu=not on_gpu, mixed_precision="bf16" if on_gpu else "no")


def train_with(
    shard_folders: Sequence[Path],
    out: Path,
    *,
    options: BackboneOptions,
    model: str,
    config: TrainConfig,
    name: str,
    version: str,
    initial: Path | None = None,
    max_file_bytes: int | None = None,
    progress: bool = True,
    metrics: "TrainerMetrics | None" = None,
) -> Path | None:
    """Train heads on the shards of one or more folders and write their checkpoint `<out>/<name>@<version>`; return its
    folder.

    initial: a checkpoint whose weights the run begins with, instead of fresh ones. A finished checkpoint of the run's
    own is left as it is. None on all but the main process. Raises `TrainingError` where the shards are of another
    backbone.
    """
    _begin("train", metrics)
    accelerator = make_accelerator(options.device)
    checkpoint = out / CheckpointName(name, version).folder
    folder = resolve_model(model)
    shards = ShardMixture([ShardSet.open(one) for one in shard_folders])
    shards.check_shares(config.shares)
    identity = backbone_identity(folder)
    if shards.index.backbone.identity != identity:
        raise TrainingError(
            f"{shard_folders[0]}: the answers are of another backbone: {shards.index.backbone.name} "
            f"({shards.index.backbone.identity[:12]}), {model} is {identity[:12]}"
        )
    if checkpoint.exists():
        return checkpoint if accelerator.is_main_process else None
    if accelerator.device.type == "cuda":
        options = replace(options, device=str(accelerator.device))
    backbone, _ = load_backbone(folder, options)
    result = train(
        shards,
        out,
        backbone=backbone,
        config=config,
        initial=initial,
        accelerator=accelerator,
        progress=progress,
        metrics=metrics,
    )
    if not accelerator.is_main_process:
        return None
    data = (
        f"{shards.num_sequences('train')} answers ({shards.num_targets('train')} tokens) of the backbone itself to "
        "prompts of the data stage" + _mixed(shards, config)
    )
    manifest = checkpoint_manifest(result, shards, config, CheckpointName(name, version), data=data)
    write_checkpoint(result, manifest, out, max_file_bytes=max_file_bytes)
    return checkpoint


def _mixed(shards: ShardMixture, config: TrainConfig) -> str:
    """Of what several folders a run's packs were, for people."""
    if len(shards.folders) == 1:
        return ""
    sizes = " + ".join(str(folder.num_sequences("train")) for folder in shards.folders)
    return f"; {sizes} in folders of their own" + (f", mixed {config.as_json()['shares']}" if config.shares else "")


def run_preset(
    preset: Preset,
    out: Path,
    *,
    model: str | None = None,
    store: str | None = None,
    device: str | None = None,
    prompts: Path | None = None,
    never_train: tuple[Path, ...] = (),
    say: Say,
    metrics: "TrainerMetrics | None" = None,
) -> str:
    """Every stage of a preset, each going on where an earlier call stopped; returns where the heads are.

    prompts: what to measure on; None = held-out prompts of the data. Under torchrun the training is spread over all
    processes, and the rest is done by the first one, which alone may have metrics.
    """
    model = model or preset.model
    accelerator = make_accelerator(device)
    options = BackboneOptions(quantization=preset.quantization, device=device)
    checkpoint = out / "heads" / CheckpointName(preset.checkpoint, "1").folder
    with accelerator.main_process_first():
        if accelerator.is_main_process and not checkpoint.exists():
            if model in CATALOG:
                fetch_model(model)
            _begin("data", metrics)
            _prepare(preset, out / "data", never_train, say)
            _begin("distill", metrics)
            _distill(preset, out, model, options, say, metrics)
    if not checkpoint.exists():
        say(f"training {preset.train.family} heads")
        config = preset.train
        train_with(
            [out / "shards"],
            out / "run",
            options=options,
            model=model,
            config=config,
            name=preset.checkpoint,
            version="1",
            metrics=metrics,
        )
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            (out / "run" / checkpoint.name).rename(checkpoint)
    if not accelerator.is_main_process:
        return str(checkpoint)
    _begin("evaluate", metrics)
    _evaluate(preset, out, checkpoint, model, options, prompts, accelerator.device.type, say)
    if store is None:
        return str(checkpoint)
    say(f"publishing to {store}")
    _begin("publish", metrics)
    return publish(checkpoint, store, metrics=metrics)


def _begin(stage: "Stage", metrics: "TrainerMetrics | None") -> None:
    if metrics is not None:
        metrics.begin(stage)


def _prepare(preset: Preset, out: Path, never_train: tuple[Path, ...], say: Say) -> None:
    say("preparing prompts")
    sources = tuple(fetch_data(name) for name in preset.prompts)
    prepare(PrepareConfig(out=out, sources=sources, never_train=never_train, limit=preset.limit))


def _distill(
    preset: Preset, out: Path, model: str, options: BackboneOptions, say: Say, metrics: "TrainerMetrics | None"
) -> None:
    say("answering them with the backbone")
    backbone, notices = load_backbone(resolve_model(model), options)
    for notice in notices:
        say(notice)
    config = preset.distill
    if backbone.device.type == "cuda":
        config = replace(config, num_slots=preset.gpu_slots)
    done = distill_with(out / "data", out / "shards", backbone, model=model, config=config, metrics=metrics)
    if done.num_shards_written:
        say(f"{done.num_answers} answers, {done.num_tokens} tokens, {done.tokens_per_second:.0f} tokens/s")


def _evaluate(
    preset: Preset,
    out: Path,
    checkpoint: Path,
    model: str,
    options: BackboneOptions,
    prompts: Path | None,
    device_type: str,
    say: Say,
) -> None:
    say("measuring tokens per step")
    questions = read_prompts(prompts or out / "data" / "heldout.jsonl", limit=preset.evaluation_prompts)
    settings = MeasureSettings(
        max_tokens=preset.evaluation_tokens, max_prompt_tokens=preset.distill.context, seeds=preset.evaluation_seeds
    )
    config = EvaluateConfig(nodes=preset.evaluation_nodes, num_slots=preset.evaluation_slots)
    measurements = evaluate(
        checkpoint, questions, out / "report", model=model, options=options, settings=settings, config=config
    )
    inputs = report(
        checkpoint,
        out / "report",
        measurements=measurements,
        run=out / "run",
        device=device_type,
        commands=(f"gorgon train --preset {preset.name} --out DIR",),
    )
    complete_checkpoint(checkpoint, inputs)
    for name in (HEADS, BOTH):
        for one in measurements.get(name, ()):
            lengths = ", ".join(
                f"{result.name} {result.answers.mean_acceptance_length or 0:.2f}" for result in one.results
            )
            say(f"{name}, {one.max_nodes} nodes: {lengths} tokens per step")
