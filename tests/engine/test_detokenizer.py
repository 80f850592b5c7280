import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon_engine.detokenizer import IncrementalDetokenizer
from gorgon_engine.tokenizer import Tokenizer
from support.vocabularies import byte_fallback_bpe, byte_level_bpe, save, with_added_tokens

FAMILIES = {
    "byte-level": (byte_level_bpe, "<|im_start|>", "<|im_end|>"),
    "sentencepiece": (byte_fallback_bpe, "<s>", "</s>"),
    "metaspace": (lambda: byte_fallback_bpe(metaspace=True), "<s>", "</s>"),
}
TEXTS = st.text(st.sampled_from("ab cthe,12\n猫é🐈👩\u200d👩ü\ufffd<"), max_size=25)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    made = {}
    for name, (make, bos, eos) in FAMILIES.items():
        folder = save(with_added_tokens(make()), tmp_path_factory.mktemp("tokenizer") / name, bos=bos, eos=eos)
        made[name] = Tokenizer.from_folder(folder)
    return made


def chunked(data: st.DataObject, tokens: list[int]) -> list[list[int]]:
    """The tokens cut into pushes of any size, empty ones too."""
    chunks = []
    while tokens:
        size = data.draw(st.integers(0, 4))
        chunks.append(tokens[:size])
        tokens = tokens[size:]
    return chunks


def replay(detokenizer: IncrementalDetokenizer, chunks: list[list[int]]) -> tuple[list[str], int]:
    """What every push and the end gave, and how many tokens were consumed."""
    pieces, consumed = [], 0
    for chunk in chunks:
        pieces.append(detokenizer.push(chunk))
        consumed += detokenizer.num_consumed
        if detokenizer.stopped is not None:
            break
    return [*pieces, detokenizer.finish()], consumed


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_text_comes_out_as_it_went_in_and_never_in_half_characters(tokenizers, family, data):
    tokenizer = tokenizers[family]
    text = data.draw(TEXTS)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    pieces, consumed = replay(IncrementalDetokenizer(tokenizer), chunked(data, tokens))
    assert "".join(pieces) == tokenizer.decode(tokens)
    assert consumed == len(tokens)
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_byte_level_tokens_add_up_to_their_decoding(tokenizers, data):
    tokenizer = tokenizers["byte-level"]
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    pieces, _ = replay(IncrementalDetokenizer(tokenizer), chunked(data, tokens))
    assert "".join(pieces) == tokenizer.decode(tokens)


@pytest.mark.parametrize("family", ["sentencepiece", "metaspace"])
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_sentencepiece_tokens_add_up_to_their_decoding(tokenizers, family, data):
    tokenizer = tokenizers[family]
    # Whole characters out of byte tokens among pieces: broken runs are the next test's.
    character = st.sampled_from("é猫🐈z").map(lambda c: [3 + byte for byte in c.encode()])
    other = st.sampled_from([0, 1, 2, *range(259, tokenizer.vocab_size + 3)]).map(lambda token: [token])
    tokens = [token for part in data.draw(st.lists(character | other, max_size=20)) for token in part]
    pieces, _ = replay(IncrementalDetokenizer(tokenizer), chunked(data, tokens))
    assert "".join(pieces) == tokenizer.decode(tokens)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_broken_byte_tokens_cost_only_themselves(tokenizers, data):
    run = data.draw(st.binary(max_size=12))
    pieces, _ = replay(IncrementalDetokenizer(tokenizers["sentencepiece"]), chunked(data, [3 + byte for byte in run]))
    assert "".join(pieces) == run.removeprefix(b" ").decode("utf-8", errors="replace")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("include_stop", [False, True])
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_stop_string_ends_the_text_where_it_begins(tokenizers, family, include_stop, data):
    tokenizer = tokenizers[family]
    tokens = tokenizer.encode(data.draw(TEXTS), add_special_tokens=False)
    stops = data.draw(st.lists(st.text(st.sampled_from("ab th猫\n"), min_size=1, max_size=4), max_size=3))
    detokenizer = IncrementalDetokenizer(tokenizer, stops, include_stop=include_stop)
    pieces, consumed = replay(detokenizer, chunked(data, tokens))
    text = tokenizer.decode(tokens)
    found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    if not found:
        assert detokenizer.stopped is None
        assert "".join(pieces) == text
        assert consumed == len(tokens)
        return
    end, start, stop = min(found)
    assert detokenizer.stopped == stop
    assert "".join(pieces) == text[: end if include_stop else start]
    # Consumed: up to the token that completes the stop, none behind it.
    assert stop in tokenizer.decode(tokens[:consumed])
    assert not any(stop in tokenizer.decode(tokens[: consumed - 1]) for stop in stops)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_text_is_held_back_exactly_as_long_as_it_may_become_a_stop(tokenizers):
    tokenizer = tokenizers["byte-level"]
    detokenizer = IncrementalDetokenizer(tokenizer, ["bbx", "yz"])
    given_out = [detokenizer.push(ids(tokenizer, character)) for character in "abbbya"]
    assert given_out == ["a", "", "", "b", "bb", "ya"]
    assert detokenizer.finish() == ""


def test_what_is_held_back_comes_at_the_end(tokenizers):
    tokenizer = tokenizers["byte-level"]
    detokenizer = IncrementalDetokenizer(tokenizer, ["bbx"])
    assert detokenizer.push(ids(tokenizer, "abb")) == "a"
    assert detokenizer.finish() == "bb"
    assert detokenizer.stopped is None


def test_half_a_character_at_the_end_becomes_a_replacement(tokenizers):
    tokenizer = tokenizers["byte-level"]
    emoji = ids(tokenizer, "🐈👩")
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push(emoji[:-1]) + detokenizer.finish() == tokenizer.decode(emoji[:-1])
    assert tokenizer.decode(emoji[:-1]).endswith("\ufffd")


def test_a_stop_in_the_middle_of_a_push_drops_the_rest(tokenizers):
    tokenizer = tokenizers["byte-level"]
    detokenizer = IncrementalDetokenizer(tokenizer, ["ca"])
    tokens = [*ids(tokenizer, "x"), *ids(tokenizer, "c"), *ids(tokenizer, "a"), *ids(tokenizer, "zzz")]
    assert detokenizer.push(tokens) == "x"
    assert detokenizer.num_consumed == 3
    assert detokenizer.stopped == "ca"
    assert detokenizer.finish() == ""


def test_the_stop_that_is_complete_first_wins(tokenizers):
    tokenizer = tokenizers["byte-level"]
    for chunks in ([ids(tokenizer, "xabcd")], [ids(tokenizer, character) for character in "xabcd"]):
        detokenizer = IncrementalDetokenizer(tokenizer, ["abcd", "bc", "c"])
        pieces, _ = replay(detokenizer, chunks)
        assert ("".join(pieces), detokenizer.stopped) == ("xa", "bc")


def test_an_answer_may_keep_the_space_that_a_text_loses(tokenizers):
    tokenizer = tokenizers["sentencepiece"]
    tokens = ids(tokenizer, "the cat")
    assert IncrementalDetokenizer(tokenizer).push(tokens) == "the cat"
    assert IncrementalDetokenizer(tokenizer, continues_text=True).push(tokens) == " the cat"


def test_the_cost_of_a_token_does_not_grow_with_the_text(tokenizers):
    tokenizer = tokenizers["byte-level"]
    invalid = tokenizer.encode("猫", add_special_tokens=False)[-1:]  # never a character: nothing to wait for either
    detokenizer = IncrementalDetokenizer(tokenizer, ["never said"])

    def seconds(tokens: list[int]) -> float:
        started = time.perf_counter()
        for token in tokens:
            detokenizer.push([token])
        return time.perf_counter() - started

    tokens = (ids(tokenizer, "the cat sat 🐈 ") + invalid) * 50
    first = min(seconds(tokens) for _ in range(3))
    for _ in range(30):
        seconds(tokens)
    assert min(seconds(tokens) for _ in range(3)) < 3 * first


def test_the_bundled_models_answers_stream_cleanly(smollm2):
    tokenizer = Tokenizer.from_folder(smollm2)
    text = "Voilà: 猫 means cat 🐈‍⬛.\n\n1. Ünïcode\t<|im_end|> done"
    tokens = ids(tokenizer, text)
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push([token]) for token in tokens]
    assert "".join(pieces) + detokenizer.finish() == text.replace("<|im_end|>", "")
    assert all("\ufffd" not in piece for piece in pieces)
