"""Where the `gorgon` command begins. Nothing is imported out here: Ctrl-C may come during the imports too."""

import sys

EXIT_INTERRUPTED = 130


def main() -> None:
    """Entry point of the installed command; exits the process."""
    try:
        from gorgon_cli.main import main as command

        command()
    except KeyboardInterrupt:  # before the command could say so itself
        exit_interrupted()


def exit_interrupted() -> None:
    """One line on standard error, and exit status 130. Raises `SystemExit`."""
    if sys.stderr is not None:  # None: closed before we began
        if sys.stderr.isatty():
            sys.stderr.write("\n")  # the terminal has shown ^C
        sys.stderr.write("gorgon: interrupted\n")
        sys.stderr.flush()
    # An interrupt that came through the `exec` of a string (each dataclass is made by one) leaves a mark in the
    # interpreter, by which `python -m` ends with SIGINT whatever the exit status. The next one takes it away.
    exec("")
    sys.exit(EXIT_INTERRUPTED)
