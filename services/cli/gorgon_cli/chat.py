"""`gorgon chat`: a conversation in the terminal."""

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from gorgon_cli.entry import EXIT_INTERRUPTED
from gorgon_cli.loading import load_engine
from gorgon_cli.options import EngineArguments, engine_options, sampling_options, speculation_options
from gorgon_protocol.errors import BadRequestError, ContextLengthError

if TYPE_CHECKING:
    from gorgon_engine.sampling import SamplingParams
    from gorgon_engine.sequence import SpeculationParams

_HINT = "Type a message; /new starts over, /quit or Ctrl-D ends."


@click.command()
@click.option("--system", metavar="TEXT", help="A system message to begin with.")
@engine_options
@sampling_options
@speculation_options
def chat(
    system: str | None, engine_arguments: EngineArguments, sampling: "SamplingParams", speculation: "SpeculationParams"
) -> int:
    """Talk with the model.

    Accepted drafts are green and underlined. Ctrl-C ends an answer, Ctrl-D or /quit ends the conversation, /new starts
    another one.
    """
    from gorgon_cli import terminal

    engine = load_engine(engine_arguments)
    if not engine.tokenizer.has_chat_template:
        raise BadRequestError(f"{engine_arguments.model}: the model has no chat template: use `gorgon generate`")
    opening = [{"role": "system", "content": system}] if system else []
    history = list(opening)
    interactive = terminal.is_terminal(sys.stdin) and terminal.is_terminal(sys.stdout)
    if interactive:
        terminal.note(_HINT)
    lines = _typed_lines() if interactive else _piped_lines()
    for said in lines:
        if said == "/quit":
            break
        if said == "/new":
            history = list(opening)
            terminal.note("A new conversation.")
            continue
        if said.startswith("/") and " " not in said:
            terminal.note(f"No such command: {said}. {_HINT}")
            continue
        question = [*history, {"role": "user", "content": said}]
        try:
            request = engine.request(question, sampling, speculation)
        except ContextLengthError as error:
            click.echo(f"gorgon: {error} (/new starts over)", err=True)
            continue
        generation = terminal.run(engine, request, show=True)
        terminal.note(terminal.summary(engine, generation))
        if generation.cancelled and not interactive:
            return EXIT_INTERRUPTED
        if generation.text:  # interrupted before its first word: as if it had not been asked
            history = [*question, {"role": "assistant", "content": generation.text}]
    return 0


def _typed_lines() -> Iterator[str]:
    """What a person types, stripped, without empty lines; ends at Ctrl-D, and at the second Ctrl-C in a row."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives `input` the arrow keys and a history)
    interrupted = False
    while True:
        try:
            said = input("> ").strip()
        except UnicodeDecodeError:
            click.echo("gorgon: that was not UTF-8 text", err=True)
            continue
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo()
            if interrupted:
                raise
            interrupted = True
            click.echo("Ctrl-D or /quit ends the conversation.", err=True)
            continue
        interrupted = False
        if said:
            yield said


def _piped_lines() -> Iterator[str]:
    """The messages of a script, one a line. Raises `BadRequestError` for what is not text."""
    if sys.stdin is None:
        raise BadRequestError("standard input is closed: the messages are read from it")
    try:
        for line in sys.stdin:
            if line.strip():
                yield line.strip()
    except UnicodeDecodeError:
        raise BadRequestError("standard input is not UTF-8 text: convert it first") from None
