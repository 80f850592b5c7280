"""`gorgon generate` as a person or a script calls it."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from cli.conftest import Gorgon

from gorgon_cli.terminal import printable

SHORT = ("--max-tokens", 12, "--context", 200)


def test_text_goes_to_stdout_and_figures_to_stderr(gorgon: Gorgon, tiny: Path) -> None:
    status, out, err = gorgon("generate", "--model", tiny, "--prompt", "the cat", *SHORT)
    assert status == 0
    assert out.endswith("\n")
    assert "\x1b" not in out
    assert "tokens/s" in err
    assert "x plain decoding" in err


def test_json_is_one_object_with_consistent_figures(gorgon: Gorgon, tiny: Path) -> None:
    status, out, _ = gorgon(
        "generate", "--model", tiny, "--prompt", "the cat sat on the cat sat on the", *SHORT, "--json",
        "--ignore-eos", "--logprobs", 2,
    )  # fmt: skip
    report = json.loads(out)
    assert status == 0
    assert report["finish_reason"] == "length"
    assert report["usage"]["completion_tokens"] == len(report["token_ids"]) == 12
    assert report["usage"]["total_tokens"] == report["usage"]["prompt_tokens"] + 12
    metrics = report["metrics"]["speculative_decoding"]
    histogram = metrics["acceptance_histogram"]
    assert sum(histogram) == metrics["num_spec_steps"]
    assert sum(i * n for i, n in enumerate(histogram)) == metrics["num_accepted_draft_tokens"]
    assert 1 + metrics["num_spec_steps"] + metrics["num_accepted_draft_tokens"] == 12
    assert metrics["mean_acceptance_length"] == pytest.approx(11 / metrics["num_spec_steps"])
    assert report["speedup"] == pytest.approx(report["tokens_per_second"] / report["plain_tokens_per_second"])
    assert [entry["token_id"] for entry in report["logprobs"]] == report["token_ids"]
    assert all(len(entry["top"]) == 2 for entry in report["logprobs"])


@pytest.mark.parametrize("sampling", [(), ("--temperature", 0.9, "--top-p", 0.95, "--seed", 4)])
def test_speculation_changes_nothing_but_time(gorgon: Gorgon, tiny: Path, sampling: tuple[object, ...]) -> None:
    outputs = []
    for drafter in ("none", "ngram"):
        _, out, _ = gorgon(
            "generate", "--model", tiny, "--prompt", "on the mat the cat sat on the mat", "--max-tokens", 40,
            "--ignore-eos", "--drafter", drafter, "--fixed-tree", "--json", *sampling,
        )  # fmt: skip
        outputs.append(json.loads(out)["token_ids"])
    assert outputs[0] == outputs[1]


def test_a_model_in_four_bits_greets(gorgon: Gorgon, tiny: Path) -> None:
    """The README's command for Llama-3-8B, on a folder that fits here."""
    status, out, err = gorgon(
        "generate", "--model", tiny, "--quantization", "nf4", "--chat", "--prompt", "Hello!", "--max-tokens", 8
    )
    assert status == 0
    assert out.strip("\n")
    assert "torch-nf4" in err


def test_prompt_from_a_pipe_and_messages_from_a_file(tiny: Path, gorgon: Gorgon, tmp_path: Path) -> None:
    piped = subprocess.run(
        [sys.executable, "-m", "gorgon_cli", "generate", "--model", str(tiny), "--prompt", "-", "--max-tokens", "5",
         "--json"],
        input=b"the cat\n", capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    assert json.loads(piped.stdout)["usage"]["completion_tokens"] >= 1
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps([{"role": "user", "content": "the cat"}]))
    status, out, _ = gorgon("generate", "--model", tiny, "--messages", chat, *SHORT, "--json")
    assert status == 0
    asked = json.loads(out)
    status, out, _ = gorgon("generate", "--model", tiny, "--prompt", "the cat", "--chat", *SHORT, "--json")
    assert json.loads(out)["token_ids"] == asked["token_ids"]


def test_a_terminal_sees_accepted_drafts_marked(tiny: Path) -> None:
    """On a pseudo-terminal: green and underlined, closed again, and nothing else that controls it."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "gorgon_cli", "generate", "--model", str(tiny), "--prompt", "the cat sat on the " * 8,
         "--max-tokens", "300", "--ignore-eos", "--fixed-tree"],
        stdout=slave, stderr=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm", "NO_COLOR": ""},
    )  # fmt: skip
    os.close(slave)
    shown = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    assert process.wait(timeout=60) == 0
    assert shown.count(b"\x1b[32;4m") == shown.count(b"\x1b[0m") > 0
    rest = shown.replace(b"\x1b[32;4m", b"").replace(b"\x1b[0m", b"")
    assert b"\x1b" not in rest


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\n\tc\x9b") == "a[2Jb\n\tc"


def test_a_reader_that_leaves_is_no_error_message(tiny: Path) -> None:
    process = subprocess.run(
        f"{sys.executable} -m gorgon_cli generate --model {tiny} --prompt 'the cat' --max-tokens 200 --ignore-eos"
        " --stop nothing | head -c 1 > /dev/null",
        shell=True, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert b"Traceback" not in process.stderr
