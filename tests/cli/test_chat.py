"""`gorgon chat`: a conversation through a pipe."""

import subprocess
import sys
from pathlib import Path

from cli.conftest import Gorgon


def talk(model: Path, said: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "gorgon_cli", "chat", "--model", str(model), "--max-tokens", "12", "--context", "300"],
        input=said, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_conversation_ends_at_the_end_of_input(tiny: Path) -> None:
    done = talk(tiny, "the cat\n\n/new\non the mat\n/quit\nnever read\n")
    assert done.returncode == 0
    assert "> " not in done.stdout  # the prompt is for people
    assert done.stderr.count("native-int8") == 2


def test_a_conversation_that_outgrows_the_context_says_so(tiny: Path) -> None:
    done = talk(tiny, "the cat " * 200 + "\nthe mat\n")
    assert done.returncode == 0
    assert "the context holds 300" in done.stderr
    assert done.stderr.count("native-int8") == 1


def test_help_is_quick_and_names_every_command(gorgon: Gorgon) -> None:
    status, out, _ = gorgon("--help")
    assert status == 0
    assert all(name in out for name in ("generate", "chat", "models", "bench"))
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "gorgon_cli", "--help"], capture_output=True, text=True, check=True
    )
    assert "torch" not in loaded.stderr
