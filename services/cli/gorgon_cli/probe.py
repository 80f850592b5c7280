"""`gorgon probe`: what every draft head guesses after a prompt."""

import json
import os
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from gorgon_cli.generate import decode_utf8
from gorgon_cli.loading import load_engine
from gorgon_cli.options import EngineArguments, engine_options
from gorgon_protocol.errors import BadRequestError

if TYPE_CHECKING:
    from gorgon_engine.engine import Engine
    from gorgon_engine.heads.checkpoint import LoadedHeads
    from gorgon_engine.probe import HeadProbe
    from gorgon_engine.tokenizer import Tokenizer

# Of the options that commands share; the rest chooses how drafts are made and verified, which does not happen here.
_ENGINE_OPTIONS = ("model", "heads", "quantization", "dtype", "device", "kernels", "threads")


def _hide_other_options(command: click.Command) -> click.Command:
    for option in command.params:
        shared = option.name in EngineArguments.__dataclass_fields__
        if shared and isinstance(option, click.Option) and option.name not in _ENGINE_OPTIONS:
            option.hidden = True
    return command


@_hide_other_options
@click.command()
@click.argument("prompt")
@click.option("--top", type=click.IntRange(min=1), default=3, show_default=True, metavar="N", help="Guesses a head.")
@click.option("--chat", "as_chat", is_flag=True, help="Put the prompt to the model as a user's message.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@engine_options
def probe(prompt: str, top: int, as_chat: bool, as_json: bool, engine_arguments: EngineArguments) -> None:
    """Show the likeliest tokens of every draft head after PROMPT.

    Offset 1 is the very next token, which the backbone's own lm_head gives where no head does. Heads that see the
    drafted tokens follow their own likeliest ones.
    """
    from gorgon_engine.probe import probe as probe_heads

    _refuse_hidden_options()
    text = decode_utf8(os.fsencode(prompt), "PROMPT")
    heads = _heads_folder(engine_arguments)
    # The plainest engine: it reads the model as serving does, without measuring the machine or drafting.
    engine = load_engine(replace(engine_arguments, heads=None, drafter="none", fixed_tree=True))
    loaded = _load_heads(engine, heads)
    tokenizer = engine.tokenizer
    tokens = tokenizer.encode_chat([{"role": "user", "content": text}]) if as_chat else tokenizer.encode(text)
    probes = probe_heads(engine.backbone, loaded, tokens, top)
    if as_json:
        click.echo(json.dumps({"heads": [_as_json(tokenizer, probe) for probe in probes]}, ensure_ascii=False))
    else:
        click.echo(_table(tokenizer, probes))


def _refuse_hidden_options() -> None:
    """As unknown ones: an option that changes nothing must not be taken."""
    context = click.get_current_context()
    for option in context.command.params:
        hidden = isinstance(option, click.Option) and option.hidden
        if hidden and context.get_parameter_source(str(option.name)) is not ParameterSource.DEFAULT:
            raise click.NoSuchOption(option.opts[0], ctx=context)


def _heads_folder(arguments: EngineArguments) -> Path | None:
    """The checkpoint that was asked for, found before the model is read; None for the one of the program.

    Raises `GorgonError` subclasses.
    """
    from gorgon_engine.heads.checkpoint import resolve_heads

    if arguments.heads == "none":
        raise BadRequestError("--heads none leaves nothing to probe: give a checkpoint folder, or leave it out")
    heads = arguments.config().heads
    return None if heads is None else resolve_heads(heads)


def _load_heads(engine: "Engine", heads: Path | None) -> "LoadedHeads":
    from gorgon_engine.drafters.select import load_heads_for
    from gorgon_engine.heads.bundled import bundled_heads
    from gorgon_engine.models.catalog import resolve_model

    model = engine.config.model
    folder = resolve_model(model)
    checkpoint = heads or bundled_heads(folder, engine.backbone.config)
    if checkpoint is None:
        raise BadRequestError(f"no trained heads come with the program for {model}: give their folder with --heads")
    loaded = load_heads_for(engine.backbone, folder, checkpoint)
    for notice in loaded.notices if heads is not None else ():  # nobody chose those of the program
        click.echo(f"gorgon: {notice}", err=True)
    return loaded


def _as_json(tokenizer: "Tokenizer", probe: "HeadProbe") -> dict[str, Any]:
    return {
        "head": probe.head,
        "offset": probe.offset,
        "source": probe.source,
        "top": [
            {
                "text": tokenizer.token_text(guess.token_id),
                "token_id": guess.token_id,
                "probability": guess.probability,
            }
            for guess in probe.top
        ],
    }


def _table(tokenizer: "Tokenizer", probes: list["HeadProbe"]) -> str:
    """A line a head, its guesses in columns as wide as their longest token."""
    num_columns = max(len(probe.top) for probe in probes)
    columns = [
        [_quoted(tokenizer.token_text(probe.top[rank].token_id)) if rank < len(probe.top) else "" for probe in probes]
        for rank in range(num_columns)
    ]
    widths = [max(map(_width, column)) for column in columns]
    lines = ["head  offset  source   " + "".join(f"{_ordinal(r):<{w + 11}}" for r, w in enumerate(widths, start=1))]
    for row, probe in enumerate(probes):
        line = f"{probe.head:4}  {probe.offset:6}  {probe.source:7}  "
        for rank, guess in enumerate(probe.top):
            token = columns[rank][row]
            line += f"{token}{' ' * (widths[rank] - _width(token))} {guess.probability:6.1%}    "
        lines.append(line)
    return "\n".join(line.rstrip() for line in lines)


def _quoted(text: str) -> str:
    """A token between quotation marks, with everything that would not show, or act on a terminal, escaped."""
    shown = ""
    for character in json.dumps(text, ensure_ascii=False):
        hidden = unicodedata.category(character)[0] in "CZ" and character != " "
        shown += character.encode("unicode_escape").decode() if hidden else character
    return shown


def _width(text: str) -> int:
    """Terminal columns: East Asian wide characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _ordinal(rank: int) -> str:
    suffix = "th" if rank % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(rank % 10, "th")
    return f"{rank}{suffix}"
