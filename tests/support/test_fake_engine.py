"""The fake engine keeps the real one's promises, or what is tested against it proves nothing."""

import http.client
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from gorgon_protocol.messages import MESSAGE, EngineInfo, ErrorMessage, FinishedMessage, Message, TokenMessage
from support.fake_engine import FakeEngine, Faults


def payload(**fields: Any) -> bytes:
    return json.dumps(
        {"prompt": "once upon a time", "request_id": "r-1", "seed": 7, "ignore_eos": True} | fields
    ).encode()


def post(engine: FakeEngine, **fields: Any) -> list[Message]:
    with urllib.request.urlopen(f"{engine.url}/generate", payload(**fields), timeout=20) as response:
        return [MESSAGE.validate_json(line) for line in response]


def tokens(messages: list[Message]) -> list[int]:
    return [token for message in messages if isinstance(message, TokenMessage) for token in message.token_ids]


def text(messages: list[Message]) -> str:
    return "".join(message.text for message in messages if isinstance(message, TokenMessage | FinishedMessage))


@pytest.fixture(scope="module")
def engine() -> Any:
    with FakeEngine() as engine:
        yield engine


def test_the_answer_depends_on_prompt_and_seed_alone(engine: FakeEngine) -> None:
    drawn = {"max_tokens": 60, "temperature": 1.0}
    first = post(engine, **drawn)
    with FakeEngine(name="another") as other:
        second = post(other, request_id="r-2", **drawn)
    assert (tokens(first), text(first)) == (tokens(second), text(second))
    assert len(first) != len(second) or first != second  # cut into other steps
    assert tokens(post(engine, seed=8, **drawn)) != tokens(first)
    assert tokens(post(engine, seed=8, max_tokens=60)) == tokens(post(engine, seed=9, max_tokens=60))  # greedy


@pytest.mark.parametrize("stop", [[], ["7 w"], ["猫"]])
def test_every_cut_can_be_resumed(engine: FakeEngine, stop: list[str]) -> None:
    fields = {"max_tokens": 80, "ignore_eos": False, "stop": stop}
    whole = post(engine, **fields)
    for cut in range(1, len(whole)):
        begun = whole[:cut]
        rest = post(engine, generated_token_ids=tokens(begun), **fields)
        assert tokens(begun) + tokens(rest) == tokens(whole)
        assert text(begun) + text(rest) == text(whole)
        end, whole_end = rest[-1], whole[-1]
        assert isinstance(end, FinishedMessage)
        assert isinstance(whole_end, FinishedMessage)
        assert (end.usage, end.finish_reason, end.stop) == (whole_end.usage, whole_end.finish_reason, whole_end.stop)
    for word in stop:
        assert word not in text(whole)


def test_a_wrong_resumption_is_refused(engine: FakeEngine) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(engine, generated_token_ids=[3, 3, 3, 3])
    with refused.value as response:
        assert (response.code, json.load(response)["error"]["code"]) == (400, "invalid_request")


def test_metrics_keep_their_identities(engine: FakeEngine) -> None:
    messages = post(engine, max_tokens=101, tree_debug=True, logprobs=2)
    end = messages[-1]
    assert isinstance(end, FinishedMessage)
    spec = end.metrics.speculative_decoding
    assert end.usage.completion_tokens == 101 == 1 + spec.num_spec_steps + spec.num_accepted_draft_tokens
    for message in messages[1:-1]:
        assert isinstance(message, TokenMessage)
        assert message.tree_debug is not None
        assert sum(message.tree_debug.accepted) == message.num_accepted == len(message.token_ids) - 1


@pytest.mark.parametrize(
    ("faults", "num_lines"),
    [(Faults(end_after=3), 3), (Faults(error_after=3), 4), (Faults(garbage_after=2), 3)],
)
def test_faults_come_after_so_many_messages(faults: Faults, num_lines: int) -> None:
    with (
        FakeEngine(faults=faults) as engine,
        urllib.request.urlopen(f"{engine.url}/generate", payload(max_tokens=100), timeout=20) as response,
    ):
        assert len(response.readlines()) == num_lines


@pytest.mark.parametrize("faults", [Faults(drop_after=2), Faults(die_after=2)])
def test_a_dropped_stream_breaks(faults: Faults) -> None:
    with (
        FakeEngine(faults=faults) as engine,
        urllib.request.urlopen(f"{engine.url}/generate", payload(max_tokens=100), timeout=20) as response,
        pytest.raises((ConnectionError, http.client.IncompleteRead)),
    ):
        response.read()


def test_refusals_end_after_their_times() -> None:
    with FakeEngine(faults=Faults(refuse="queue_full", times=1)) as engine:
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(engine, max_tokens=3)
        with refused.value as response:
            assert (response.code, response.headers["Retry-After"]) == (429, "1")
        assert tokens(post(engine, max_tokens=3))


def test_as_a_process(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "support.fake_engine", "--num-slots", "3", "--faults", '{"die_after": 5, "times": 1}'],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    with process:
        assert process.stdout is not None
        url = process.stdout.readline().strip().removeprefix("listening at ")
        with urllib.request.urlopen(f"{url}/info", timeout=20) as response:
            assert EngineInfo.model_validate_json(response.read()).num_slots == 3
        request = urllib.request.Request(f"{url}/_fault", b'{"error_after": 0}')
        with urllib.request.urlopen(request, timeout=20):
            pass
        with urllib.request.urlopen(f"{url}/generate", payload(), timeout=20) as response:
            (line,) = response
            assert isinstance(MESSAGE.validate_json(line), ErrorMessage)
        process.terminate()
        assert process.wait(20) == 0
