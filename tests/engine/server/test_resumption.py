"""An answer that is cut anywhere and asked for again with what there is goes on as if nothing had been: over the wire,
tokens, text, log-probabilities, end and counts."""

from typing import Any

import pytest

from gorgon_protocol.messages import MESSAGE, FinishedMessage, Message, TokenMessage

BODY = {"prompt": "the cat sat", "request_id": "mine", "seed": 11, "max_tokens": 24, "ignore_eos": True}
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 1.5},
    "penalised": {"temperature": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.6},
    "biased": {"temperature": 1.0, "logit_bias": {"5": 4.0}, "top_p": 0.9, "min_p": 0.01, "logprobs": 2},
}


def generate(running: Any, **fields: Any) -> list[Message]:
    response = running.client.post("/generate", json=BODY | fields)
    assert response.status_code == 200, response.text
    return [MESSAGE.validate_json(line) for line in response.text.splitlines()]


def tokens_of(messages: list[Message]) -> list[TokenMessage]:
    return [message for message in messages if isinstance(message, TokenMessage)]


def ids(messages: list[Message]) -> list[int]:
    return [token for message in tokens_of(messages) for token in message.token_ids]


def pieces(messages: list[Message]) -> list[str]:
    """The text that each token released."""
    return [piece for message in tokens_of(messages) for piece in message.pieces]


def logprobs(messages: list[Message]) -> list[float]:
    return [entry.logprob for message in tokens_of(messages) for entry in message.logprobs or ()]


def end(messages: list[Message]) -> FinishedMessage:
    last = messages[-1]
    assert isinstance(last, FinishedMessage)
    return last


def text(messages: list[Message]) -> str:
    return "".join(pieces(messages)) + end(messages).text


def check_every_cut(running: Any, **fields: Any) -> list[Message]:
    """The undisturbed answer."""
    whole = generate(running, **fields)
    said = ids(whole)
    for cut in range(len(said) + 1):
        rest = generate(running, **fields, generated_token_ids=said[:cut])
        assert ids(rest) == said[cut:]
        assert "".join(pieces(whole)[:cut]) + text(rest) == text(whole)
        assert logprobs(rest) == pytest.approx(logprobs(whole)[cut:])
        assert (end(rest).finish_reason, end(rest).stop) == (end(whole).finish_reason, end(whole).stop)
        assert end(rest).usage == end(whole).usage
    return whole


@pytest.mark.parametrize("name", REQUESTS)
def test_every_cut_of_an_answer(name: str, running: Any) -> None:
    assert len(ids(check_every_cut(running, **REQUESTS[name]))) == 24


def test_every_cut_of_an_answer_with_characters_of_several_tokens_and_a_stop_string(running: Any) -> None:
    """The tiny model says bytes at random."""
    drawn = REQUESTS["drawn"]
    undisturbed = generate(running, **drawn)
    assert "" in pieces(undisturbed), "a character that takes several tokens"
    said = text(undisturbed)
    for start in (3, len(said) // 2, len(said) - 6):
        stop = said[start : start + 4]
        stopped = check_every_cut(running, **drawn, stop=["never said", stop])
        assert end(stopped).stop == stop
        assert text(stopped) == said[: said.index(stop)]
