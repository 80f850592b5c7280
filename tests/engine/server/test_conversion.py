"""Between wire and engine: every field has its place, every line is a message of the protocol."""

from dataclasses import replace
from pathlib import Path

import pytest

from gorgon_engine.acceptance import AcceptanceRule
from gorgon_engine.engine import Engine, EngineConfig
from gorgon_engine.events import FinishedEvent, StatusEvent, TokenEvent
from gorgon_engine.logprobs import TokenLogprobs
from gorgon_engine.outcome import StepSeconds, TreeTrace
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.sequence import FinishReason, SpeculationParams
from gorgon_engine.server.conversion import (
    LineWriter,
    Speed,
    TokenChunk,
    TokenTexts,
    error_message,
    finished_message,
    terminal_line,
    to_engine_request,
)
from gorgon_protocol.errors import BadRequestError, ContextLengthError, QueueFullError
from gorgon_protocol.messages import (
    MESSAGE,
    ErrorMessage,
    FinishedMessage,
    StatusMessage,
    TokenLogprob,
    TokenMessage,
    TopLogprob,
    TreeDebug,
)
from gorgon_protocol.messages import (
    StepSeconds as WireStepSeconds,
)
from gorgon_protocol.metrics import MetricsAccumulator, Usage
from gorgon_protocol.requests import EngineRequest

EVENT = TokenEvent(
    request_id="request-1",
    token_ids=[5, 6],
    pieces=["", ' "猫"\n'],
    num_accepted=1,
    step=3,
    num_nodes=4,
    logprobs=[TokenLogprobs(5, -0.25, [(5, -0.25), (9, -2.5)]), TokenLogprobs(6, -1.0, [])],
    trace=TreeTrace(
        tokens=[5, 7, 8],
        parents=[-1, -1, 0],
        depths=[1, 1, 2],
        probabilities=[0.612345678, 0.25, 0.1],
        ranks=[0, 1, 0],
        sources=["head", "lookup", "head"],
        accepted=[True, False, False],
    ),
    seconds=StepSeconds(0.001, 0.02, 0.0005, 0.00025),
    batch_size=2,
)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return Engine.load(EngineConfig(model=str(tiny_model), adaptive=False, context=64))


@pytest.fixture
def writer() -> LineWriter:
    return LineWriter(TokenTexts(lambda token: f"t{token}".encode()))


def test_a_step_is_a_token_message(writer: LineWriter) -> None:
    line = writer.tokens(TokenChunk.of(EVENT, Speed(40.0, 20.0, 2.0)))
    assert line.endswith(b"}\n")
    assert line.count(b"\n") == 1, "a newline inside of a text must not end the line"
    assert MESSAGE.validate_json(line) == TokenMessage(
        text=' "猫"\n',
        token_ids=[5, 6],
        pieces=["", ' "猫"\n'],
        num_accepted=1,
        num_nodes=4,
        logprobs=[
            TokenLogprob(
                token_id=5,
                token="t5",
                logprob=-0.25,
                top=[
                    TopLogprob(token_id=5, token="t5", logprob=-0.25),
                    TopLogprob(token_id=9, token="t9", logprob=-2.5),
                ],
            ),
            TokenLogprob(token_id=6, token="t6", logprob=-1.0, top=[]),
        ],
        tree_debug=TreeDebug(
            candidates=["t5", "t7", "t8"],
            token_ids=[5, 7, 8],
            accepted=[True, False, False],
            parents=[-1, -1, 0],
            depths=[1, 1, 2],
            probabilities=[0.61235, 0.25, 0.1],
            ranks=[0, 1, 0],
            sources=["head", "lookup", "head"],
            num_nodes=4,
            speedup=2.0,
            tokens_per_second=40.0,
            plain_tokens_per_second=20.0,
            step=3,
            step_seconds=WireStepSeconds(draft=0.001, verify=0.02, accept=0.0005, commit=0.00025),
            batch_size=2,
        ),
    )


def test_without_a_tree_and_logprobs_there_are_none(writer: LineWriter) -> None:
    message = MESSAGE.validate_json(
        writer.tokens(TokenChunk.of(replace(EVENT, logprobs=None, trace=None), Speed(None, None, None)))
    )
    assert isinstance(message, TokenMessage)
    assert (message.logprobs, message.tree_debug) == (None, None)


def test_merged_steps_are_one_message_with_the_last_tree(writer: LineWriter) -> None:
    chunk = TokenChunk.of(EVENT, Speed(40.0, 20.0, 2.0))
    chunk.merge(
        TokenChunk.of(
            replace(EVENT, token_ids=[1], pieces=["x"], logprobs=EVENT.logprobs[:1], step=4), Speed(1.0, 1.0, 1.5)
        )
    )
    message = MESSAGE.validate_json(writer.tokens(chunk))
    assert isinstance(message, TokenMessage)
    assert message.text == ' "猫"\nx'
    assert message.token_ids == [5, 6, 1]
    assert len(message.logprobs or ()) == 3
    assert message.tree_debug is not None
    assert (message.tree_debug.step, message.tree_debug.speedup) == (4, 1.5)


def test_a_status_says_whose_it_is(writer: LineWriter) -> None:
    event = StatusEvent(request_id="request-1", state="queued", position=3, progress=None)
    line = writer.status(event, request_id="mine", seed=9)
    assert MESSAGE.validate_json(line) == StatusMessage(
        state="queued", position=3, progress=None, request_id="mine", seed=9
    )


def test_an_end_reports_what_it_cost() -> None:
    accumulator = MetricsAccumulator()
    accumulator.record(num_accepted=2, num_drafted=5)
    event = FinishedEvent(
        request_id="request-1",
        text="held",
        finish_reason=FinishReason.STOP,
        stop="\n",
        usage=Usage(prompt_tokens=3, completion_tokens=4, total_tokens=7),
        metrics=accumulator.summary(),
        tokens_per_second=30.0,
        ttft_seconds=0.5,
        queue_seconds=0.25,
        prefill_seconds=0.25,
        decode_seconds=0.1,
        plain_tokens_per_second=20.0,
    )
    message = MESSAGE.validate_json(terminal_line(finished_message(event, request_id="mine", seed=9, heads="hydra@1")))
    assert isinstance(message, FinishedMessage)
    assert (message.finish_reason, message.stop, message.text) == ("stop", "\n", "held")
    assert (message.request_id, message.seed) == ("mine", 9)
    metrics = message.metrics
    assert metrics.speculative_decoding == accumulator.summary()
    assert (metrics.tokens_per_second, metrics.speedup, metrics.heads) == (30.0, 1.5, "hydra@1")
    assert (metrics.queue_seconds, metrics.prefill_seconds, metrics.ttft_seconds) == (0.25, 0.25, 0.5)


def test_an_error_keeps_its_code_and_remedy() -> None:
    line = terminal_line(error_message(QueueFullError("full", retry_after_seconds=2.0), request_id="mine"))
    assert MESSAGE.validate_json(line) == ErrorMessage(
        code="queue_full", message="full", retry_after_seconds=2.0, request_id="mine"
    )


def test_each_token_is_spelt_once() -> None:
    asked: list[int] = []
    texts = TokenTexts(lambda token: asked.append(token) or f"t{token}".encode())  # type: ignore[func-returns-value]
    assert [texts(3), texts(3), texts(4)] == ["t3", "t3", "t4"]
    assert asked == [3, 4]


def test_parts_of_characters_come_with_their_bytes() -> None:
    spelt = {1: b"a", 2: b" \xe7\x8c", 3: "\ufffd".encode()}
    texts = TokenTexts(spelt.__getitem__)
    assert texts.fields(1) == {"token_id": 1, "token": "a"}
    assert texts.fields(2) == {"token_id": 2, "token": " \ufffd", "bytes": [0x20, 0xE7, 0x8C]}
    assert texts.fields(3)["bytes"] == [0xEF, 0xBF, 0xBD]


def test_every_field_of_a_request_reaches_the_engine(engine: Engine) -> None:
    wire = EngineRequest.model_validate(
        {
            "prompt_token_ids": [5, 6, 7],
            "generated_token_ids": [8],
            "request_id": "mine",
            "client": "alice",
            "timeout_seconds": 3.0,
            "tree_debug": True,
            "max_tokens": 9,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 4,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "presence_penalty": 0.2,
            "frequency_penalty": 0.3,
            "logit_bias": {"12": -5.0},
            "seed": 77,
            "stop": ["a", "b"],
            "stop_token_ids": [3],
            "ignore_eos": True,
            "logprobs": 2,
            "speculation": {"enabled": False, "max_nodes": 8, "acceptance": "typical"},
        }
    )
    request = to_engine_request(engine, wire)
    assert request.prompt == (5, 6, 7)
    assert request.generated == (8,)
    assert (request.client, request.timeout_seconds, request.trace) == ("alice", 3.0, True)
    assert request.sampling == SamplingParams(
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        logit_bias={12: -5.0},
        seed=77,
        stop=("a", "b"),
        stop_token_ids=(3,),
        ignore_eos=True,
        logprobs=2,
    )
    assert request.speculation == SpeculationParams(enabled=False, max_nodes=8, acceptance=AcceptanceRule.TYPICAL)


def test_the_three_kinds_of_prompt(engine: Engine) -> None:
    def tokens(**prompt: object) -> tuple[int, ...]:
        return to_engine_request(engine, EngineRequest.model_validate({"request_id": "a", "seed": 0, **prompt})).prompt

    assert tokens(prompt="the cat") == tuple(engine.tokenizer.encode("the cat"))
    chat = [{"role": "user", "content": "the cat"}]
    assert tokens(messages=chat) == tuple(engine.tokenizer.encode_chat(chat))
    assert tokens(prompt_token_ids=[9, 8]) == (9, 8)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"prompt_token_ids": [5] * 64}, ContextLengthError, ["64 tokens", "holds 64"]),
        ({"prompt_token_ids": [340]}, BadRequestError, ["340"]),
        ({"prompt": "a", "generated_token_ids": [999]}, BadRequestError, ["999"]),
        ({"prompt": "a", "speculation": {"max_nodes": 128}}, BadRequestError, ["max_nodes", "128"]),
    ],
)
def test_what_cannot_run_is_refused_before_it_is_queued(
    fields: dict[str, object], error: type[BadRequestError], words: list[str], engine: Engine
) -> None:
    wire = EngineRequest.model_validate({"request_id": "a", "seed": 0, **fields})
    with pytest.raises(error) as raised:
        to_engine_request(engine, wire)
    assert all(word in str(raised.value) for word in words), raised.value
