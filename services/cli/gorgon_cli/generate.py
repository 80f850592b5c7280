"""`gorgon generate`: one answer, streamed."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gorgon_cli.entry import EXIT_INTERRUPTED
from gorgon_cli.loading import load_engine
from gorgon_cli.options import EngineArguments, engine_options, sampling_options, speculation_options
from gorgon_protocol.errors import BadRequestError

if TYPE_CHECKING:
    from gorgon_engine.sampling import SamplingParams
    from gorgon_engine.sequence import SpeculationParams


@click.command()
@click.option(
    "--prompt", metavar="TEXT|-", help="Text to continue; - reads it from standard input, without its last newline."
)
@click.option("--messages", type=click.Path(path_type=Path), metavar="FILE",
              help='Chat: a JSON list of {"role", "content"}.')  # fmt: skip
@click.option("--chat", "as_chat", is_flag=True, help="Put the prompt to the model as a user's message.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of streaming.")
@engine_options
@sampling_options
@speculation_options
def generate(
    prompt: str | None,
    messages: Path | None,
    as_chat: bool,
    as_json: bool,
    engine_arguments: EngineArguments,
    sampling: "SamplingParams",
    speculation: "SpeculationParams",
) -> int:
    """Generate one answer.

    On a terminal the accepted drafts are green and underlined. The figures go to standard error.
    """
    if (prompt is None) == (messages is None):
        raise click.UsageError("give one of --prompt and --messages")
    question: str | list[dict[str, str]]
    question = _read_text(prompt) if prompt is not None else read_messages(messages)
    if as_chat and isinstance(question, str):
        question = [{"role": "user", "content": question}]
    from gorgon_cli import terminal

    engine = load_engine(engine_arguments)
    request = engine.request(question, sampling, speculation)
    generation = terminal.run(engine, request, show=not as_json)
    if as_json:
        click.echo(json.dumps(terminal.as_json(engine, generation), ensure_ascii=False))
    else:
        terminal.note(terminal.summary(engine, generation))
    return EXIT_INTERRUPTED if generation.cancelled else 0


def _read_text(prompt: str) -> str:
    if prompt != "-":
        # The shell's bytes as Python keeps them where they are not text.
        return decode_utf8(os.fsencode(prompt), "--prompt")
    if sys.stdin is None:
        raise BadRequestError("standard input is closed: --prompt - reads the text from it")
    # `echo` and editors end a text with a newline that is not meant to be continued.
    return decode_utf8(sys.stdin.buffer.read(), "standard input").removesuffix("\n")


def decode_utf8(data: bytes, name: str) -> str:
    """Text of bytes. Raises `BadRequestError` naming the source and the offending byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequestError(
            f"{name} is not UTF-8 text (byte 0x{data[error.start]:02x} at offset {error.start}): convert it first"
        ) from None


def read_messages(path: Path | None) -> list[dict[str, str]]:
    """The chat of a JSON file. Raises `BadRequestError` for what is not a list of messages."""
    assert path is not None
    text = decode_utf8(path.read_bytes(), str(path))
    try:
        messages: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRequestError(f"{path} is not JSON: {error}") from None
    if isinstance(messages, dict):
        messages = messages.get("messages")
    if not isinstance(messages, list) or not messages or not all(_is_message(m) for m in messages):
        raise BadRequestError(f'{path} must hold a list of {{"role": ..., "content": ...}} objects')
    return messages


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))
