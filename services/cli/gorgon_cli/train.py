"""`gorgon train`: from prompts to published heads, stage by stage or by a preset."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click
from click.core import ParameterSource

from gorgon_cli.loading import import_engine
from gorgon_cli.options import DTYPES, KERNELS, KERNELS_HELP, QUANTIZATIONS
from gorgon_cli.train_data import data
from gorgon_cli.train_metrics import MetricsOptions, metrics_options
from gorgon_engine.runtime import may_run_native, set_threads, silence_libraries

if TYPE_CHECKING:
    from gorgon_engine.backbone.base import Backbone

F = TypeVar("F", bound=Callable[..., Any])

PRESETS = ("smoke", "smollm2", "llama3-8b")
FAMILIES = ("medusa", "hydra", "eagle")
LOSSES = ("cross-entropy", "kl")
FEATURES = ("computed", "disk", "memory")
_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.group(invoke_without_command=True)
@click.option("--preset", type=click.Choice(PRESETS), help="Run every stage with settings made for a model.")
@click.option("--out", type=_FOLDER, metavar="DIR", help="With --preset: where data, shards, run and heads go.")
@click.option("--model", metavar="PATH|NAME", help="With --preset: another model than the preset's own.")
@click.option("--store", metavar="URL", help="With --preset: publish the heads to this store at the end.")
@click.option("--device", metavar="cpu|cuda[:N]", help="With --preset. Default: a GPU where there is one.")
@click.option("--prompts", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.jsonl",
              help="With --preset: what to measure on. Default: held-out prompts.")  # fmt: skip
@click.option("--never-train", type=click.Path(path_type=Path, dir_okay=False), multiple=True, metavar="FILE.jsonl",
              help="With --preset: prompts to keep out of the training data.")  # fmt: skip
@metrics_options
@click.pass_context
def train(
    ctx: click.Context,
    preset: str | None,
    out: Path | None,
    model: str | None,
    store: str | None,
    device: str | None,
    prompts: Path | None,
    never_train: tuple[Path, ...],
    metrics: MetricsOptions,
) -> None:
    """Train draft heads: data, distill, heads, evaluate, one after the other; or all of them by --preset.

    Every stage may be interrupted and started again: it goes on where it stopped.
    """
    if ctx.invoked_subcommand is not None:
        if preset is not None:
            raise click.UsageError("give a stage or a --preset, not both", ctx)
        if ctx.get_parameter_source("metrics_port") is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--metrics-port belongs behind the stage: `{ctx.invoked_subcommand}`", ctx)
        return
    if preset is None:
        click.echo(ctx.get_help())
        return
    if out is None:
        raise click.UsageError("--preset needs --out DIR: where the run is kept", ctx)
    with metrics.served() as watched:
        import_engine()
        silence_libraries()
        from gorgon_trainer.pipeline import run_preset
        from gorgon_trainer.presets import PRESETS as ALL

        set_threads(device, native=True, threads=None)
        outcome = run_preset(
            ALL[preset],
            out,
            model=model,
            store=store,
            device=device,
            prompts=prompts,
            never_train=never_train,
            say=_say,
            metrics=watched,
        )
        click.echo(outcome)


train.add_command(data)


def _say(line: str) -> None:
    click.echo(f"gorgon: {line}", err=True)


def backbone_options(command: F) -> F:
    """Which backbone, on what."""
    for option in reversed((
        click.option("--model", default="smollm2", show_default=True, metavar="PATH|NAME",
                     help="Model folder, name in `gorgon models list`, or hub name."),
        click.option("--quantization", type=click.Choice(QUANTIZATIONS),
                     help="As it will be served. Default: int8 on a CPU, nf4 on a GPU."),
        click.option("--dtype", type=click.Choice(DTYPES), help="Of unquantised weights; 4-bit ones compute in it."),
        click.option("--device", metavar="cpu|cuda[:N]", help="Default: a GPU where there is one."),
        click.option("--kernels", type=click.Choice(KERNELS), default="auto", show_default=True,
                     help=f"{KERNELS_HELP} Here torch's on a GPU: passes have hundreds of rows."),
        click.option("--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads."),
    )):  # fmt: skip
        command = option(command)
    return command


@train.command()
@click.option("--data", "records", type=_FOLDER, required=True, metavar="DIR", help="What `gorgon train data` made.")
@click.option("--out", type=_FOLDER, required=True, metavar="DIR", help="Where the token shards go.")
@click.option("--temperatures", default="0,0.7,0.7,1", show_default=True, help="Taken in turn, record by record.")
@click.option("--passes", type=click.IntRange(min=1), default=4, show_default=True, help="Answers to every record.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=384, show_default=True, help="Of an answer.")
@click.option("--max-text-tokens", type=click.IntRange(min=1), metavar="N",
              help="Of what follows a raw text, which soon strays. Default: as --max-new-tokens.")  # fmt: skip
@click.option("--context", type=click.IntRange(min=2), default=1024, show_default=True, help="Prompt and answer.")
@click.option("--max-turns", type=click.IntRange(min=1), default=2, show_default=True, help="Of a conversation.")
@click.option("--slots", type=click.IntRange(min=1), metavar="N",
              help="Sequences decoded at once. Default: 8 on a CPU, 1024 on a GPU.")  # fmt: skip
@click.option("--shard-size", type=click.IntRange(min=1), default=512, show_default=True, help="Conversations a shard.")
@click.option("--max-seconds", type=float, metavar="S", help="Begin no shard after this time: fewer, all whole.")
@click.option("--part", default="0/1", show_default=True, metavar="I/N",
              help="Share the shards among N processes: this one is number I, from 0.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True)
@metrics_options
@backbone_options
def distill(
    records: Path,
    out: Path,
    temperatures: str,
    passes: int,
    max_new_tokens: int,
    max_text_tokens: int | None,
    context: int,
    max_turns: int,
    slots: int | None,
    shard_size: int,
    max_seconds: float | None,
    part: str,
    seed: int,
    metrics: MetricsOptions,
    **backbone: Any,
) -> None:
    """Have the backbone answer the prompts, into shards of tokens.

    Several GPUs: a process each, all into one folder (`--part 0/2 --device cuda:0` and `--part 1/2 --device cuda:1`).
    """
    share, degrees = _part(part), _numbers(temperatures)
    with metrics.served() as watched:
        import_engine()
        silence_libraries()
        from gorgon_trainer.distill import DistillConfig
        from gorgon_trainer.pipeline import distill_with

        loaded = _load(backbone)
        config = DistillConfig(
            temperatures=degrees,
            num_passes=passes,
            max_new_tokens=max_new_tokens,
            max_text_tokens=max_text_tokens,
            context=context,
            max_turns=max_turns,
            jobs_per_shard=shard_size,
            num_slots=slots or (1024 if loaded.device.type == "cuda" else 8),
            seed=seed,
            max_seconds=max_seconds,
            part=share,
        )
        report = distill_with(records, out, loaded, model=backbone["model"], config=config, metrics=watched)
        dropped = "".join(f", {count} dropped ({reason})" for reason, count in sorted(report.dropped.items()))
        click.echo(
            f"{out}: {report.num_shards_written} shards written, {report.num_shards_kept} were there; "
            f"{report.num_answers} answers, {report.num_tokens} tokens in {report.seconds:.1f} s "
            f"({report.tokens_per_second:.0f} tokens/s){dropped}"
        )


@train.command()
@click.option("--shards", "shard_folders", type=_FOLDER, required=True, multiple=True, metavar="DIR",
              help="What `gorgon train distill` made; several times: several folders, mixed.")  # fmt: skip
@click.option("--shares", metavar="N,N,...",
              help="Mix the --shards so, in their order: 3,1. Default: by their size.")  # fmt: skip
@click.option("--out", type=_FOLDER, required=True, metavar="DIR", help="State, history and TensorBoard logs.")
@click.option("--name", default="heads", show_default=True, help="Of the checkpoint.")
@click.option("--version", "version_name", default="1", show_default=True, help="Of the checkpoint.")
@click.option("--init", "initial", type=_FOLDER, metavar="DIR",
              help="Begin with the weights of a checkpoint of the same family and shape, not fresh ones.")  # fmt: skip
@click.option("--family", type=click.Choice(FAMILIES), default="hydra", show_default=True)
@click.option("--num-heads", type=click.IntRange(min=1), default=4, show_default=True,
              help="Of the eagle family: depths that its one layer drafts.")  # fmt: skip
@click.option("--num-blocks", type=click.IntRange(min=1), metavar="N",
              help="Residual blocks a head. Default: 4; an eagle head is one layer.")  # fmt: skip
@click.option("--own-projection", is_flag=True, help="A projection a head, instead of the backbone's lm_head.")
@click.option("--draft-vocab-size", type=click.IntRange(min=1), metavar="N",
              help="Draft the N most frequent tokens only. Default: all.")  # fmt: skip
@click.option("--loss", type=click.Choice(LOSSES), help="Default: cross-entropy; kl for the eagle family.")
@click.option("--decay", type=float, default=1.0, show_default=True, help="Head k weighs decay^k.")
@click.option("--unroll", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
              help="Eagle: train N depths, each on the feature that the one before predicted.")  # fmt: skip
@click.option("--feature-loss-weight", type=float, default=10.0, show_default=True,
              help="Eagle: of the distance to the backbone's features, beside 1 for the tokens.")  # fmt: skip
@click.option("--dropout", type=float, default=0.0, show_default=True, help="Share of what a head reads.")
@click.option("--learning-rate", type=float, default=3e-3, show_default=True)
@click.option("--warmup-steps", type=click.IntRange(min=0), default=50, show_default=True)
@click.option("--weight-decay", type=float, default=0.01, show_default=True)
@click.option("--max-grad-norm", type=float, default=1.0, show_default=True)
@click.option("--pack-length", type=click.IntRange(min=2), default=1024, show_default=True)
@click.option("--packs-per-batch", type=click.IntRange(min=1), default=8, show_default=True, help="On each device.")
@click.option("--num-epochs", type=float, default=1.0, show_default=True)
@click.option("--max-steps", type=click.IntRange(min=1), help="Instead of whole epochs.")
@click.option("--eval-every", type=click.IntRange(min=1), default=200, show_default=True, help="Steps.")
@click.option("--patience", type=click.IntRange(min=0), default=0, show_default=True,
              help="Stop after so many evaluations without a longer held-out acceptance; 0 = never.")  # fmt: skip
@click.option("--save-every", type=click.IntRange(min=1), default=200, show_default=True, help="Steps.")
@click.option("--features", type=click.Choice(FEATURES), default="computed", show_default=True,
              help="Hidden states: from the backbone for every batch, or kept on disk or in memory.")  # fmt: skip
@click.option("--max-file-bytes", type=click.IntRange(min=1), metavar="N", help="Split the weights into such files.")
@click.option("--seed", type=int, default=0, show_default=True)
@metrics_options
@backbone_options
def heads(
    shard_folders: tuple[Path, ...],
    shares: str | None,
    out: Path,
    name: str,
    version_name: str,
    initial: Path | None,
    family: Literal["medusa", "hydra", "eagle"],
    num_blocks: int | None,
    loss: str | None,
    features: str,
    max_file_bytes: int | None,
    model: str,
    quantization: str | None,
    dtype: str | None,
    device: str | None,
    kernels: str,
    threads: int | None,
    metrics: MetricsOptions,
    **settings: Any,
) -> None:
    """Train heads on the shards, and write a checkpoint folder beside the run's state.

    Several GPUs or hosts: start it with torchrun (`torchrun --nproc-per-node 4 -m gorgon_cli train heads ...`).
    """
    mixed = None if shares is None else _numbers(shares)
    with metrics.served() as watched:
        import_engine()
        silence_libraries()
        from gorgon_trainer.feature_cache import Features
        from gorgon_trainer.objective import Loss
        from gorgon_trainer.pipeline import train_with
        from gorgon_trainer.train_config import TrainConfig

        eagle = family == "eagle"
        config = TrainConfig(
            family=family,
            num_blocks=num_blocks or (1 if eagle else 4),
            loss=Loss(loss or ("kl" if eagle else "cross-entropy")),
            features=Features(features),
            shares=mixed,
            **settings,
        )
        assert set(settings) | {"family", "num_blocks", "loss", "features", "shares", "min_learning_rate_share"} == {
            field.name for field in fields(TrainConfig)
        }
        outcome = train_with(
            shard_folders,
            out,
            options=_options(quantization, dtype, device, kernels, threads),
            model=model,
            config=config,
            name=name,
            version=version_name,
            initial=initial,
            max_file_bytes=max_file_bytes,
            metrics=watched,
        )
        if outcome is not None:  # not the main process
            click.echo(outcome)


@train.command()
@click.option("--heads", "checkpoint", type=_FOLDER, required=True, metavar="DIR", help="A checkpoint folder.")
@click.option("--prompts", type=click.Path(path_type=Path, dir_okay=False), required=True, metavar="FILE.jsonl",
              help='JSON lines with "turns", "messages", "prompt" or "text"; first turns are asked.')  # fmt: skip
@click.option("--out", type=_FOLDER, required=True, metavar="DIR", help="Report, plots and measurements.json.")
@click.option("--run", type=_FOLDER, metavar="DIR", help="The training's folder, for its loss curves.")
@click.option("--limit", type=click.IntRange(min=1), help="Use the first N prompts only.")
@click.option("--nodes", default="4,8,16,32,64", show_default=True, help="Tree sizes, root included.")
@click.option("--drafters", type=click.Choice(("heads", "both", "all")), default="all", show_default=True,
              help="The heads alone, with prompt lookup in one tree, or one after the other.")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Of an answer.")
@click.option("--temperature", type=float, default=0.7, show_default=True, help="Of the sampled answers.")
@click.option(
    "--seeds", default="0,1,2", show_default=True, help="Sampled answers to every prompt; empty = greedy only."
)
@click.option("--slots", type=click.IntRange(min=1), metavar="N",
              help="Sequences at once. Default: 1 on a CPU, 320 on a GPU.")  # fmt: skip
@click.option("--complete", is_flag=True, help="Put figures and a model card into the checkpoint.")
@backbone_options
def evaluate(
    checkpoint: Path,
    prompts: Path,
    out: Path,
    run: Path | None,
    limit: int | None,
    nodes: str,
    drafters: str,
    max_tokens: int,
    temperature: float,
    seeds: str,
    slots: int | None,
    complete: bool,
    model: str,
    **backbone: Any,
) -> None:
    """Measure tokens per step with the engine, and write a report."""
    import_engine()
    silence_libraries()
    import torch

    from gorgon_trainer import finish
    from gorgon_trainer.evaluation.measured import MeasureSettings
    from gorgon_trainer.evaluation.prompts import read_prompts

    options = _options(**backbone)
    on_gpu = torch.cuda.is_available() and backbone["device"] != "cpu"
    names = {"heads": (finish.HEADS,), "both": (finish.BOTH,), "all": (finish.HEADS, finish.BOTH)}[drafters]
    settings = MeasureSettings(
        max_tokens=max_tokens,
        temperature=temperature,
        seeds=tuple(int(seed) for seed in _numbers(seeds)) if seeds else (),
    )
    config = finish.EvaluateConfig(
        nodes=tuple(int(count) for count in _numbers(nodes)),
        drafters=names,
        num_slots=slots or (320 if on_gpu else 1),
    )
    questions = read_prompts(prompts, limit=limit)
    measurements = finish.evaluate(
        checkpoint, questions, out, model=model, options=options, settings=settings, config=config
    )
    inputs = finish.report(
        checkpoint, out, measurements=measurements, run=run, device=backbone["device"] or ("cuda" if on_gpu else "cpu")
    )
    if complete:
        finish.complete_checkpoint(checkpoint, inputs)
    for name, series in measurements.items():
        for one in series:
            for result in one.results:
                every, rest = result.answers, result.non_looping
                click.echo(
                    f"{name:15} {one.max_nodes:3} nodes  {result.name:7} {every.mean_acceptance_length or 0:.3f} "
                    f"tokens/step  {rest.mean_acceptance_length or 0:.3f} not looping "
                    f"({rest.num_answers} of {every.num_answers} answers)"
                )


def _part(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal()):
        raise click.BadParameter(f"I/N, such as 0/2: got {text!r}", param_hint="--part")
    return int(number), int(count)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"numbers with commas between: got {text!r}", param_hint="a list") from None


def _options(quantization: str | None, dtype: str | None, device: str | None, kernels: str, threads: int | None) -> Any:
    import torch

    from gorgon_engine.backbone.select import BackboneOptions, Kernels
    from gorgon_engine.models.loading import Quantization

    set_threads(device, native=may_run_native(device, kernels, quantization), threads=threads)
    on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    # The kernels of a step are made for few rows; here there are hundreds, which is what a library's products are for.
    chosen = Kernels.TORCH if on_gpu and kernels == "auto" else Kernels(kernels)
    return BackboneOptions(
        quantization=None if quantization is None else Quantization(quantization),
        dtype=None if dtype is None else getattr(torch, dtype),
        device=device,
        kernels=chosen,
    )


def _load(arguments: dict[str, Any]) -> "Backbone":
    from gorgon_engine.backbone.select import load_backbone
    from gorgon_engine.models.catalog import resolve_model

    options = {name: value for name, value in arguments.items() if name != "model"}
    backbone, notices = load_backbone(resolve_model(arguments["model"]), _options(**options))
    for notice in notices:
        _say(notice)
    return backbone
