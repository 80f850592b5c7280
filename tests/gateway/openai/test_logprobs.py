"""Log-probabilities as OpenAI's two APIs write them."""

from typing import Any

import pytest

from gorgon_gateway.openai.logprobs import CompletionLogprobs, chat_logprobs

PART = "\ufffd"


def entry(token: str, logprob: float, *top: tuple[str, float]) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "top": [{"token": t, "logprob": p} for t, p in top]}


@pytest.mark.parametrize(
    ("chosen", "alternatives"),
    [
        (entry(" a", -0.5, (" a", -0.5), (" b", -2.0)), {" a": -0.5, " b": -2.0}),
        (entry(" c", -4.0, (" a", -0.5), (" b", -2.0)), {" a": -0.5, " b": -2.0, " c": -4.0}),
        # Parts of characters are written alike.
        (entry(" a", -0.5, (" a", -0.5), (PART, -2.0), (PART, -3.0)), {" a": -0.5, PART: -2.0}),
        (entry(PART, -1.7, (PART, -1.7), (PART, -2.1)), {PART: -1.7}),
        (entry(PART, -2.1, (PART, -1.7), (PART, -2.1)), {PART: -2.1}),
    ],
)
def test_the_chosen_token_is_among_the_alternatives(chosen: dict[str, Any], alternatives: dict[str, float]) -> None:
    (found,) = CompletionLogprobs(2).take({"pieces": [chosen["token"]], "logprobs": [chosen]})["top_logprobs"]
    assert found == alternatives
    assert list(found)[: len(alternatives)] == list(alternatives), "likeliest first"


def test_no_alternatives_were_asked_for() -> None:
    taken = CompletionLogprobs(0).take({"pieces": [" a"], "logprobs": [entry(" a", -0.5)]})
    assert taken == {"tokens": [" a"], "token_logprobs": [-0.5], "top_logprobs": None, "text_offset": [0]}


def test_offsets_go_on_from_message_to_message() -> None:
    writer = CompletionLogprobs(0)
    first = writer.take({"pieces": ["ab", ""], "logprobs": [entry("ab", -1.0), entry(PART, -1.0)]})
    second = writer.take({"pieces": ["é"], "logprobs": [entry(PART, -1.0)]})
    assert (first["text_offset"], second["text_offset"]) == ([0, 2], [2])


def test_parts_of_characters_keep_their_bytes() -> None:
    whole, part = chat_logprobs([entry("é", -1.0), entry(PART, -1.0, ("a", -2.0)) | {"bytes": [0xC3]}])
    assert (whole["bytes"], part["bytes"]) == ([0xC3, 0xA9], [0xC3])
    assert part["top_logprobs"] == [{"token": "a", "logprob": -2.0, "bytes": [97]}]
