"""`gorgon heads`: checkpoints of draft heads and the stores that hold them."""

import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gorgon_cli.loading import import_engine

if TYPE_CHECKING:
    from gorgon_engine.heads.store import PublishedHeads
    from gorgon_protocol.manifest import HeadsManifest
    from gorgon_trainer.interop.foreign import Backbone

# Spelled out, as torch takes a second that `--help` need not wait for; a test holds them equal to the converters' own.
IMPORT_FORMATS = ("auto", "medusa", "vllm-medusa", "hydra")
EXPORT_FORMATS = ("medusa-v1", "medusa-v2", "vllm-medusa", "hydra")
QUANTIZATIONS = ("none", "nf4", "int8")

_TREE_NODES_SHOWN = 32
_TOKENS_PER_STEP = ("tokens_per_step", "held_out_acceptance_length_32")  # the trainer's names for it, best first
_RANKS_SHOWN = (1, 5, 10)


@click.group()
def heads() -> None:
    """List, show, verify, publish, import and export draft heads."""


@heads.command("list")
@click.argument("store", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def list_heads(store: str | None, as_json: bool) -> None:
    """List the heads in STORE, a folder or URL. Default: the store in the cache, and the heads that come along."""
    import_engine()
    from gorgon_engine.cache import cache_dir
    from gorgon_engine.heads.store import bundled_store, list_versions

    if store is not None:
        places = [store]
    else:
        own = cache_dir() / "heads"
        places = [str(place) for place in (own if own.is_dir() else None, bundled_store()) if place is not None]
    found = [published for place in places for published in list_versions(place)]
    if as_json:
        click.echo(json.dumps([_listed(published) for published in found], indent=2))
    elif found:
        rows = [("BACKBONE", "HEADS", "FAMILY", "NUMBER", "SIZE", "TOKENS/STEP", "")]
        _echo_table(rows + [_row(published) for published in found])
    else:
        click.echo(f"gorgon: no heads in {store or 'the store of the cache'}", err=True)


@heads.command()
@click.argument("place", metavar="PATH|URL")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest.")
def show(place: str, as_json: bool) -> None:
    """Show what a checkpoint is: a folder, a backbone's folder in a store, or a URL of either."""
    import_engine()
    from gorgon_engine.heads.checkpoint import read_manifest
    from gorgon_engine.heads.store import local_heads

    manifest = read_manifest(local_heads(place))
    if as_json:
        click.echo(manifest.to_json(), nl=False)
        return
    for line in _described(manifest):
        click.echo(_printable(line))


@heads.command()
@click.argument("place", metavar="PATH|URL")
@click.option("--model", metavar="PATH|NAME", help="Check that they fit this model too.")
def verify(place: str, model: str | None) -> None:
    """Check a checkpoint: checksums, tensors, and with --model that they are this model's."""
    import_engine()
    import torch

    from gorgon_engine.heads.checkpoint import load_heads, verify_heads
    from gorgon_engine.heads.store import local_heads

    folder = local_heads(place)
    manifest = verify_heads(folder)
    fitting = ""
    if model is not None:
        backbone = _backbone(model)
        load_heads(
            folder,
            backbone_identity=backbone.reference.identity,
            config=backbone.config,
            quantization=manifest.quantization,
            device=torch.device("cpu"),
            dtype=getattr(torch, manifest.dtype),
        )
        fitting = f", fit {backbone.name}"
    num_files = len(manifest.files)
    files = f"{num_files} file{'s' if num_files > 1 else ''}, {_size(_num_bytes(manifest))}"
    click.echo(f"ok: {manifest.name}@{manifest.version}: {files}{fitting}")


@heads.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--store", required=True, metavar="PATH|URL", help="Folder, or any URL that fsspec knows.")
@click.option("--backbone", metavar="NAME", help="Folder of the backbone in the store. Default: made of its name.")
@click.option("--version", metavar="VERSION|next", help="Publish under this version instead of the checkpoint's own.")
@click.option("--no-latest", is_flag=True, help="Leave `latest`, which engines follow, as it is.")
def publish(path: Path, store: str, backbone: str | None, version: str | None, no_latest: bool) -> None:
    """Copy the checkpoint in PATH into a store, point `latest` at it, and print its place."""
    import_engine()
    from gorgon_trainer.publish import publish as publish_heads

    click.echo(publish_heads(path, store, backbone, version=version, move_latest=not no_latest))


@heads.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", required=True, metavar="PATH|NAME", help="The model that they were trained on.")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(IMPORT_FORMATS),
    default="auto",
    show_default=True,
    help="Layout of SOURCE.",
)
@click.option("--name", help="Default: made of SOURCE's name.")
@click.option("--version", default="1", show_default=True)
@click.option(
    "--quantization",
    type=click.Choice(QUANTIZATIONS),
    default="none",
    show_default=True,
    help="Of the model when they were trained, which SOURCE does not say.",
)
def import_heads(
    source: Path, out: Path, model: str, format_name: str, name: str | None, version: str, quantization: Any
) -> None:
    """Make a checkpoint OUT of the heads that another project's folder SOURCE holds."""
    import_engine()
    from gorgon_engine.heads.store import backbone_folder
    from gorgon_trainer.interop.convert import ImportFormat
    from gorgon_trainer.interop.convert import import_heads as convert

    result = convert(
        source,
        out,
        backbone=_backbone(model),
        name=backbone_folder(source.resolve().name)[:64] if name is None else name,
        version=version,
        format=ImportFormat(format_name),
        quantization=quantization,
    )
    _echo_notices(result.notices)
    manifest = result.manifest
    click.echo(f"{out}: {manifest.num_heads} {manifest.family} heads from the layout {result.format}")


@heads.command("export")
@click.argument("checkpoint", metavar="PATH|URL")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--format", "format_name", type=click.Choice(EXPORT_FORMATS), required=True, help="Layout of OUT.")
@click.option("--model", metavar="PATH|NAME", help="Needed where OUT holds projections that the heads share.")
def export_heads(checkpoint: str, out: Path, format_name: str, model: str | None) -> None:
    """Write the heads of a checkpoint as OUT, a folder for other projects."""
    import_engine()
    from gorgon_engine.heads.store import local_heads
    from gorgon_trainer.interop.convert import ExportFormat
    from gorgon_trainer.interop.convert import export_heads as convert

    backbone = None if model is None else _backbone(model)
    _echo_notices(convert(local_heads(checkpoint), out, format=ExportFormat(format_name), backbone=backbone))
    click.echo(out)


def _backbone(model: str) -> "Backbone":
    from gorgon_engine.models.catalog import CATALOG, resolve_model
    from gorgon_protocol.errors import BadRequestError
    from gorgon_trainer.interop.foreign import Backbone

    if not model:  # an unset shell variable must not quietly mean the default model
        raise BadRequestError("--model is empty: give a path or a name")
    folder = resolve_model(model)
    if model in CATALOG:
        return Backbone(folder, CATALOG[model].title)
    return Backbone(folder, folder.resolve().name if Path(model).expanduser().is_dir() else model)


def _described(manifest: "HeadsManifest") -> Iterator[str]:
    """The manifest for people, line by line."""
    for name, value in _facts(manifest):
        yield f"{name:<18}{value}"
    training = manifest.training
    if training is not None:
        yield f"{'training data':<18}{training.data}"
        if training.created is not None:
            yield f"{'created':<18}{training.created.isoformat()}"
        for title, values in (("settings", training.settings), ("figures", training.figures)):
            for index, (key, number) in enumerate(values.items()):
                yield f"{title if index == 0 else '':<18}{key} = {_number(number)}"
    yield from _accuracy_lines(manifest)
    yield from _tree_lines(manifest)


def _facts(manifest: "HeadsManifest") -> Iterator[tuple[str, str]]:
    yield "heads", f"{manifest.name}@{manifest.version}"
    yield "backbone", f"{manifest.backbone.name} ({manifest.backbone.identity[:12]}), in {manifest.quantization}"
    yield "family", manifest.family
    yield "offsets", " ".join(map(str, manifest.offsets))
    if manifest.layer is not None:
        parts = f"one decoder layer for {manifest.num_heads} depths"
    else:
        parts = f"{manifest.num_heads} heads of {manifest.num_blocks} block{'s' if manifest.num_blocks > 1 else ''}"
    yield "shape", f"{parts}, hidden size {manifest.hidden_size}, {manifest.dtype}"
    projection = f"{manifest.projection}, {manifest.num_draft_tokens} of {manifest.vocab_size} tokens"
    yield "projection", projection + (", with bias" if manifest.projection_bias else "")
    if manifest.family == "hydra":
        yield "inputs", f"{'normalised' if manifest.normalised else 'as they are'}, residual {manifest.residual}"
    if manifest.layer is not None:
        layer = manifest.layer
        yield "attention", f"{layer.num_query_heads} query heads on {layer.num_kv_heads} KV heads of {layer.head_dim}"
        yield "MLP", f"SwiGLU of {layer.intermediate_size}"
    yield "parameters", f"{_num_parameters(manifest):,}"
    for index, (name, record) in enumerate(manifest.files.items()):
        yield "files" if index == 0 else "", f"{name} ({_size(record.size)})"


def _accuracy_lines(manifest: "HeadsManifest") -> Iterator[str]:
    if manifest.accuracies is None:
        return
    ranks = [rank for rank in _RANKS_SHOWN if rank <= len(manifest.accuracies[0])]
    yield "accuracy".ljust(18) + "".join(f"{f'top-{rank}':>8}" for rank in ranks)
    for offset, row in zip(manifest.offsets, manifest.accuracies, strict=True):
        yield f"  offset {offset}".ljust(18) + "".join(f"{sum(row[:rank]):>8.3f}" for rank in ranks)


def _tree_lines(manifest: "HeadsManifest") -> Iterator[str]:
    """The best nodes of the recommended tree, children indented below their parent, ranks from 0."""
    paths = manifest.recommended_tree
    if not paths:
        return
    shown = sorted(paths[:_TREE_NODES_SHOWN])  # parents first, siblings by rank
    more = "" if len(paths) <= len(shown) else f", the best {len(shown)} shown"
    yield f"{'recommended tree':<18}{len(paths)} nodes, depth {max(map(len, paths))}{more}; ranks:"
    for path in shown:
        yield "  " * len(path) + str(path[-1])


def _listed(published: "PublishedHeads") -> dict[str, Any]:
    manifest = published.manifest
    entry: dict[str, Any] = {
        "backbone": published.backbone,
        "version": published.version,
        "place": published.place,
        "is_latest": published.is_latest,
    }
    if manifest is None:
        return entry | {"fault": published.fault}
    return entry | {
        "family": manifest.family,
        "num_heads": manifest.num_heads,
        "size": _num_bytes(manifest),
        "tokens_per_step": _tokens_per_step(manifest),
    }


def _row(published: "PublishedHeads") -> tuple[str, ...]:
    manifest, mark = published.manifest, "latest" if published.is_latest else ""
    if manifest is None:
        return (
            published.backbone,
            published.version,
            "-",
            "-",
            "-",
            "-",
            f"{mark} unreadable: {published.fault}".strip(),
        )
    rate = _tokens_per_step(manifest)
    return (
        published.backbone,
        published.version,
        manifest.family,
        str(manifest.num_heads),
        _size(_num_bytes(manifest)),
        "-" if rate is None else f"{rate:.2f}",
        mark,
    )


def _tokens_per_step(manifest: "HeadsManifest") -> float | None:
    """On held-out text, measured or else predicted from the heads' accuracies."""
    figures = manifest.training.figures if manifest.training is not None else {}
    return next((figures[name] for name in _TOKENS_PER_STEP if name in figures), None)


def _num_bytes(manifest: "HeadsManifest") -> int:
    return sum(record.size for record in manifest.files.values())


def _num_parameters(manifest: "HeadsManifest") -> int:
    from math import prod

    from gorgon_engine.heads.families import expected_shapes

    return sum(prod(shape) for shape in expected_shapes(manifest).values())


def _size(num_bytes: int) -> str:
    if num_bytes < 1000:
        return f"{num_bytes} B"
    value = num_bytes / 1000
    for unit in ("kB", "MB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def _number(value: bool | int | float | str) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _echo_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(_printable("  ".join(cells).rstrip()))


def _echo_notices(notices: tuple[str, ...]) -> None:
    for notice in notices:
        click.echo(f"gorgon: {_printable(notice)}", err=True)


def _printable(text: str) -> str:
    """One line that cannot control a terminal: what a foreign manifest says may hold escape sequences."""
    return "".join(c if unicodedata.category(c) != "Cc" else " " for c in text)
