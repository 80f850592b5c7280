"""Ctrl-C: at any moment, with what was produced, and exit status 130."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cli.conftest import Gorgon
from cli.pseudo_terminal import PseudoTerminal, interruptible

from gorgon_cli.terminal import printable

ENDLESS = ("--max-tokens", 100_000, "--ignore-eos", "--context", 60_000)


@pytest.fixture(scope="module")
def long(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with room for answers that last longer than a test."""
    folder = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("long") / "long"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100_000}))
    return folder


def interrupt_when_generating(seconds: float) -> threading.Thread:
    """Sends SIGINT to this process some time after the command has taken it over, which it does to generate."""
    handler = signal.getsignal(signal.SIGINT)

    def wait_and_send() -> None:
        while signal.getsignal(signal.SIGINT) is handler:
            time.sleep(0.005)
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait_and_send, daemon=True)
    thread.start()
    return thread


def test_an_interrupted_answer_is_a_whole_object(gorgon: Gorgon, long: Path) -> None:
    with interruptible():
        sender = interrupt_when_generating(0.5)
        status, out, _ = gorgon("generate", "--model", long, "--prompt", "the cat", *ENDLESS, "--json")
        sender.join()
    report = json.loads(out)
    assert (status, report["finish_reason"]) == (130, "cancelled")
    assert report["usage"]["completion_tokens"] == len(report["token_ids"]) > 1


def test_an_interrupted_prefill_has_produced_nothing(gorgon: Gorgon, long: Path, tmp_path: Path) -> None:
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps([{"role": "user", "content": "the cat " * 20_000}]))
    with interruptible():
        sender = interrupt_when_generating(0.05)
        status, out, _ = gorgon("generate", "--model", long, "--messages", chat, *ENDLESS, "--json")
        sender.join()
    report = json.loads(out)
    assert (status, report["finish_reason"], report["text"]) == (130, "cancelled", "")
    assert report["usage"]["completion_tokens"] == 0


def test_an_interrupted_stream_ends_with_its_figures(long: Path) -> None:
    with interruptible():
        process = subprocess.Popen(
            [sys.executable, "-m", "gorgon_cli", "generate", "--model", str(long), "--prompt", "the cat",
             *map(str, ENDLESS)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(1)  # streamed: it comes long before the end
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.endswith(b"\n")
    (line,) = err.decode().splitlines()
    assert "tokens/s" in line
    assert line.endswith("interrupted")


@pytest.mark.parametrize("seconds", [0.4, 1.0, 1.6])
def test_an_interrupted_start_is_one_line(long: Path, seconds: float) -> None:
    with interruptible():
        process = subprocess.Popen(
            [sys.executable, "-m", "gorgon_cli", "generate", "--model", str(long), "--prompt", "a", "--json",
             *map(str, ENDLESS)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    # Fast machines generate by then.
    assert err == b"gorgon: interrupted\n" or json.loads(out)["finish_reason"] == "cancelled"


def test_a_conversation_survives_an_interrupted_answer(gorgon: Gorgon, long: Path) -> None:
    alone = subprocess.run(
        [sys.executable, "-m", "gorgon_cli", "chat", "--model", str(long), "--max-tokens", "30", "--ignore-eos"],
        input="on the mat\n", capture_output=True, text=True, timeout=60, check=True,
    ).stdout.strip("\n")  # fmt: skip
    with PseudoTerminal("chat", "--model", long, *ENDLESS, NO_COLOR="1") as terminal:
        terminal.read_until("> ")

        def ask(text: str) -> str:
            terminal.type(f"{text}\n")
            terminal.read_until(f"{text}\n")
            time.sleep(0.5)
            terminal.type("\x03")
            answer = terminal.read_until("interrupted\n").strip("\n")
            terminal.read_until("> ")
            return answer

        expected = printable(alone).strip("\n")[:20]
        assert ask("the cat")
        assert not ask("on the mat").startswith(expected)  # it follows on the cat
        terminal.type("/new\n")
        terminal.read_until("> ")
        assert ask("on the mat").startswith(expected)
        terminal.type("\x04")
        assert terminal.read_to_end()[0] == 0


def test_ctrl_c_at_the_prompt_says_how_to_leave_and_then_leaves(tiny: Path) -> None:
    with PseudoTerminal("chat", "--model", tiny) as terminal:
        terminal.read_until("> ")
        time.sleep(0.3)  # until the line editor waits for keys
        terminal.type("half a mess\x03")
        terminal.read_until("Ctrl-D or /quit ends the conversation.\n> ")
        time.sleep(0.3)
        terminal.type("\x03")
        status, shown = terminal.read_to_end()
        assert status == 130
        assert "gorgon: interrupted" in shown
