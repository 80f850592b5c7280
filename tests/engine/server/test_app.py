"""The routes over a real socket: what they answer when asked well, badly, too early, and by strangers."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from gorgon_engine.engine import Engine
from gorgon_engine.events import FinishedEvent, TokenEvent
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.server.loader import load_engine
from gorgon_engine.server.settings import EngineSettings
from gorgon_engine.server.worker import LoadProgress
from gorgon_protocol.errors import ModelNotFoundError
from gorgon_protocol.messages import MESSAGE, EngineInfo, FinishedMessage, Message, TokenMessage

BODY = {"prompt": "the cat sat", "request_id": "mine", "seed": 3, "max_tokens": 24}


def generate(client: httpx.Client, **fields: Any) -> list[Message]:
    response = client.post("/generate", json=BODY | fields)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    return [MESSAGE.validate_json(line) for line in response.text.splitlines()]


def ids(messages: list[Message]) -> list[int]:
    return [token for message in messages if isinstance(message, TokenMessage) for token in message.token_ids]


def end(messages: list[Message]) -> Message:
    assert [m.type in ("finished", "error") for m in messages].count(True) == 1
    assert messages[-1].type in ("finished", "error")
    return messages[-1]


def error(response: httpx.Response, status: int, code: str) -> str:
    """The message of an answer that is one JSON error and nothing else."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    content = response.json()
    assert set(content) == {"error"}
    assert set(content["error"]) == {"code", "message", "retry_after_seconds"}
    assert content["error"]["code"] == code
    assert "\n" not in content["error"]["message"]
    return str(content["error"]["message"])


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_stream_is_what_the_engine_says(running: Any, temperature: float) -> None:
    engine: Engine = running.service.engine
    messages = generate(running.client, temperature=temperature, tree_debug=True, logprobs=2)
    finished = end(messages)
    assert isinstance(finished, FinishedMessage)

    alone = Engine(backbone=engine.backbone, tokenizer=engine.tokenizer, drafters=(), config=engine.config)
    request = alone.request("the cat sat", SamplingParams(max_tokens=24, temperature=temperature, seed=3))
    events = list(alone.generate(request))
    assert ids(messages) == [t for e in events if isinstance(e, TokenEvent) for t in e.token_ids]
    text = "".join(m.text for m in messages if isinstance(m, TokenMessage | FinishedMessage))
    assert text == "".join(e.text for e in events if isinstance(e, TokenEvent | FinishedEvent))
    tokens = [m for m in messages if isinstance(m, TokenMessage)]
    assert all(m.text == "".join(m.pieces) and len(m.pieces) == len(m.token_ids) for m in tokens)
    assert all(m.tree_debug is not None and len(m.logprobs or ()) == len(m.token_ids) for m in tokens)
    assert (finished.request_id, finished.seed) == ("mine", 3)
    assert finished.usage.completion_tokens == len(ids(messages))
    metrics = finished.metrics.speculative_decoding
    assert 1 + metrics.num_spec_steps + metrics.num_accepted_draft_tokens == len(ids(messages))
    assert metrics.num_spec_steps == len(tokens) - 1


def test_a_chat_is_tokenised_by_its_template(running: Any) -> None:
    messages = [{"role": "user", "content": "the cat"}]
    tokens = running.service.engine.tokenizer.encode_chat(messages)
    asked = generate(running.client, prompt=None, messages=messages)
    assert ids(asked) == ids(generate(running.client, prompt=None, prompt_token_ids=tokens))
    finished = end(asked)
    assert isinstance(finished, FinishedMessage)
    assert finished.usage.prompt_tokens == len(tokens)


def test_an_interrupted_answer_goes_on(running: Any) -> None:
    whole = generate(running.client, temperature=0.8)
    said = ids(whole)[:10]
    rest = generate(running.client, temperature=0.8, generated_token_ids=said)
    assert said + ids(rest) == ids(whole)


def test_many_at_once_say_what_each_says_alone(running: Any) -> None:
    alone = [ids(generate(running.client, seed=seed, temperature=0.9)) for seed in range(10)]
    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(lambda seed: generate(running.client, seed=seed, temperature=0.9), range(10)))
    assert [ids(messages) for messages in together] == alone


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", ["not JSON"]),
        (b'{"prompt": "a"', ["not JSON"]),
        (b'"a"', ["object"]),
        (b'{"prompt": "\xff\xfe", "request_id": "a", "seed": 1}', ["not JSON in UTF-8"]),
        (b'{"prompt": "\\ud800", "request_id": "a", "seed": 1}', ["not JSON in UTF-8"]),
        ({"prompt": None}, ["prompt"]),
        ({"prompt": ""}, ["prompt is empty"]),
        ({"seed": None}, ["seed"]),
        ({"seed": -1}, ["seed"]),
        ({"request_id": "a b"}, ["request_id"]),
        ({"request_id": "a\nb"}, ["request_id"]),
        ({"temperature": "hot"}, ["temperature"]),
        ({"temperature": True}, ["temperature"]),
        ({"max_tokens": 0}, ["max_tokens"]),
        ({"stop": [""]}, ["stop.0"]),
        ({"logit_bias": {"a": 1}}, ["logit_bias"]),
        ({"logit_bias": {"1": 1000}}, ["logit_bias.1"]),
        ({"colour": "red"}, ["colour"]),
        ({"speculation": {"acceptance": "always"}}, ["speculation.acceptance"]),
        ({"speculation": {"max_nodes": 64}}, ["max_nodes", "64"]),
        ({"prompt_token_ids": [1]}, ["exactly one"]),
        ({"prompt": None, "prompt_token_ids": [99_999]}, ["99999", "340"]),
        ({"timeout_seconds": 0}, ["timeout_seconds"]),
        ({"client": "x" * 200}, ["client"]),
    ],
)
def test_a_request_that_cannot_be_is_told_why(body: Any, words: list[str], running: Any) -> None:
    content = body if isinstance(body, bytes) else json.dumps(BODY | body).encode()
    message = error(running.client.post("/generate", content=content), 400, "invalid_request")
    assert all(word in message for word in words), message


def test_a_prompt_that_is_too_long_is_told_both_lengths(running: Any) -> None:
    response = running.client.post("/generate", json=BODY | {"prompt": None, "prompt_token_ids": [5] * 600})
    message = error(response, 400, "context_length_exceeded")
    assert "600" in message
    assert "512" in message


def test_another_model_is_not_served_here(running: Any) -> None:
    message = error(running.client.post("/generate", json=BODY | {"model": "gpt-5"}), 404, "not_found")
    assert "gpt-5" in message
    assert "tiny-llama" in message
    assert generate(running.client, model="tiny-llama")


def test_a_body_over_its_cap_is_refused_also_where_its_length_is_not_told(serve: Any) -> None:
    def parts() -> Any:
        for _ in range(100):
            yield b" " * 1000

    with serve(max_body_bytes=4096) as running:
        running.wait_until_ready()
        for content in (b" " * 5000, parts()):
            message = error(running.client.post("/generate", content=content), 413, "too_large")
            assert "4096" in message
        assert generate(running.client), "the engine serves on"


def test_unknown_paths_and_methods_are_one_json_error(running: Any) -> None:
    assert "/nope" in error(running.client.get("/nope"), 404, "not_found")
    response = running.client.get("/generate")
    assert "use POST" in error(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_text_and_tokens_go_both_ways(running: Any) -> None:
    text = "the cat sat, 12 naïve 猫"
    tokenized = running.client.post("/tokenize", json={"text": text}).json()
    assert tokenized["token_ids"] == running.service.engine.tokenizer.encode(text)
    assert tokenized["num_tokens"] == len(tokenized["tokens"]) == len(tokenized["token_ids"])
    assert running.client.post("/detokenize", json={"token_ids": tokenized["token_ids"]}).json() == {"text": text}
    chat = [{"role": "user", "content": "the cat"}]
    tokenized = running.client.post("/tokenize", json={"messages": chat}).json()
    assert tokenized["token_ids"] == running.service.engine.tokenizer.encode_chat(chat)


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/tokenize", {}, ["exactly one"]),
        ("/tokenize", {"text": "a", "messages": [{"role": "user", "content": "a"}]}, ["exactly one"]),
        ("/tokenize", {"text": 7}, ["text"]),
        ("/detokenize", {"token_ids": [-1]}, ["token_ids.0"]),
        ("/detokenize", {"token_ids": [340]}, ["340"]),
        ("/heads/reload", {"version": "../../etc"}, ["version"]),
        ("/heads/reload", {"version": None}, ["GORGON_ENGINE_STORE"]),
    ],
)
def test_the_other_routes_refuse_as_well(path: str, body: Any, words: list[str], running: Any) -> None:
    message = error(running.client.post(path, json=body), 400, "invalid_request")
    assert all(word in message for word in words), message


def test_info_says_what_is_served(running: Any) -> None:
    info = EngineInfo.model_validate(running.info())
    assert (info.model, info.state, info.num_slots, info.max_waiting) == ("tiny-llama", "ready", 4, 8)
    assert (info.context, info.vocab_size, info.device) == (512, 340, "cpu")
    assert len(info.backbone) == 64
    assert [speed.batch_size for speed in info.plain] == [1, 2, 4]
    assert running.client.get("/heads").json()["current"] is None


def test_a_secret_is_wanted_on_every_route_but_the_probes(serve: Any) -> None:
    with serve(secret=b"open-sesame") as running:
        running.wait_until_ready()
        with httpx.Client(base_url=running.url, trust_env=False) as stranger:
            for method, path in (("GET", "/info"), ("POST", "/generate"), ("GET", "/metrics"), ("GET", "/nope")):
                for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "open-sesame"}):
                    response = stranger.request(method, path, headers=headers)
                    assert "Authorization" in error(response, 401, "invalid_api_key")
                    assert response.headers["www-authenticate"] == "Bearer"
            assert stranger.get("/live").status_code == 200
            assert stranger.get("/ready").status_code == 200
        assert running.info()["model"] == "tiny-llama"
        assert ids(generate(running.client))


def test_a_loading_engine_is_live_and_not_ready(serve: Any) -> None:
    go_on = threading.Event()

    def load(settings: EngineSettings, progress: LoadProgress) -> Engine:
        progress("reading the model", 0.25)
        assert go_on.wait(60.0)
        return load_engine(settings, progress)

    with serve(load) as running:
        client = running.client
        running.wait_for(lambda: client.get("/ready").json()["progress"] == 0.25)
        response = client.get("/ready")
        assert response.status_code == 503
        assert response.json()["state"] == "loading"
        assert response.json()["stage"] == "reading the model"
        assert client.get("/live").status_code == 200
        for response in (client.post("/generate", json=BODY), client.post("/tokenize", json={"text": "a"})):
            assert "loading" in error(response, 503, "unavailable")
            assert int(response.headers["retry-after"]) >= 1
        assert EngineInfo.model_validate(running.info()).state == "loading"
        assert "gorgon:engine_ready 0.0" in client.get("/metrics").text
        go_on.set()
        running.wait_until_ready()
        assert client.get("/ready").status_code == 200
        assert ids(generate(client))


def test_a_failed_load_says_why(serve: Any) -> None:
    def load(settings: EngineSettings, progress: LoadProgress) -> Engine:
        raise ModelNotFoundError("no such model: fetch it")

    with serve(load) as running:
        running.wait_for(lambda: running.service.has_failed.is_set())
        response = running.client.get("/ready")
        assert response.status_code == 503
        assert response.json()["state"] == "failed"
        assert response.json()["message"] == "no such model: fetch it"
        assert "fetch it" in error(running.client.post("/generate", json=BODY), 503, "unavailable")


def test_kernels_that_cannot_be_used_are_one_line(serve: Any) -> None:
    with serve(kernels="triton", device="cpu") as running:
        running.wait_for(lambda: running.service.has_failed.is_set())
        message = running.client.get("/ready").json()["message"]
        assert message == "the Triton kernels cannot be used: they need a GPU, and the device is cpu: choose `auto`"


def test_why_a_load_failed_is_told_to_those_with_the_secret_alone(serve: Any) -> None:
    def load(settings: EngineSettings, progress: LoadProgress) -> Engine:
        raise ModelNotFoundError("/home/me/models: no such model")

    with serve(load, secret=b"open-sesame") as running:
        running.wait_for(lambda: running.service.has_failed.is_set())
        assert running.client.get("/ready").json()["message"] == "/home/me/models: no such model"
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            response = httpx.get(f"{running.url}/ready", headers=headers, trust_env=False)
            assert response.status_code == 503
            assert (response.json()["state"], response.json()["message"]) == ("failed", None)
            assert "/home/me" not in response.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "/nonexistent/model"}, ["/nonexistent/model"]),
        ({"heads": "/nonexistent/heads"}, ["/nonexistent/heads"]),
        ({"heads": "none", "drafter": "heads"}, ["GORGON_ENGINE_HEADS", "heads"]),
        ({"device": "abacus"}, ["abacus"]),
        ({"context": 1_000_000}, ["context", "1000000"]),
    ],
)
def test_what_cannot_be_loaded_is_named(settings: dict[str, Any], words: list[str], serve: Any) -> None:
    with serve(**settings) as running:
        running.wait_for(lambda: running.service.has_failed.is_set())
        reason = str(running.service.failure)
    assert "\n" not in reason
    assert all(word in reason for word in words), reason


def test_a_body_that_never_arrives_is_not_waited_for(serve: Any) -> None:
    with serve(body_seconds=0.2) as running:
        running.wait_until_ready()
        with _connection(running) as connection:
            connection.sendall(b'POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{"prompt"')
            answer = _everything(connection)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"did not arrive" in answer


@pytest.mark.parametrize("sent", [b"", b"POST /generate HTT", b"GET /live HTTP/1.1\r\nHost: a\r\nX-Half"])
def test_silent_and_half_sent_headers_are_not_waited_for(sent: bytes, serve: Any) -> None:
    with serve(header_seconds=0.2) as running:
        running.wait_until_ready()
        with _connection(running) as connection:
            connection.sendall(sent)
            assert _everything(connection) == b""
        with httpx.Client(base_url=running.url, trust_env=False) as client:
            assert client.get("/live").status_code == 200
            time.sleep(0.3)
            assert client.get("/live").status_code == 200, "an idle connection between requests is not a silent one"


def _connection(running: Any) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])), timeout=30.0)


def _everything(connection: socket.socket) -> bytes:
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)
