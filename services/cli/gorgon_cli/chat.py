"""`gorgon chat`: a conversation in the terminal."""

import click

from gorgon_cli import terminal
from gorgon_cli.options import EngineArguments, engine_options, load_engine, sampling_options, speculation_options
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.sequence import SpeculationParams
from gorgon_protocol.errors import BadRequestError, ContextLengthError


@click.command()
@click.option("--system", metavar="TEXT", help="A system message to begin with.")
@engine_options
@sampling_options
@speculation_options
def chat(
    system: str | None, engine_arguments: EngineArguments, sampling: SamplingParams, speculation: SpeculationParams
) -> int:
    """Talk with the model.

    Accepted drafts are green and underlined. Ctrl-C ends an answer, Ctrl-D or /quit ends the conversation, /new starts
    another one.
    """
    engine = load_engine(engine_arguments)
    opening = [{"role": "system", "content": system}] if system else []
    history = list(opening)
    click.echo("Type a message; /new starts over, /quit or Ctrl-D ends.", err=True)
    while True:
        try:
            said = input("> ")
        except UnicodeDecodeError:
            raise BadRequestError("standard input is not UTF-8 text: convert it first") from None
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return 0
        if said.strip() == "/quit":
            return 0
        if said.strip() == "/new":
            history = list(opening)
            continue
        if not said.strip():
            continue
        question = [*history, {"role": "user", "content": said}]
        try:
            request = engine.request(question, sampling, speculation)
        except ContextLengthError as error:
            click.echo(f"gorgon: {error} (/new starts over)", err=True)
            continue
        generation = terminal.run(engine, request, show=True)
        click.echo(click.style(terminal.summary(engine, generation), dim=True), err=True)
        history = [*question, {"role": "assistant", "content": generation.text}]
