"""The whole stage: the same prompts have the same fate whatever the files, the order and the other prompts."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gorgon_protocol.errors import DataError, TrainingError
from gorgon_trainer.data.filters import FilterConfig, Reason
from gorgon_trainer.data.prepare import PrepareConfig, Prepared, is_heldout, prepare
from gorgon_trainer.data.records import ChatRecord, Record, TextRecord, read_records
from gorgon_trainer.data.report import PrepareReport
from gorgon_trainer.data.sources import Source

VERBS = ["Explain", "Describe", "Compare", "Summarise", "Outline"]
THINGS = [
    "the tides",
    "a bridge",
    "sourdough bread",
    "binary search",
    "the violin",
    "a comet",
    "glass",
    "the stock market",
]
PLACES = [
    "to a child",
    "for an engineer",
    "in one sentence",
    "as a poem",
    "with an example",
    "step by step",
    "in a letter",
]
PROMPTS = [f"{verb} {thing} {place}." for verb in VERBS for thing in THINGS for place in PLACES]  # 280


def line(prompt: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": "No."}]})


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(line, PROMPTS)))
    return path


Run = Callable[..., Prepared]


@pytest.fixture
def run(tmp_path: Path, chats: Path) -> Run:
    """`run("out", sources=..., **settings)`: without sources, all the prompts."""

    def prepared(out: str = "out", **settings: Any) -> Prepared:
        settings.setdefault("sources", (Source("jsonl", chats),))
        settings.setdefault("heldout_share", 0.25)
        return prepare(PrepareConfig(out=tmp_path / out, **settings), progress=False)

    return prepared


def splits(folder: Path) -> tuple[list[Record], list[Record]]:
    return list(read_records(folder / "train.jsonl")), list(read_records(folder / "heldout.jsonl"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_and_reported(run: Run, tmp_path: Path) -> None:
    prepared = run()
    report = prepared.report
    assert prepared.is_new
    assert names(tmp_path / "out") == ["heldout.jsonl", "report.json", "train.jsonl"]
    assert PrepareReport.read(tmp_path / "out") == report
    train, heldout = splits(tmp_path / "out")
    assert (len(train), len(heldout)) == (report.num_train, report.num_heldout)
    assert report.num_train + report.num_heldout == report.num_chats + report.num_texts
    assert report.num_train + report.num_heldout + report.dropped.get(Reason.DUPLICATE, 0) == len(PROMPTS)
    assert 0.15 < report.num_heldout / len(PROMPTS) < 0.35
    assert all(is_heldout(record.prompt, 0.25) for record in heldout)
    assert not any(is_heldout(record.prompt, 0.25) for record in train)
    assert all(message.role == "user" for r in train if isinstance(r, ChatRecord) for message in r.messages)


def test_a_share_of_the_chats_becomes_openings(run: Run, tmp_path: Path) -> None:
    report = run(completion_share=0.3).report
    texts = [record for split in splits(tmp_path / "out") for record in split if isinstance(record, TextRecord)]
    # Many of these prompts begin alike: the same opening is taken once.
    assert 0.2 < (report.num_texts + report.dropped[Reason.DUPLICATE]) / len(PROMPTS) < 0.4
    assert {len(text.text.split()) for text in texts} >= {3, 4, 5}
    for text in texts:
        assert any(prompt.startswith(text.text) for prompt in PROMPTS)
        assert len(text.text.split()) >= 3
    assert run("none", completion_share=0.0).report.num_texts == 0


def test_the_split_is_of_the_prompt_alone(run: Run, tmp_path: Path) -> None:
    """Another order, another file, other neighbours, an earlier duplicate: the same records on the same side."""
    run("first")
    shuffled = random.Random(1).sample(PROMPTS, 120)
    for name, prompts in (("a", shuffled[:60]), ("b", [p.upper().replace(" ", "  ") for p in shuffled[40:]])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(line, prompts)))
    run("second", sources=(Source("jsonl", tmp_path / "a.jsonl"), Source("jsonl", tmp_path / "b.jsonl")))

    def prompts_of(folder: str) -> tuple[set[str], set[str]]:
        train, heldout = splits(tmp_path / folder)
        return {r.prompt.casefold() for r in train}, {" ".join(r.prompt.casefold().split()) for r in heldout}

    (train, heldout), (train_again, heldout_again) = prompts_of("first"), prompts_of("second")
    assert heldout_again <= heldout
    assert train.isdisjoint(heldout_again)
    assert heldout.isdisjoint({" ".join(prompt.split()) for prompt in train_again})


def test_a_limit_keeps_the_same_records_in_any_order(run: Run, chats: Path, tmp_path: Path) -> None:
    report = run("first", limit=50).report
    assert report.num_train + report.num_heldout == 50
    assert report.dropped[Reason.LIMIT] == len(PROMPTS) - 50 - report.dropped.get(Reason.DUPLICATE, 0)
    (tmp_path / "other.jsonl").write_text("\n".join(reversed(chats.read_text().splitlines())))
    run("second", limit=50, sources=(Source("jsonl", tmp_path / "other.jsonl"),))
    first, second = (splits(tmp_path / name) for name in ("first", "second"))
    assert [[r.id for r in split] for split in first] == [[r.id for r in split] for split in second]
    fewer = run("third", limit=20)
    assert fewer.report.num_train <= report.num_train
    kept = {record.id for split in first for record in split}
    assert all(record.id in kept for split in splits(tmp_path / "third") for record in split)


def test_what_was_dropped_shortened_and_malformed_is_counted(run: Run, tmp_path: Path) -> None:
    never = tmp_path / "never.jsonl"
    never.write_text(json.dumps({"turns": ["Name ten animals that live in the desert and never drink."]}))
    mixed = tmp_path / "mixed.jsonl"
    lines = [
        line("What is the capital of France?"),
        line("Please name ten animals that live in the desert and never drink."),
        line("My mail is jane@example.com"),
        line("Explain the tides"),
        line("explain THE tides!"),
        json.dumps({"turns": ["Explain rain", "Call me: 212-555-0123"]}),
        *["{"] * 7,
    ]
    mixed.write_text("\n".join(lines))
    book = tmp_path / "book.txt"
    book.write_text("A first paragraph of the book.\n\nA second one of it.")
    report = run(
        sources=(Source("jsonl", mixed), Source("text", book)),
        never_train=(never,),
        heldout_share=0,
        completion_share=0,
    ).report
    assert report.dropped == {
        Reason.PROBE_TOPIC: 1,
        Reason.NEVER_TRAIN: 1,
        Reason.EMAIL: 1,
        Reason.DUPLICATE: 1,
    }
    assert report.shortened == {Reason.PHONE: 1}
    assert [(s.num_read, s.num_malformed, s.num_kept) for s in report.sources] == [(6, 7, 2), (2, 0, 2)]
    assert report.num_malformed == 7
    assert len(report.malformed) == 5
    assert report.malformed[0].startswith("mixed.jsonl:7: not valid JSON")
    assert (report.num_train, report.num_heldout, report.num_texts) == (4, 0, 2)


def test_a_finished_folder_is_kept_and_another_one_is_not_replaced_unasked(
    run: Run, chats: Path, tmp_path: Path
) -> None:
    first = run()
    before = (tmp_path / "out" / "train.jsonl").stat().st_mtime_ns
    again = run()
    assert (again.is_new, again.report) == (False, first.report)
    for changes in ({"completion_share": 0.5}, {"limit": 9}, {"filters": FilterConfig(max_turns=1)}):
        with pytest.raises(DataError, match=r"holds data of other inputs or settings.*--overwrite"):
            run(**changes)
    chats.write_text(chats.read_text() + "\n" + line("One more prompt"))
    with pytest.raises(DataError, match="holds data of other inputs or settings"):
        run()
    assert (tmp_path / "out" / "train.jsonl").stat().st_mtime_ns == before
    replaced = run(overwrite=True)
    assert replaced.is_new
    assert sum(s.num_read for s in replaced.report.sources) == len(PROMPTS) + 1
    assert [name for name in names(tmp_path) if name.startswith(".")] == []


def test_a_folder_that_was_changed_since_is_noticed(run: Run, tmp_path: Path) -> None:
    run()
    with (tmp_path / "out" / "train.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match=r"train.jsonl: changed since it was made"):
        run()
    (tmp_path / "out" / "report.json").write_text("{}")
    with pytest.raises(DataError, match=r"report.json: fingerprint"):
        run()


def test_a_folder_of_something_else_is_never_touched(run: Run, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(DataError, match="holds other files than prepared data"):
        run("photos", overwrite=True)
    assert names(tmp_path / "photos") == ["cat.jpg"]
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="not a folder"):
        run("file")
    (tmp_path / "empty").mkdir()
    assert run("empty").is_new


def test_files_of_the_same_name_are_told_apart(run: Run, chats: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / chats.name
    other.write_text(line("A prompt of its own"))
    report = run(sources=(Source("jsonl", chats), Source("jsonl", other)), completion_share=0).report
    assert [source.num_kept for source in report.sources] == [len(PROMPTS), 1]
    assert [source.input.name for source in report.sources] == [str(chats), str(other)]
    with pytest.raises(TrainingError, match="given twice"):
        run(sources=(Source("jsonl", chats), Source("text", chats)))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", r"bad.jsonl: nothing usable in it: the file is empty"),
        ("\n\n", r"bad.jsonl: nothing usable in it: the file is empty"),
        ('{"a": 1}\n[]', r"bad.jsonl: nothing usable in it: bad.jsonl:2: not a JSON object"),
    ],
)
def test_a_file_with_nothing_usable_is_an_error(
    run: Run, chats: Path, tmp_path: Path, content: str, expected: str
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(content)
    with pytest.raises(DataError, match=expected):
        run(sources=(Source("jsonl", chats), Source("jsonl", bad)))
    assert not (tmp_path / "out").exists()
    assert [name for name in names(tmp_path) if name.startswith(".")] == []


def test_nothing_left_is_an_error_that_says_why(run: Run, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no record is left to train on: 280 read, 0 held out, dropped: 280 too short"):
        run(filters=FilterConfig(min_chars=200))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sources": ()}, "no data is given"),
        ({"heldout_share": 1.0}, "heldout_share must be from 0 to below 1"),
        ({"completion_share": -0.1}, "completion_share must be from 0 to below 1"),
        ({"filters": FilterConfig(min_chars=9, max_chars=8)}, "min_chars 9 is above max_chars 8"),
    ],
)
def test_settings_that_cannot_be(run: Run, settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(TrainingError, match=expected):
        run(**settings)


def test_a_place_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        run("file/out")
    with pytest.raises(DataError, match=r"nowhere.jsonl: cannot be read"):
        run(sources=(Source("jsonl", tmp_path / "nowhere.jsonl"),))


def test_a_killed_run_leaves_the_earlier_folder_and_the_next_one_works(run: Run, tmp_path: Path) -> None:
    run()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    pipe = tmp_path / "pipe.jsonl"
    pipe.write_text(line("Not this time"))
    script = (
        "import os\n"
        "from pathlib import Path\n"
        "from gorgon_trainer.data import prepare as stage\n"
        "from gorgon_trainer.data.sources import Source\n"
        f"pipe = Path({str(pipe)!r})\n"
        "write = stage._write\n"
        "def stop(folder, records, share, tally):\n"
        "    pipe.unlink(); os.mkfifo(pipe)\n"  # reading it waits for a writer that never comes
        "    return write(folder, records, share, tally)\n"
        "stage._write = stop\n"
        f"out = Path({str(tmp_path / 'out')!r})\n"
        "stage.prepare(stage.PrepareConfig(out, (Source('jsonl', pipe),), overwrite=True))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*.tmp/train.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert not run().is_new
    run(overwrite=True, completion_share=0.5)
    assert [name for name in names(tmp_path) if name.startswith(".")] == []
