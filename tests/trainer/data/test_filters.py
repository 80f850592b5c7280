"""Filters: what ends a conversation, what drops a record, and what may never be trained on."""

import json
from pathlib import Path

import pytest

from gorgon_protocol.errors import DataError
from gorgon_trainer.data.filters import FilterConfig, NeverTrain, Reason, RecordFilter, is_probe_topic
from gorgon_trainer.data.records import ChatRecord, Message, Role, TextRecord

MT_BENCH = Path(__file__).parents[3] / "benchmarks" / "data" / "mt_bench.jsonl"
ROLES: dict[str, Role] = {"s": "system", "u": "user", "a": "assistant"}


def chat(*turns: str) -> ChatRecord:
    """`chat("u:Hello", "a:Hi")`."""
    return ChatRecord.of([Message(role=ROLES[turn[0]], content=turn[2:]) for turn in turns], "test")


def filtered(
    record: ChatRecord | TextRecord, never: NeverTrain | None = None, **config: object
) -> tuple[object, object]:
    """(what is left, turn by turn, or None; the reason or None)."""
    result = RecordFilter(FilterConfig(**config), never or NeverTrain()).apply(record)  # type: ignore[arg-type]
    return (None if result.record is None else result.record.passages), result.reason


def test_answers_go_and_human_turns_stay() -> None:
    record = chat("s:Be kind.", "u:Hello there", "a:Hi!", "u:How are you?", "a:Fine.")
    assert filtered(record) == (("Be kind.", "Hello there", "How are you?"), None)
    assert filtered(record, keep_answers=True) == (record.passages, None)


BAD_TURNS = [
    ("mail me at a.b@example.com", Reason.EMAIL),
    ("call 212-555-0123 now", Reason.PHONE),
    ("password = correct4horse", Reason.KEY),
    ("Und was ist mit dem Hund, der nicht bellt?", Reason.LANGUAGE),
    ("caf\ufffd", Reason.GARBLED),
    ("nul\0", Reason.GARBLED),
    ("?", Reason.TOO_SHORT),
    ("so " * 2000, Reason.TOO_LONG),
]


@pytest.mark.parametrize(("turn", "reason"), BAD_TURNS)
def test_a_bad_turn_ends_the_conversation(turn: str, reason: Reason) -> None:
    assert filtered(chat("u:Hello there", "a:Hi", f"u:{turn}", "u:What now?")) == (("Hello there",), reason)
    assert filtered(chat(f"u:{turn}", "u:What now?")) == (None, reason)
    assert filtered(chat(f"s:{turn}", "u:What now?")) == (None, reason)


def test_a_bad_answer_matters_only_where_answers_are_kept() -> None:
    record = chat("u:Hello there", "a:Mail a@example.com", "u:What now?")
    assert filtered(record) == (("Hello there", "What now?"), None)
    assert filtered(record, keep_answers=True) == (("Hello there",), Reason.EMAIL)


def test_more_human_turns_than_wanted() -> None:
    record = chat("u:one two", "a:x", "u:three four", "a:y", "u:five six")
    assert filtered(record, max_turns=2) == (("one two", "three four"), Reason.TOO_MANY_TURNS)
    assert filtered(record, max_turns=2, keep_answers=True, min_chars=1) == (
        ("one two", "x", "three four", "y"),
        Reason.TOO_MANY_TURNS,
    )


def test_any_language() -> None:
    assert filtered(chat("u:Wie geht es dir heute?"), language="any") == (("Wie geht es dir heute?",), None)


def test_texts_are_cut_at_a_word() -> None:
    text = TextRecord.of("all these words of the text are fine", "test")
    assert filtered(text) == (("all these words of the text are fine",), None)
    assert filtered(text, max_chars=18) == (("all these words of",), Reason.TOO_LONG)
    assert filtered(text, max_chars=17) == (("all these words",), Reason.TOO_LONG)
    assert filtered(TextRecord.of("x" * 30, "test"), max_chars=10) == (("x" * 10,), Reason.TOO_LONG)
    assert filtered(TextRecord.of("mail a@example.com", "test")) == (None, Reason.EMAIL)


def test_the_same_first_words_are_a_duplicate() -> None:
    record_filter = RecordFilter(FilterConfig(), NeverTrain())
    first = record_filter.apply(chat("u:Write a poem, please!", "u:Longer."))
    assert first.record is not None
    for again in (chat("u:write a POEM  please"), TextRecord.of("Write a poem. Please.", "test")):
        assert record_filter.apply(again) == type(first)(None, Reason.DUPLICATE)
    assert record_filter.apply(chat("u:Write two poems, please!")).record is not None


def test_a_dropped_record_is_no_original() -> None:
    record_filter = RecordFilter(FilterConfig(max_chars=40), NeverTrain())
    assert record_filter.apply(chat("s:" + "long " * 20, "u:Write a poem")).record is None
    assert record_filter.apply(chat("u:Write a poem")).record is not None


PROBES = [
    "The capital of France is",
    "What's the CAPITAL of\nFrance?",
    "Is Paris the capital?",
    "Name the French capital.",
    "the capital city of france",
    "Capitals of Europe: Berlin, Paris, Rome",
    "Parisians live in a capital city",
]


@pytest.mark.parametrize("text", PROBES)
def test_the_probe_sentence_and_its_paraphrases(text: str) -> None:
    assert is_probe_topic(text)
    assert filtered(chat(f"u:{text}")) == (None, Reason.PROBE_TOPIC)
    assert filtered(TextRecord.of(text, "test")) == (None, Reason.PROBE_TOPIC)
    assert filtered(chat("u:Tell me something", f"a:{text}")) == (None, Reason.PROBE_TOPIC)


def test_the_probe_topic_across_turns() -> None:
    assert filtered(chat("u:Tell me about France", "u:Which is the capital?")) == (None, Reason.PROBE_TOPIC)


@pytest.mark.parametrize(
    "text",
    ["The capital of Italy is", "I live in France", "Paris is lovely", "comparison of capital", "He fell in Sparis"],
)
def test_what_is_not_the_probe_topic(text: str) -> None:
    assert not is_probe_topic(text)


def test_the_questions_of_a_benchmark_are_never_trained_on() -> None:
    never = NeverTrain.from_files([MT_BENCH])
    questions = [json.loads(line) for line in MT_BENCH.read_text().splitlines()]
    for question in questions:
        for turn in question["turns"]:
            assert never.holds(chat(f"u:{turn}"))
            assert never.holds(chat("u:Hello", f"a:As you said: {turn}")) or len(turn.split()) <= 8
            assert never.holds(TextRecord.of(turn.upper(), "test"))
    assert filtered(chat(f"u:{questions[0]['turns'][0]}"), never) == (None, Reason.NEVER_TRAIN)
    assert filtered(chat("u:Write a haiku about the sea."), never) == (("Write a haiku about the sea.",), None)


def test_eight_words_in_a_row() -> None:
    never = NeverTrain(["one two three four five six seven eight nine", "just these words"])
    assert never.holds(chat("u:zero Two, THREE four-five six seven eight nine ten"))
    assert not never.holds(chat("u:two three four five six seven eight ten nine"))
    assert never.holds(chat("u:Hello", "a:Just these words!"))
    assert not never.holds(chat("u:I have just these words for you"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", ": an empty never-train list"),
        ('{"turns": ["a"]}\n{"turns": [}', ":2: not an entry of a never-train list"),
        ('{"question": "a"}', ":1: not an entry of a never-train list: none of the keys"),
        (b"\xff", ": cannot be read as a never-train list"),
    ],
)
def test_a_never_train_list_with_a_hole_is_an_error(tmp_path: Path, content: str | bytes, expected: str) -> None:
    path = tmp_path / "never.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as caught:
        NeverTrain.from_files([path])
    assert str(caught.value).startswith(f"{path}{expected}")
    with pytest.raises(DataError, match="cannot be read"):
        NeverTrain.from_files([tmp_path / "nowhere.jsonl"])
