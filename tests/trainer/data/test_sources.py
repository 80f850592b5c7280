"""Sources: the shapes that prompts come in, and files that are cut off, glued together or damaged."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gorgon_protocol.errors import DataError
from gorgon_trainer.data import sources
from gorgon_trainer.data.records import Record
from gorgon_trainer.data.sources import Malformed, Source, SourceKind, parse_record


def conversation(number: int, answer: str = "Sure.") -> dict[str, Any]:
    question = f'Question {number}: how does {{ "id": "{number}" }} work?\n' + "x" * (number % 7)
    return {
        "id": f"c_{number}",
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
    }


CONVERSATIONS = [conversation(number) for number in range(40)]


def read(path: Path, kind: SourceKind = "sharegpt") -> tuple[list[Record], list[Malformed]]:
    items = list(Source(kind, path).read())
    return [i for i in items if not isinstance(i, Malformed)], [i for i in items if isinstance(i, Malformed)]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def prompts(records: list[Record]) -> list[str]:
    return [record.prompt for record in records]


def numbers(records: list[Record]) -> list[int]:
    return [int(record.prompt.split()[1].rstrip(":")) for record in records]


@pytest.fixture(params=[1, 7, 100, 1 << 20], ids=lambda size: f"chunks of {size}")
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that lie across the borders of what is read at once."""
    monkeypatch.setattr(sources, "_CHUNK", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize(
    "content",
    [
        json.dumps(CONVERSATIONS),
        json.dumps(CONVERSATIONS, indent=2),
        json.dumps(CONVERSATIONS, ensure_ascii=False, separators=(",", ":")),
        "\n".join(map(json.dumps, CONVERSATIONS)),
        "".join(map(json.dumps, CONVERSATIONS)),
        "\ufeff" + json.dumps(CONVERSATIONS[:20]) + "\n" + json.dumps(CONVERSATIONS[20:]),
    ],
    ids=["array", "indented", "compact", "lines", "glued", "two arrays"],
)
def test_sharegpt_in_all_its_layouts(tmp_path: Path, content: str) -> None:
    records, malformed = read(write(tmp_path / "chats.json", content))
    assert malformed == []
    assert numbers(records) == list(range(40))
    assert [message.role for message in records[3].messages] == ["user", "assistant"]  # type: ignore[union-attr]
    assert records[0].source == "chats.json"


@pytest.mark.usefixtures("chunk")
def test_sharegpt_cut_off_mid_string(tmp_path: Path) -> None:
    whole = json.dumps(CONVERSATIONS, indent=2)
    cut = whole[: whole.index("Question 30") + 20]
    records, malformed = read(write(tmp_path / "chats.json", cut))
    assert numbers(records) == list(range(30))
    assert [str(m) for m in malformed] == [
        "chats.json: conversation 31: cut off by the end of the file: Unterminated string starting at"
    ]


@pytest.mark.usefixtures("chunk")
def test_the_parts_of_a_split_file_give_all_but_what_the_cut_went_through(tmp_path: Path) -> None:
    whole = json.dumps(CONVERSATIONS, indent=2)
    cut = whole.index("Question 17") + 5
    first, _ = read(write(tmp_path / "a.json", whole[:cut]))
    second, malformed = read(write(tmp_path / "b.json", whole[cut:]))
    assert numbers(first) + numbers(second) == [*range(17), *range(18, 40)]
    assert len(malformed) == 1


@given(cut=st.integers(0, 3000))
@example(142)  # before the quotes that end an answer: with those of the next key they look like a whole text
def test_no_cut_is_fatal_or_costs_more_than_one_conversation(tmp_path_factory: Any, cut: int) -> None:
    whole = json.dumps(CONVERSATIONS[:20])
    cut = min(cut, len(whole))
    folder = tmp_path_factory.mktemp("cut")
    first, bad = read(write(folder / "a.json", whole[:cut]))
    second, _ = read(write(folder / "b.json", whole[cut:]))
    assert numbers(first) == list(range(len(first)))
    assert len(bad) <= 1
    # A cut through the key "id" hides where the next conversation begins, as one in an earlier word does.
    assert len(first) + len(second) >= 19
    assert set(numbers(second)).isdisjoint(numbers(first))


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("separator", [",\n", ", ", "\n"])
def test_reading_goes_on_behind_a_broken_conversation(tmp_path: Path, separator: str) -> None:
    broken = '{"id": "c_1", "conversations": [{"from": "human", "value": "Question 1" "oops"}]}'
    content = separator.join([json.dumps(CONVERSATIONS[0]), broken, json.dumps(CONVERSATIONS[2])])
    records, malformed = read(write(tmp_path / "chats.json", f"[{content}]"))
    assert numbers(records) == [0, 2]
    assert [str(m) for m in malformed] == ["chats.json: conversation 2: not valid JSON: Expecting ',' delimiter"]


def test_what_is_longer_than_any_conversation_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_MAX_CHARS", 1000)
    monkeypatch.setattr(sources, "_CHUNK", 100)
    endless = '{"id": "c_1", "conversations": "' + "x" * 5000 + '"}'
    content = f"[{json.dumps(CONVERSATIONS[0])}, {endless}, {json.dumps(CONVERSATIONS[2])}]"
    records, malformed = read(write(tmp_path / "chats.json", content))
    assert numbers(records) == [0, 2]
    assert [m.reason for m in malformed] == ["longer than 1000 characters"]
    lines = "\n".join(map(json.dumps, [CONVERSATIONS[0], {"prompt": "x" * 5000}, CONVERSATIONS[2]]))
    records, malformed = read(write(tmp_path / "chats.jsonl", lines), "jsonl")
    assert numbers(records) == [0, 2]
    assert [str(m) for m in malformed] == [
        "chats.jsonl:2: longer than 1000 characters: one JSON array is for --sharegpt"
    ]


def test_raw_control_characters_in_strings_are_taken(tmp_path: Path) -> None:
    content = '[{"id": "c_0", "conversations": [{"from": "human", "value": "a\tb\nc"}]}]'
    records, malformed = read(write(tmp_path / "chats.json", content))
    assert (prompts(records), malformed) == (["a\tb\nc"], [])


def test_json_lines_of_every_shape(tmp_path: Path) -> None:
    lines = [
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "A"}]},
        {"conversations": [{"from": "human", "value": "B"}], "model": "x"},
        {"turns": ["C", "D"], "question_id": 81},
        {"prompt": "E"},
        {"prompt": "F", "response": "G"},
        {"prompt": [{"role": "user", "content": "H"}]},
        {"text": "I", "meta": {"red_pajama_subset": "wikipedia"}},
    ]
    content = "\n\n".join(map(json.dumps, lines))  # blank lines are none
    records, malformed = read(write(tmp_path / "lines.jsonl", content), "jsonl")
    assert malformed == []
    assert [record.passages for record in records] == [
        ("S", "A"),
        ("B",),
        ("C", "D"),
        ("E",),
        ("F", "G"),
        ("H",),
        ("I",),
    ]
    assert [record.kind for record in records] == ["chat"] * 6 + ["text"]


def test_malformed_lines_are_named(tmp_path: Path) -> None:
    lines = ['{"text": "a"}', '{"text": "b"', '{"text": 3}', "[" * 100_000, '{"text": "\\ud800"}', '{"text": "e"}']
    records, malformed = read(write(tmp_path / "lines.jsonl", "\n".join(lines)), "jsonl")
    assert prompts(records) == ["a", "e"]
    assert [m.where for m in malformed] == [f"lines.jsonl:{number}" for number in (2, 3, 4, 5)]
    assert malformed[0].reason == "not valid JSON: Expecting ',' delimiter at column 13"
    assert malformed[1].reason == "text is not a text"
    assert malformed[3].reason == "text holds a lone surrogate"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([], "not a JSON object"),
        ({}, "none of the keys"),
        ({"conversations": None}, "conversations is not a list"),
        ({"conversations": []}, "no human turn"),
        ({"conversations": ["hello"]}, "a turn is not a JSON object"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "no human turn"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "a turn of unknown speaker 'tool'"),
        ({"conversations": [{"value": "x"}]}, "a turn of unknown speaker 'None'"),
        ({"conversations": [{"from": "human"}]}, "a turn is not a text"),
        ({"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "x"}]}, "no human turn"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}, "a system turn"),
        ({"turns": []}, "turns is not a list of texts"),
        ({"turns": "x"}, "turns is not a list of texts"),
        ({"turns": ["x", 1]}, "a turn is not a text"),
        ({"prompt": "x", "response": 1}, "response is not a text"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"text": ""}, "text is empty"),
    ],
)
def test_values_that_are_no_record(value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        parse_record(value, "x")


def test_a_conversation_begins_with_the_first_human_turn_and_ends_before_an_empty_one() -> None:
    turns = [("gpt", "0"), ("system", "S"), ("gpt", "1"), ("human", "2"), ("gpt", "3"), ("human", ""), ("gpt", "5")]
    record = parse_record({"conversations": [{"from": who, "value": value} for who, value in turns]}, "x")
    assert record.passages == ("S", "2", "3")


def test_plain_text_is_split_at_blank_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = "\n\nFirst line\nsecond line\n  \n\t\nNext.\r\n\r\nLast"
    records, _ = read(write(tmp_path / "book.txt", content), "text")
    assert prompts(records) == ["First line\nsecond line", "Next.", "Last"]
    monkeypatch.setattr(sources, "_MAX_CHARS", 20)
    records, _ = read(write(tmp_path / "book.txt", "one line of it\n" * 5), "text")
    assert prompts(records) == ["one line of it\none line of it"] * 2 + ["one line of it"]


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_compressed_files(tmp_path: Path, suffix: str, compress: Any) -> None:
    packed = compress("\n".join(json.dumps({"text": f"text {n}"}) for n in range(3000)).encode())
    records, malformed = read(write(tmp_path / f"lines.jsonl{suffix}", packed), "jsonl")
    assert (len(records), malformed) == (3000, [])
    _, malformed = read(write(tmp_path / f"cut.jsonl{suffix}", packed[: len(packed) // 2]), "jsonl")
    assert malformed[-1].where == f"cut.jsonl{suffix}"
    assert malformed[-1].reason.startswith("the compressed file is damaged or cut off: ")


def test_a_file_that_only_calls_itself_compressed(tmp_path: Path) -> None:
    for suffix in (".gz", ".xz"):
        records, malformed = read(write(tmp_path / f"x.jsonl{suffix}", '{"text": "a"}'), "jsonl")
        assert records == []
        assert "damaged" in malformed[0].reason
    with pytest.raises(DataError, match=r"x.jsonl.bz2: cannot be read: Invalid data stream"):
        read(write(tmp_path / "x.jsonl.bz2", '{"text": "a"}'), "jsonl")


@pytest.mark.parametrize("kind", ["sharegpt", "jsonl", "text"])
def test_files_that_cannot_be_read(tmp_path: Path, kind: SourceKind) -> None:
    with pytest.raises(DataError, match=r"nowhere: cannot be read: No such file or directory"):
        read(tmp_path / "nowhere", kind)
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read(tmp_path, kind)
    with pytest.raises(DataError, match=r"x.zst: .zst files are not read: decompress it first"):
        read(write(tmp_path / "x.zst", "x"), kind)


def test_bytes_that_are_not_utf8_are_marked(tmp_path: Path) -> None:
    records, _ = read(write(tmp_path / "x.txt", b"caf\xe9"), "text")
    assert prompts(records) == ["caf\ufffd"]
