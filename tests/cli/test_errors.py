"""Bad input: one clear line that names the thing, the right exit status, never a traceback."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli.conftest import Gorgon


def one_line(err: str) -> str:
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("gorgon: ")
    return lines[0]


def broken_copy(tiny: Path, folder: Path) -> Path:
    return Path(shutil.copytree(tiny, folder))


def test_missing_models(gorgon: Gorgon, tmp_path: Path) -> None:
    status, out, err = gorgon("generate", "--model", tmp_path / "nowhere", "--prompt", "a")
    assert (status, out) == (1, "")
    assert str(tmp_path / "nowhere") in one_line(err)
    status, _, err = gorgon("generate", "--model", tmp_path, "--prompt", "a")
    assert status == 1
    assert "config.json" in one_line(err)


def test_a_bundled_model_that_was_not_fetched(gorgon: Gorgon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GORGON_CACHE", str(tmp_path))
    status, _, err = gorgon("generate", "--prompt", "a")
    assert status == 1
    assert "gorgon models fetch smollm2" in one_line(err)


def test_broken_model_folders(gorgon: Gorgon, tiny: Path, tmp_path: Path) -> None:
    cut = broken_copy(tiny, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    status, _, err = gorgon("generate", "--model", cut, "--prompt", "a")
    assert status == 1
    assert "model.safetensors" in one_line(err)

    scrambled = broken_copy(tiny, tmp_path / "scrambled")
    (scrambled / "config.json").write_text("{")
    status, _, err = gorgon("generate", "--model", scrambled, "--prompt", "a")
    assert status == 1
    assert "config.json" in one_line(err)

    mute = broken_copy(tiny, tmp_path / "mute")
    (mute / "tokenizer.json").unlink()
    status, _, err = gorgon("generate", "--model", mute, "--prompt", "a")
    assert status == 1
    assert "tokenizer" in one_line(err)


def test_heads_that_are_not_there(gorgon: Gorgon, tiny: Path, tmp_path: Path) -> None:
    status, _, err = gorgon("generate", "--model", tiny, "--prompt", "a", "--heads", tmp_path / "none-here")
    assert status == 1
    assert "none-here" in one_line(err)
    status, _, err = gorgon("generate", "--model", tiny, "--prompt", "a", "--drafter", "heads")
    assert status == 1
    assert "--heads" in one_line(err)


def test_prompts_that_cannot_run(gorgon: Gorgon, tiny: Path) -> None:
    status, _, err = gorgon("generate", "--model", tiny, "--prompt", "the cat " * 300, "--context", 100)
    assert status == 1
    line = one_line(err)
    assert "tokens long and the context holds 100" in line
    status, _, err = gorgon("generate", "--model", tiny, "--prompt", "")
    assert status == 1
    assert "prompt is empty" in one_line(err)
    status, _, err = gorgon("generate", "--model", tiny, "--prompt", "a", "--context", 100000)
    assert status == 1
    assert "100000" in one_line(err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-nodes", 0), "max-nodes"),
        (("--max-nodes", 129), "max-nodes"),
        (("--drafter", "magic"), "drafter"),
        (("--quantization", "int3"), "quantization"),
        (("--dtype", "float8"), "dtype"),
        (("--no-such-option",), "no-such-option"),
        (("--messages", "x.json"), "one of --prompt and --messages"),
    ],
)
def test_unknown_option_values_are_usage_errors(
    gorgon: Gorgon, tiny: Path, arguments: tuple[object, ...], message: str
) -> None:
    status, out, err = gorgon("generate", "--model", tiny, "--prompt", "a", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--temperature", -1), "temperature must be at least 0"),
        (("--top-p", 0), "top_p must be above 0"),
        (("--max-tokens", 0), "max_tokens must be at least 1"),
        (("--logit-bias", "five=1"), "--logit-bias takes TOKEN=BIAS"),
        (("--logit-bias", "9999=1"), "logit_bias names token 9999"),
        (("--device", "tpu"), "device 'tpu'"),
        (("--kernels", "native", "--quantization", "nf4"), "native kernels"),
        (("--kernels", "triton", "--device", "cpu"), "the Triton kernels cannot be used: they need a GPU"),
    ],
)
def test_values_out_of_range_are_named(gorgon: Gorgon, tiny: Path, arguments: tuple[object, ...], message: str) -> None:
    status, _, err = gorgon("generate", "--model", tiny, "--prompt", "a", *arguments)
    assert status == 1
    assert message in one_line(err)


def test_stdin_that_is_not_text(tiny: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gorgon_cli", "generate", "--model", str(tiny), "--prompt", "-"],
        input=b"abc\xff\xfe", capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "standard input is not UTF-8 text (byte 0xff at offset 3)" in one_line(done.stderr.decode())


@pytest.mark.parametrize("content", ["[", "[]", '[{"role": "user"}]', '"hi"', "[1, 2]"])
def test_message_files_that_are_no_chats(gorgon: Gorgon, tiny: Path, tmp_path: Path, content: str) -> None:
    file = tmp_path / "chat.json"
    file.write_text(content)
    status, _, err = gorgon("generate", "--model", tiny, "--messages", file)
    assert status == 1
    assert "chat.json" in one_line(err)


def test_files_that_cannot_be_read(gorgon: Gorgon, tiny: Path, tmp_path: Path) -> None:
    status, _, err = gorgon("generate", "--model", tiny, "--messages", tmp_path / "gone.json")
    assert status == 1
    assert "gone.json: No such file or directory" in one_line(err)
    status, _, err = gorgon("bench", "engine", "--model", tiny, "--prompts", tmp_path / "gone.jsonl")
    assert status == 1
    assert "gone.jsonl" in one_line(err)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"question": "b"}\n')
    status, _, err = gorgon("bench", "engine", "--model", tiny, "--prompts", bad)
    assert status == 1
    assert "line 2" in one_line(err)


def test_unknown_models_to_fetch(gorgon: Gorgon) -> None:
    status, _, err = gorgon("models", "fetch", "gpt5")
    assert status == 1
    assert "smollm2" in one_line(err)


def test_the_bench_reports_both_ways(gorgon: Gorgon, tiny: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the cat sat on the mat"}\n\n{"turns": ["on the mat", "and then"]}\n')
    status, out, _ = gorgon("bench", "engine", "--model", tiny, "--prompts", prompts, "--max-tokens", 16, "--json")
    report = json.loads(out)
    assert status == 0
    assert report["num_prompts"] == report["identical_outputs"] == 2
    assert report["plain"]["num_tokens"] == report["speculative"]["num_tokens"]
    assert report["speedup"] > 0
    assert report["mean_acceptance_length"] >= 1
    status, out, _ = gorgon("bench", "engine", "--model", tiny, "--prompts", prompts, "--max-tokens", 16)
    assert "identical outputs 2 of 2" in out
