"""Where the `gorgon` command begins. Nothing is imported out here: a Ctrl-C may come during the imports too."""

import sys

EXIT_INTERRUPTED = 130


def main() -> None:
    """Entry point of the installed command; exits the process."""
    try:
        from gorgon_cli.main import main as command

        command()
    except KeyboardInterrupt:  # before the command could say so itself
        say_interrupted()
        sys.exit(EXIT_INTERRUPTED)


def say_interrupted() -> None:
    """The one line, on standard error."""
    if sys.stderr is None:  # closed before we began
        return
    if sys.stderr.isatty():
        sys.stderr.write("\n")  # the terminal has shown ^C
    sys.stderr.write("gorgon: interrupted\n")
    sys.stderr.flush()
