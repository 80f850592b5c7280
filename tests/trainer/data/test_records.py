"""Records: what is written is read, and a file that was tampered with is noticed by line."""

import json
from pathlib import Path

import pytest

from gorgon_protocol.errors import DataError
from gorgon_trainer.data.records import ChatRecord, Message, Record, TextRecord, normalized, read_records, to_line

CHAT = ChatRecord.of(
    [
        Message(role="system", content="Be brief."),
        Message(role="user", content='Hello\u2028 "you" 🐈'),
        Message(role="assistant", content="Hi."),
        Message(role="user", content="Bye"),
    ],
    "a.json",
)
TEXT = TextRecord.of("Once upon a time", "b.txt")


def test_records_are_one_line_each_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"".join(map(to_line, [CHAT, TEXT])))
    assert len(path.read_bytes().splitlines()) == 2
    assert list(read_records(path)) == [CHAT, TEXT]


def test_what_a_record_says() -> None:
    assert CHAT.prompt == 'Hello\u2028 "you" 🐈'
    assert CHAT.human_turns == ('Hello\u2028 "you" 🐈', "Bye")
    assert CHAT.passages == ("Be brief.", 'Hello\u2028 "you" 🐈', "Hi.", "Bye")
    assert (TEXT.prompt, TEXT.passages) == ("Once upon a time", ("Once upon a time",))


def test_the_id_is_of_the_content_not_of_the_source() -> None:
    assert ChatRecord.of(CHAT.messages, "elsewhere").id == CHAT.id
    assert ChatRecord.of(CHAT.messages[:2], "a.json").id != CHAT.id
    # Of files that were written before: resumed runs know records by it.
    assert TEXT.id == "d26049627369c11abe53e8fd5fdf5ebf"
    assert CHAT.id == "9d3a0e5739b6abbaaa8b8e35d7373453"


@pytest.mark.parametrize(
    ("first", "second"),
    [("Hello,  World!", "hello world"), ("ＦＵＬＬ width", "full WIDTH"), ("Straße?", "STRASSE")],
)
def test_normalized_texts_are_the_same_words(first: str, second: str) -> None:
    assert normalized(first) == normalized(second)


def edited(record: Record, **changes: object) -> str:
    return json.dumps(json.loads(to_line(record)) | changes)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "Invalid JSON"),
        ("[]", "should be an object"),
        ('{"kind": "poem"}', "poem"),
        (edited(TEXT, text="Once upon another time"), "the id is of other content"),
        (edited(CHAT, messages=[{"role": "user", "content": "x"}]), "the id is of other content"),
        (edited(CHAT, messages=[{"role": "robot", "content": "x"}]), "chat.messages.0.role"),
        (edited(CHAT, messages=[{"role": "user", "content": ""}]), "chat.messages.0.content"),
        (edited(CHAT, messages=[{"role": "assistant", "content": "x"}]), "no human turn"),
        (edited(CHAT, messages=[]), "chat.messages"),
        (edited(TEXT, language="en"), "text.language"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(to_line(TEXT) + line.encode() + b"\n")
    records = read_records(path)
    assert next(records) == TEXT
    with pytest.raises(DataError) as caught:
        next(records)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.jsonl: cannot be read: No such file"):
        next(read_records(tmp_path / "nowhere.jsonl"))
