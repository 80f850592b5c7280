"""How far a start has come: one line that is drawn over on a terminal, a line a stage anywhere else."""

import os
import shutil
import sys
from typing import Final

import click

_BAR_WIDTH: Final = 24


class Progress:
    """On standard error. `show` as often as you like; only what changed is written."""

    def __init__(self) -> None:
        terminal = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._draws = terminal
        self._shown = ""

    def show(self, stage: str, share: float | None = None) -> None:
        """`share` of the stage that is done, 0..1; None where nobody knows."""
        if self._draws:
            line = stage if share is None else f"{_bar(share)} {share:4.0%} {stage}"
            line = line[: shutil.get_terminal_size().columns - 1]  # a wrapped line cannot be drawn over
        else:
            line = f"gorgon: {stage}"
        if line == self._shown:
            return
        self._shown = line
        click.echo(f"\r\x1b[K{line}" if self._draws else line, err=True, nl=not self._draws, color=True)

    def clear(self) -> None:
        """Leave an empty line for what comes next."""
        if self._draws and self._shown:
            click.echo("\r\x1b[K", err=True, nl=False, color=True)
        self._shown = ""


def _bar(share: float) -> str:
    filled = round(min(max(share, 0.0), 1.0) * _BAR_WIDTH)
    return "█" * filled + "░" * (_BAR_WIDTH - filled)
