"""The `gorgon` command: one line for every error, never a traceback for what is not our bug."""

import os
import sys
from importlib import import_module
from typing import Any

import click

from gorgon_cli.entry import exit_interrupted
from gorgon_protocol.errors import GorgonError

# Command -> module:attribute and a line of help. Imported when the command runs: torch takes a second that `--help`
# need not wait for.
_COMMANDS = {
    "up": ("gorgon_cli.up:up", "Serve the model: page, REST, WebSocket and OpenAI API."),
    "generate": ("gorgon_cli.generate:generate", "Generate one answer."),
    "chat": ("gorgon_cli.chat:chat", "Talk with the model in the terminal."),
    "models": ("gorgon_cli.models:models", "Fetch and list the models that come by package."),
    "heads": ("gorgon_cli.heads:heads", "List, show, verify, publish, import and export draft heads."),
    "probe": ("gorgon_cli.probe:probe", "Show what every draft head guesses after a prompt."),
    "train": ("gorgon_cli.train:train", "Train draft heads for a model."),
    "bench": ("gorgon_cli.bench:bench", "Compare plain and speculative decoding on this machine."),
}

EXIT_ERROR = 1
EXIT_USAGE = 2


class _InterruptedError(Exception):
    """Ctrl-C."""


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[cmd_name][0].split(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # before click, which would begin a line of its own
            raise _InterruptedError from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gorgon", prog_name="gorgon")
def cli() -> None:
    """Lossless tree-speculative inference for 4-bit language models."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command with the given arguments, None = those of the process; exits the process."""
    try:
        sys.exit(cli.main(args=arguments, prog_name="gorgon", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(EXIT_USAGE)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "gorgon"
        _complain(f"{error.format_message().rstrip('.')} (see `{command} --help`)")
        sys.exit(EXIT_USAGE)
    except click.ClickException as error:
        _complain(error.format_message())
        sys.exit(EXIT_ERROR)
    except GorgonError as error:
        _complain(str(error))
        sys.exit(EXIT_ERROR)
    except (_InterruptedError, KeyboardInterrupt):
        exit_interrupted()
    except BrokenPipeError:
        # The reader (`head`) went away, which is no error.
        _drop_output()
        sys.exit(EXIT_ERROR)
    except OSError as error:
        # The machine's trouble, not ours: a full disk, a file that may not be read. Streams have no file name.
        _drop_output()
        _complain(f"{error.filename or 'writing the output'}: {error.strerror or error}")
        sys.exit(EXIT_ERROR)


def _complain(message: str) -> None:
    click.echo("gorgon: " + " ".join(line.strip() for line in message.splitlines()), err=True)


def _drop_output() -> None:
    """What could not be written must not be tried again, and complained about, when the interpreter exits."""
    if sys.stdout is not None:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
