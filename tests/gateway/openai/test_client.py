"""OpenAI's client, unmodified, sync and async, against a gateway process."""

import asyncio
import hashlib
import inspect
import json
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, DefaultHttpxClient, OpenAI
from openai.resources import completions as text_api
from openai.resources.chat import completions as chat_api
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam

from gorgon_gateway.openai.answers import ChatCompletion as ChatCompletionModel
from gorgon_gateway.openai.answers import Completion as CompletionModel
from gorgon_gateway.openai.schemas import ChatCompletionRequest, CompletionRequest
from gorgon_protocol.requests import EngineRequest
from support.fake_answer import FakeAnswer, text_tokens
from support.fake_engine import FakeEngine, Faults
from support.services import Service, gateway_service

MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "why is the sky blue"},
]


def expected_text(request: EngineRequest) -> str:
    answer = FakeAnswer(request, engine="any", context=8192)
    text = ""
    while answer.end is None:
        text += answer.next_step()["text"]
    return text + str(answer.finished()["text"])


def test_models(client: OpenAI, engine: FakeEngine) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("fake", "model", "gorgon")
    assert client.models.retrieve("fake") == model
    assert abs(time.time() - model.created) < 86_400, "without heads that have a date, the gateway's start"
    with pytest.raises(openai.NotFoundError, match="'other/model' is not served here: this gateway serves fake"):
        client.models.retrieve("other/model")


def test_chat(client: OpenAI, engine: FakeEngine) -> None:
    response = client.chat.completions.with_raw_response.create(model="fake", messages=MESSAGES, seed=7, max_tokens=40)
    ChatCompletionModel.model_validate_json(response.text)  # the documented shape, nothing more and nothing less
    answer = response.parse()
    (request,) = engine.requests
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == expected_text(request)
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert (answer.object, answer.model) == ("chat.completion", "fake")
    assert answer.id == f"chatcmpl-{response.headers['x-request-id']}"
    assert answer.system_fingerprint is not None
    assert answer.system_fingerprint.startswith("fp_")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (9, 40, 49)
    # OpenAI's defaults, not the engine's
    assert (request.seed, request.temperature, request.top_p, request.max_tokens) == (7, 1.0, 1.0, 40)
    assert request.messages is not None
    assert [(m.role, m.content) for m in request.messages] == [(m["role"], m.get("content")) for m in MESSAGES]


def test_what_speculation_did_is_told(client: OpenAI, engine: FakeEngine) -> None:
    answer = client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=40, seed=7)
    told: dict[str, Any] = (answer.model_extra or {})["gorgon"]
    assert told["seed"] == 7
    assert told["metrics"]["speedup"] == 2.0
    counts = told["metrics"]["speculative_decoding"]
    assert 1 + counts["num_spec_steps"] + counts["num_accepted_draft_tokens"] == 40


@pytest.mark.parametrize("include_usage", [True, False])
def test_a_chat_in_chunks_is_the_chat(client: OpenAI, engine: FakeEngine, include_usage: bool) -> None:
    whole = client.chat.completions.create(model="fake", messages=MESSAGES, seed=7, max_tokens=40)
    chunks: list[ChatCompletionChunk] = list(
        client.chat.completions.create(
            model="fake",
            messages=MESSAGES,
            seed=7,
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": include_usage},
        )
    )
    usage = chunks.pop() if include_usage else None
    assert all(len(chunk.choices) == 1 for chunk in chunks)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.role for delta in deltas] == ["assistant", *[None] * (len(deltas) - 1)]
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [*[None] * (len(chunks) - 1), "length"]
    assert len({(chunk.id, chunk.created, chunk.model, chunk.system_fingerprint) for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)
    assert (chunks[-1].model_extra or {})["gorgon"]["metrics"]["speedup"] == 2.0
    if usage is not None:
        assert (usage.choices, usage.usage) == ([], whole.usage)


def test_n_answers_have_seeds_of_their_own(client: OpenAI, engine: FakeEngine) -> None:
    answer = client.chat.completions.create(model="fake", messages=MESSAGES, seed=7, n=3, max_tokens=30)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, 90)
    assert texts[0] == expected_text(next(r for r in engine.requests if r.request_id.endswith("-0")))
    told: dict[str, Any] = (answer.model_extra or {})["gorgon"]
    assert [each["index"] for each in told["choices"]] == [0, 1, 2]

    alone = client.chat.completions.create(model="fake", messages=MESSAGES, seed=7, max_tokens=30)
    assert alone.choices[0].message.content == texts[0]
    again = client.chat.completions.create(model="fake", messages=MESSAGES, seed=7, n=3, max_tokens=30)
    assert [choice.message.content for choice in again.choices] == texts
    third = told["choices"][2]["seed"]
    assert client.chat.completions.create(
        model="fake", messages=MESSAGES, seed=third, max_tokens=30
    ).choices[0].message.content == texts[2]  # fmt: skip


def test_n_answers_in_chunks_are_told_apart(client: OpenAI, engine: FakeEngine) -> None:
    whole = client.chat.completions.create(model="fake", messages=MESSAGES, seed=7, n=4, max_tokens=30)
    texts = dict.fromkeys(range(4), "")
    ends: list[int] = []
    roles: list[int] = []
    indices: list[int] = []
    for chunk in client.chat.completions.create(
        model="fake", messages=MESSAGES, seed=7, n=4, max_tokens=30, stream=True
    ):
        (choice,) = chunk.choices
        assert choice.index not in ends
        texts[choice.index] += choice.delta.content or ""
        indices.append(choice.index)
        roles += [choice.index] * (choice.delta.role == "assistant")
        ends += [choice.index] * (choice.finish_reason is not None)
    assert list(texts.values()) == [choice.message.content for choice in whole.choices]
    assert sorted(ends) == sorted(roles) == [0, 1, 2, 3]
    assert sum(a != b for a, b in pairwise(indices)) > 6, "one after another is not side by side"


@pytest.mark.parametrize("is_streamed", [True, False])
def test_stop(client: OpenAI, engine: FakeEngine, is_streamed: bool) -> None:
    free = client.chat.completions.create(model="fake", messages=MESSAGES, seed=7, max_tokens=40)
    text = free.choices[0].message.content or ""
    stop = text.split()[12]
    arguments: dict[str, Any] = {"model": "fake", "messages": MESSAGES, "seed": 7, "stop": ["never", stop]}
    if is_streamed:
        chunks = list(client.chat.completions.create(**arguments, stream=True))
        told = (chunks[-1].model_extra or {})["gorgon"]
        given = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        answer = client.chat.completions.create(**arguments)
        told = (answer.model_extra or {})["gorgon"]
        given, reason = answer.choices[0].message.content or "", answer.choices[0].finish_reason
    assert given == text[: text.index(stop)]
    assert (reason, told["stop"]) == ("stop", stop)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_logprobs_of_a_chat(client: OpenAI, engine: FakeEngine, is_streamed: bool) -> None:
    arguments: dict[str, Any] = {
        "model": "fake", "messages": MESSAGES, "seed": 7, "max_tokens": 20, "logprobs": True, "top_logprobs": 3
    }  # fmt: skip
    if is_streamed:
        chunks = list(client.chat.completions.create(**arguments, stream=True))
        logprobs = [chunk.choices[0].logprobs for chunk in chunks]
        content = [entry for each in logprobs if each is not None for entry in each.content or ()]
    else:
        answer = client.chat.completions.create(**arguments)
        assert answer.choices[0].logprobs is not None
        content = answer.choices[0].logprobs.content or []
    assert len(content) == 20
    assert all(entry.logprob == -0.5 and len(entry.top_logprobs) == 3 for entry in content)
    assert all(bytes(entry.bytes or ()).decode() == entry.token for entry in content)
    (request,) = engine.requests
    assert request.logprobs == 3
    assert "".join(entry.token for entry in content) == expected_text(request)


def test_logprobs_without_alternatives(client: OpenAI, engine: FakeEngine) -> None:
    answer = client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=3, logprobs=True)
    assert answer.choices[0].logprobs is not None
    assert [entry.top_logprobs for entry in answer.choices[0].logprobs.content or ()] == [[], [], []]


def test_completion(client: OpenAI, engine: FakeEngine) -> None:
    response = client.completions.with_raw_response.create(model="fake", prompt="once upon a time", seed=3)
    CompletionModel.model_validate_json(response.text)
    answer = response.parse()
    assert (answer.object, answer.choices[0].finish_reason) == ("text_completion", "length")
    assert answer.choices[0].text == expected_text(engine.requests[0])
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 16)  # 16: OpenAI's default


def test_prompts_may_be_several_texts_or_token_ids(client: OpenAI, engine: FakeEngine) -> None:
    def texts(prompt: Any, **more: Any) -> list[str]:
        answer: Completion = client.completions.create(model="fake", prompt=prompt, seed=3, **more)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    words = ["once upon a time", "the end"]
    one, two = texts(words[0]), texts(words[1])
    assert texts(words) == one + two
    assert texts([text_tokens(word) for word in words]) == one + two
    assert texts(text_tokens(words[1])) == two
    twice = texts(words, n=2)
    assert [twice[0], twice[2]] == one + two
    assert twice[1] not in twice[::2]


def test_more_answers_than_may_run_at_once(client: OpenAI, engine: FakeEngine) -> None:
    prompts = [f"story {i}" for i in range(16)]
    most = 0
    texts = [""] * 16
    for chunk in client.completions.create(model="fake", prompt=prompts, seed=1, stream=True):
        most = max(most, engine.num_running)
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert 2 <= most <= 4
    by_prompt = {request.prompt: expected_text(request) for request in engine.requests}
    assert texts == [by_prompt[prompt] for prompt in prompts]


@pytest.mark.parametrize("is_streamed", [True, False])
def test_logprobs_of_a_completion(client: OpenAI, engine: FakeEngine, is_streamed: bool) -> None:
    arguments: dict[str, Any] = {"model": "fake", "prompt": "once upon", "seed": 3, "logprobs": 2, "max_tokens": 30}
    answers = list(client.completions.create(**arguments, stream=True)) if is_streamed else [
        client.completions.create(**arguments)
    ]  # fmt: skip
    text = "".join(answer.choices[0].text for answer in answers)
    parts = [answer.choices[0].logprobs for answer in answers if answer.choices[0].logprobs is not None]
    tokens = [token for part in parts for token in part.tokens or ()]
    offsets = [offset for part in parts for offset in part.text_offset or ()]
    tops = [top for part in parts for top in part.top_logprobs or ()]
    assert "".join(tokens) == text
    assert len(tokens) == len(offsets) == len(tops) == 30
    # The engine holds some characters back: an offset is where the token's text begins, or up to two characters early.
    begins = [len("".join(tokens[:i])) for i in range(30)]
    assert all(0 <= begin - offset <= 2 for begin, offset in zip(begins, offsets, strict=True))
    assert offsets == sorted(offsets)


def test_every_parameter_reaches_the_engine(client: OpenAI, engine: FakeEngine) -> None:
    client.chat.completions.create(
        model="fake",
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]}
        ],
        temperature=0.5,
        top_p=0.25,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"17": 5},
        max_completion_tokens=9,
        stop="never",
        seed=-1,
        user="somebody",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        response_format={"type": "text"},
        tools=[],
        extra_body={
            "top_k": 40,
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "stop_token_ids": [3],
            "ignore_eos": True,
            "speculation": {"max_nodes": 8},
        },
    )
    (request,) = engine.requests
    said = request.model_dump(exclude_defaults=True, exclude={"request_id", "client", "timeout_seconds"})
    assert said == {
        "messages": [{"role": "system", "content": "be\nbrief"}],
        "temperature": 0.5,
        "top_p": 0.25,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"17": 5.0},
        "max_tokens": 9,
        "stop": ["never"],
        "seed": 2**63 - 1,
        "top_k": 40,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "stop_token_ids": [3],
        "ignore_eos": True,
        "speculation": {"max_nodes": 8},
    }


def test_nothing_of_the_mass_leaves_the_likeliest_token(client: OpenAI, engine: FakeEngine) -> None:
    client.chat.completions.create(model="fake", messages=MESSAGES, top_p=0, max_tokens=1)
    assert engine.requests[0].top_p == 1e-9


def test_an_answer_can_be_sent_back_as_it_came(client: OpenAI, engine: FakeEngine) -> None:
    answer = client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=5)
    said: Any = answer.choices[0].message
    client.chat.completions.create(model="fake", messages=[*MESSAGES, said, MESSAGES[1]], max_tokens=5)
    assert engine.requests[1].messages is not None
    assert [message.role for message in engine.requests[1].messages] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize(
    ("resource", "model"), [(chat_api.Completions, ChatCompletionRequest), (text_api.Completions, CompletionRequest)]
)
def test_every_parameter_of_the_client_is_known(resource: type[Any], model: Any) -> None:
    """Served, accepted or refused by name: never called unknown."""
    of_http = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    parameters = set(inspect.signature(resource.create).parameters) - of_http
    assert parameters <= set(model.model_fields) | set(model.refused)


def test_values_that_ask_for_nothing_are_taken(client: OpenAI, engine: FakeEngine) -> None:
    client.chat.completions.create(
        model="fake",
        messages=[
            {
                "role": "user",
                "content": [{"type": "text", "text": "a", "prompt_cache_breakpoint": {"mode": "explicit"}}],
            }
        ],
        reasoning_effort="none",
        verbosity="medium",
        parallel_tool_calls=True,
        prompt_cache_key="k",
        prompt_cache_options={"mode": "implicit"},
        prompt_cache_retention="24h",
        max_tokens=1,
    )
    client.completions.create(model="fake", prompt="a", suffix="", echo=False, best_of=1, max_tokens=1)
    assert len(engine.requests) == 2


@pytest.mark.parametrize(
    ("arguments", "param", "code", "message"),
    [
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            "tools",
            "unsupported_parameter",
            "not supported",
        ),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter", "not supported"),
        ({"extra_body": {"wings": 2}}, "wings", "unknown_parameter", "no such parameter"),
        ({"n": 5}, "n", "invalid_value", "at most 4"),
        ({"temperature": 2.5}, "temperature", "invalid_value", "less than or equal to 2"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value", "top_logprobs: needs logprobs: true"),
        ({"stream_options": {}}, "stream_options", "invalid_value", "stream_options: needs stream: true"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", "invalid_value", "give one of them"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "invalid_type",
            "images, audio and files are not supported",
        ),
    ],
)
def test_bad_requests_name_the_field(
    client: OpenAI, engine: FakeEngine, arguments: dict[str, Any], param: str | None, code: str, message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.chat.completions.create(**{"model": "fake", "messages": MESSAGES} | arguments)
    assert (caught.value.param, caught.value.code, caught.value.type) == (param, code, "invalid_request_error")
    assert caught.value.request_id
    assert not engine.requests


def test_a_prompt_that_is_too_long(client: OpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.BadRequestError, match="prompt is 9000 tokens long and the context holds 8192") as caught:
        client.completions.create(model="fake", prompt="word " * 9000, stream=True)
    assert caught.value.code == "context_length_exceeded"


def test_an_unknown_model(client: OpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-4o' is not served here") as caught:
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_full_queue_says_when_to_come_back(client: OpenAI, engine: FakeEngine, is_streamed: bool) -> None:
    engine.faults = Faults(refuse="queue_full")
    with pytest.raises(openai.RateLimitError, match="requests wait already") as caught:
        client.chat.completions.create(model="fake", messages=MESSAGES, n=2, stream=is_streamed)
    assert caught.value.code == "queue_full"
    assert int(caught.value.response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("is_streamed", [True, False])
def test_no_engine(client: OpenAI, engine: FakeEngine, is_streamed: bool) -> None:
    engine.faults = Faults(loading=True)
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="fake", messages=MESSAGES, stream=is_streamed)
    assert caught.value.status_code == 503
    assert caught.value.type == "server_error"
    assert caught.value.response.headers["retry-after"]


def test_a_failure_in_the_middle_of_a_stream_is_raised(client: OpenAI, engine: FakeEngine) -> None:
    engine.faults = Faults(error_after=3)
    seen = 0
    with pytest.raises(openai.APIError, match="asked for by the test") as caught:  # noqa: PT012
        for chunk in client.chat.completions.create(model="fake", messages=MESSAGES, stream=True):
            seen += bool(chunk.choices[0].delta.content)
    assert seen >= 1
    assert (caught.value.code, caught.value.type) == ("internal", "server_error")


def test_a_failure_in_the_middle_of_a_whole_answer_has_a_status(client: OpenAI, engine: FakeEngine) -> None:
    engine.faults = Faults(error_after=3)
    with pytest.raises(openai.InternalServerError, match="asked for by the test"):
        client.chat.completions.create(model="fake", messages=MESSAGES)


def test_the_async_client(gateway: Service, engine: FakeEngine) -> None:
    async def body() -> None:
        http = DefaultAsyncHttpxClient(trust_env=False)
        async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0, http_client=http) as client:
            whole, stream = await asyncio.gather(
                client.chat.completions.create(model="fake", messages=MESSAGES, seed=5, max_tokens=30),
                client.chat.completions.create(model="fake", messages=MESSAGES, seed=5, max_tokens=30, stream=True),
            )
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert text == whole.choices[0].message.content
            assert [model.id async for model in client.models.list()] == ["fake"]
            with pytest.raises(openai.BadRequestError, match="n: 100, and this gateway gives at most 4"):
                await client.completions.create(model="fake", prompt="x", n=100)

    asyncio.run(body())


# With keys and limits


@pytest.fixture(scope="module")
def strict(engine_server: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Lets two callers in."""

    def line(name: str, **limits: int) -> str:
        digest = hashlib.sha256(f"key-of-{name}".encode()).hexdigest()
        return json.dumps({"name": name, "sha256": digest, **limits})

    keys: Path = tmp_path_factory.mktemp("keys") / "keys.jsonl"
    keys.write_text(
        "\n".join([line("alice"), line("bob", requests_per_minute=2, tokens_per_minute=600), line("eve")]) + "\n"
    )
    with gateway_service(engines=engine_server.url, api_keys_file=keys) as service:
        yield service


def client_of(gateway: Service, key: str) -> OpenAI:
    http = DefaultHttpxClient(trust_env=False)
    return OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0, http_client=http)


def test_keys(strict: Service, engine: FakeEngine) -> None:
    with client_of(strict, "key-of-alice") as alice:
        answer = alice.chat.completions.with_raw_response.create(model="fake", messages=MESSAGES, max_tokens=3)
        assert not [name for name in answer.headers if name.startswith("x-ratelimit")]
    assert engine.requests[-1].client == "key:alice"
    with client_of(strict, "key-of-mallory") as mallory:
        with pytest.raises(openai.AuthenticationError, match="the API key is not known") as caught:
            mallory.chat.completions.create(model="fake", messages=MESSAGES)
        assert (caught.value.code, caught.value.type) == ("invalid_api_key", "authentication_error")
        with pytest.raises(openai.AuthenticationError):
            mallory.models.list()
    assert "key-of" not in strict.log


def test_limits(strict: Service, engine: FakeEngine) -> None:
    with client_of(strict, "key-of-bob") as bob:
        for remaining in ("1", "0"):
            answer = bob.completions.with_raw_response.create(model="fake", prompt="hi", max_tokens=10)
            assert answer.headers["x-ratelimit-limit-requests"] == "2"
            assert answer.headers["x-ratelimit-remaining-requests"] == remaining
            assert int(answer.headers["x-ratelimit-remaining-tokens"]) >= 580
        with pytest.raises(openai.RateLimitError, match="your 2 requests a minute are used up") as caught:
            bob.completions.create(model="fake", prompt="hi", stream=True)
        headers = caught.value.response.headers
        assert caught.value.code == "rate_limit_exceeded"
        assert 1 <= int(headers["retry-after"]) <= 30
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert headers["x-ratelimit-limit-tokens"] == "600"
