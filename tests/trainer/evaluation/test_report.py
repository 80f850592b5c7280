"""The report: what it says, what it leaves out, and how it is written."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer.evaluation.inputs import ACCURACIES, HARDWARE, HISTORY, inputs

from gorgon_protocol.errors import BadRequestError, DataError, TrainingError
from gorgon_trainer.evaluation.hardware import describe_hardware
from gorgon_trainer.evaluation.history import HistoryRecord
from gorgon_trainer.evaluation.markdown import cell, duration, table
from gorgon_trainer.evaluation.predicted import predicted_acceptance_length
from gorgon_trainer.evaluation.report import ReportInputs, lengths_table, render_report, tree_accuracies, write_report


def rows(markdown: str) -> list[list[str]]:
    """The cells of a table, its rule left out."""
    lines = [line.strip("| ").split(" | ") for line in markdown.splitlines()]
    return [lines[0], *lines[2:]]


def test_lengths_by_nodes_predicted_and_measured() -> None:
    header, *body = rows(lengths_table(inputs()))
    assert header == ["nodes", "predicted", "heads, greedy", "not looping", "heads, T=0.7", "not looping",
                      "heads + lookup, greedy", "not looping"]  # fmt: skip
    assert [row[0] for row in body] == ["4", "8", "16", "32", "64"]
    assert body[0][1] == f"{predicted_acceptance_length(ACCURACIES, 4):.2f}"
    assert body[0][2:] == ["1.50", "1.40", "1.45", "1.44", "-", "-"]
    assert body[1][2:] == ["-"] * 6
    assert body[3][2:] == ["1.70", "1.60", "1.65", "1.64", "1.90", "1.80"]


def test_every_section_is_there_tables_before_plots() -> None:
    files = render_report(inputs())
    text = files["report.md"].decode()
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == ["Tokens per verification step", "What was measured", "Accuracy of the heads", "Training",
                        "Data", "Time", "Hardware", "Commands", "Plots"]  # fmt: skip
    shown = re.findall(r"!\[.+\]\((.*)\)", text)
    assert set(shown) == set(files) - {"report.md"}
    assert all(files[name].startswith(b"\x89PNG") for name in shown)
    for said in (
        "180 steps, 1,440,000 positions, 512,346 positions/s.",
        "| 2 | 50.0% | 20.0% | 10.0% | 5.0% | 80.0% | 85.0% |",
        "| heads | 4 | greedy | 80 | 1 | 256 | 80 | 20 | 1,000 | 79 | torch-bfloat16 |",
        "| heads | 4 | greedy | head | 7,000 | 500 | 7.1% |",
        "| 3 | 0.33 | 3.50 |",
        "| together | 2 min 59 s |",
        "| GPU | 4 x NVIDIA H100 |",
        "torch 2.11.0, CUDA 12.8",
        "gorgon train data --out data\ngorgon train heads --shards shards",
    ):
        assert said in text


@pytest.mark.parametrize(
    ("values", "headings", "pictures"),
    [
        ({}, [], []),
        ({"commands": ["make"]}, ["Commands"], []),
        ({"offsets": (2, 3, 4), "history": HISTORY}, ["Training", "Plots"], ["loss.png"]),
        ({"offsets": (1,), "accuracies": ((0.5, 0.1),)}, ["Accuracy of the heads", "Plots"], ["accuracy.png"]),
        ({"measurements": {"heads": []}}, [], []),
    ],
)
def test_what_is_not_given_is_left_out(values: dict[str, Any], headings: list[str], pictures: list[str]) -> None:
    files = render_report(ReportInputs(title="Empty", **values))
    text = files.pop("report.md").decode()
    assert text.startswith("# Empty\n")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE)[: len(headings) + 1] == [
        *(["What was measured"] if "measurements" in values else []), *headings,
    ]  # fmt: skip
    assert list(files) == pictures


def test_only_heads_behind_the_next_token_make_a_tree() -> None:
    numbered = [[0.1], [0.2], [0.3], [0.4]]
    assert tree_accuracies(numbered, (1, 2, 3, 5)) == [[0.2], [0.3]]
    assert tree_accuracies(numbered, (3, 4, 5, 6)) == []


def test_a_report_is_written_over_an_earlier_one(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "report"
    assert write_report(folder, inputs(title="First")) == folder / "report.md"
    write_report(folder, inputs(title="Second"))
    assert (folder / "report.md").read_text().startswith("# Second\n")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["acceptance_by_depth.png", "acceptance_length.png", "accuracy.png", "loss.png", "report.md"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"file/report: the report cannot be written: Not a directory"):
        write_report(tmp_path / "file" / "report", inputs())


@pytest.mark.parametrize("name", ["accuracies", "history"])
def test_figures_of_other_heads_are_refused(name: str) -> None:
    with pytest.raises(BadRequestError, match=f"{name} is not of 2 heads"):
        ReportInputs(title="x", offsets=(2, 3), **{name: getattr(inputs(), name)})


def test_depths_that_are_not_trained_have_no_training_loss() -> None:
    history = [HistoryRecord(10, 100, 1.5, (1.5,), held_out_losses=(1.6, 2.1)), HistoryRecord(20, 200, 1.25, (1.25,))]
    files = render_report(ReportInputs(title="one layer", offsets=(2, 3), history=history))
    text = files["report.md"].decode()
    assert [line.split("|")[1:4] for line in text.splitlines() if line.startswith(("| 2 ", "| 3 "))] == [
        [" 2 ", " 1.25 ", " 1.60 "],
        [" 3 ", " - ", " 2.10 "],
    ]
    assert any(name.endswith(".png") for name in files)


def test_records_of_a_training_run() -> None:
    record = {
        "step": 200,
        "epoch": 0.5,
        "num_positions": 1600,
        "loss": 3.5,
        "head_losses": [1.5, 2.0],
        "learning_rate": 1e-3,
        "positions_per_second": 10.0,
        "held_out": {"acceptance_length": 1.9, "accuracies": [[0.5], [0.4]], "losses": [1.6, 2.1]},
    }
    assert HistoryRecord.from_json(record) == HistoryRecord(200, 1600, 3.5, (1.5, 2.0), 1e-3, 10.0, (1.6, 2.1), 1.9)
    del record["held_out"]
    assert HistoryRecord.from_json(record).held_out_losses == ()
    with pytest.raises(DataError, match="not a record of a training run"):
        HistoryRecord.from_json({**record, "loss": "low"})
    with pytest.raises(DataError, match="KeyError"):
        HistoryRecord.from_json({"step": 1})


def test_this_machine() -> None:
    here = describe_hardware("cpu")
    assert here.torch_version == torch.__version__
    assert here.num_cpus >= 1
    assert here.device == here.cpu != ""
    assert [name for name, _ in here.rows()] == ["CPU", "Memory", "Software"]
    assert [name for name, _ in HARDWARE.rows()] == ["GPU", "CPU", "GPU memory", "Software"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), ("word", "word"), (True, "yes"), (7, "7"), (31188, "31,188"), (2.6, "2.60"), (0.0, "0.00"),
        (0.003, "0.003"), (3.14159e-5, "3.14e-05"), (512345.6, "512,346"), (80.0, "80"), (-0.5, "-0.50"),
    ],
)  # fmt: skip
def test_cells(value: Any, text: str) -> None:
    assert cell(value) == text


def test_tables() -> None:
    assert table(["a|b", "n", "share"], [["x\ny", 1, "5.0%"], ["z", None, "6.0%"]]).splitlines() == [
        "| a\\|b | n | share |", "| --- | ---: | ---: |", "| x y | 1 | 5.0% |", "| z | - | 6.0% |",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "0.2 s"), (59.0, "59.0 s"), (60.0, "1 min 0 s"), (7265.0, "2 h 1 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
