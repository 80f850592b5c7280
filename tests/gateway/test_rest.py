"""REST routes, against a whole gateway and a fake engine."""

import asyncio
import json
import time
from collections.abc import Iterator

import httpx
import pytest

from gorgon_gateway.rest import Answer, GatewayInfo
from gorgon_protocol.messages import TreeDebug
from support.fake_engine import FakeEngine, Faults
from support.gateways import RunningGateway, running_gateway

SETTLE_SECONDS = 20.0


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeEngine]:
    with FakeEngine(step_seconds=0.002) as engine:
        yield engine


@pytest.fixture(scope="module")
def gateway(engine: FakeEngine) -> Iterator[RunningGateway]:
    with running_gateway(engine.url, max_body_bytes=50_000) as gateway:
        yield gateway


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, trust_env=False, timeout=SETTLE_SECONDS) as client:
        yield client


def test_a_whole_answer(client: httpx.Client) -> None:
    payload = {"prompt": "a b c", "max_tokens": 20, "ignore_eos": True, "tree_debug": True, "logprobs": 1, "seed": 4}
    response = client.post("/generate", json=payload, headers={"x-request-id": "mine-1"})
    assert response.status_code == 200
    answer = Answer.model_validate_json(response.content)
    assert answer.request_id == response.headers["x-request-id"] == "mine-1"
    assert (answer.seed, answer.model, answer.finish_reason) == (4, "fake", "length")
    assert len(answer.token_ids) == answer.usage.completion_tokens == 20
    assert answer.logprobs is not None
    assert len(answer.logprobs) == 20
    assert answer.tree_debug is not None
    assert sum(sum(tree.accepted) for tree in answer.tree_debug) == (
        answer.metrics.speculative_decoding.num_accepted_draft_tokens
    )
    assert all(isinstance(tree, TreeDebug) for tree in answer.tree_debug)


def test_what_was_not_asked_for_is_null(client: httpx.Client) -> None:
    answer = client.post("/generate", json={"prompt": "a", "max_tokens": 2}).json()
    assert (answer["logprobs"], answer["tree_debug"]) == (None, None)


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/info", "/v1/models", "/v1/models/fake"])
def test_head_is_get_without_the_body(client: httpx.Client, path: str) -> None:
    head, get = client.head(path), client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(get.content))


def test_the_websocket_says_that_it_is_one(client: httpx.Client) -> None:
    response = client.get("/generate_stream")
    assert (response.status_code, response.headers["upgrade"]) == (426, "websocket")
    assert response.json()["error"]["code"] == "upgrade_required"
    assert "is a WebSocket" in response.json()["error"]["message"]


def test_every_failure_is_described_in_its_own_shape(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        shape = "OpenAIError" if path.startswith("/v1/") else "ErrorAnswer"
        for operation in methods.values():
            for status, response in operation["responses"].items():
                if status != "200" and path != "/health/ready":
                    reference = response["content"]["application/json"]["schema"]["$ref"]
                    assert reference == f"#/components/schemas/{shape}", (path, status)


def test_the_body_is_json_whatever_it_is_called(client: httpx.Client) -> None:
    """As `curl -d` sends it."""
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    assert client.post("/generate", content=b'{"prompt": "a", "max_tokens": 2}', headers=headers).status_code == 200


def test_tokens_of_a_text_and_back(client: httpx.Client) -> None:
    tokenized = client.post("/tokenize", json={"text": "a b c"}).json()
    assert tokenized["num_tokens"] == len(tokenized["token_ids"]) == 3
    text = client.post("/detokenize", json={"token_ids": tokenized["token_ids"]}).json()["text"]
    assert text == "".join(tokenized["tokens"])
    chat = client.post("/tokenize", json={"messages": [{"role": "user", "content": "a b"}]}).json()
    assert chat["num_tokens"] == 3


def test_info_names_models_and_engines(client: httpx.Client, engine: FakeEngine) -> None:
    info = GatewayInfo.model_validate_json(client.get("/info").content)
    assert info.models == ["fake"]
    assert [described.engine_id for described in info.engines] == [engine.name]
    assert engine.url not in client.get("/info").text


def test_health(client: httpx.Client) -> None:
    assert client.get("/health/live").json() == {"state": "live"}
    assert client.get("/health/ready").json() == {"state": "ready"}


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "code", "named"),
    [
        ("POST", "/generate", b"{", 400, "invalid_request", "JSON"),
        ("POST", "/generate", b'{"prompt": "\xff"}', 400, "invalid_request", "UTF-8"),
        ("POST", "/generate", b"", 400, "invalid_request", "JSON"),
        ("POST", "/generate", b'{"prompt": "a", "best_of": 3}', 400, "invalid_request", "best_of"),
        ("POST", "/generate", b'{"prompt": "a", "model": "x"}', 404, "model_not_found", "'x'"),
        (
            "POST",
            "/generate",
            b'{"prompt_token_ids": [' + b"3," * 9000 + b"3]}",
            400,
            "context_length_exceeded",
            "8192",
        ),
        ("POST", "/generate", b'{"prompt": "' + b"a" * 60_000 + b'"}', 413, "too_large", "50000"),
        ("POST", "/tokenize", b'{"text": "a", "messages": []}', 400, "invalid_request", "messages"),
        ("POST", "/detokenize", b'{"token_ids": [9999]}', 400, "invalid_request", "9999"),
        ("POST", "/detokenize", b'{"token_ids": [-1]}', 400, "invalid_request", "token_ids"),
        ("GET", "/generate", None, 405, "method_not_allowed", "POST"),
        ("GET", "/nowhere", None, 404, "not_found", "/nowhere"),
        ("GET", "/assets/../settings.py", None, 404, "not_found", "settings"),
        ("GET", "/assets/%2e%2e/settings.py", None, 404, "not_found", "settings"),
    ],
)
def test_what_is_wrong_is_one_clear_error(
    client: httpx.Client, method: str, path: str, content: bytes | None, status: int, code: str, named: str
) -> None:
    response = client.request(method, path, content=content)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert named in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("faults", "status", "code", "retry_after"),
    [
        (Faults(refuse="queue_full"), 429, "queue_full", "1"),
        (Faults(refuse="unavailable"), 503, "unavailable", "1"),
        (Faults(error_after=2), 500, "internal", None),
        (Faults(error_after=0), 500, "internal", None),
        (Faults(garbage_after=1), 503, "unavailable", "1"),
    ],
)
def test_what_an_engine_refuses_or_breaks_is_told(
    faults: Faults, status: int, code: str, retry_after: str | None
) -> None:
    with FakeEngine(faults=faults) as engine, running_gateway(engine.url) as gateway:
        response = httpx.post(f"{gateway.url}/generate", json={"prompt": "a"}, trust_env=False, timeout=SETTLE_SECONDS)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.headers.get("Retry-After") == retry_after


def test_without_an_engine() -> None:
    with (
        running_gateway("http://127.0.0.1:9", ready=False) as gateway,
        httpx.Client(base_url=gateway.url, trust_env=False) as client,
    ):
        assert client.get("/health/live").status_code == 200
        end = time.monotonic() + SETTLE_SECONDS
        while client.get("/health/ready").json()["state"] != "unavailable":
            assert time.monotonic() < end
        assert client.get("/health/ready").status_code == 503
        for path, payload in [("/generate", {"prompt": "a"}), ("/tokenize", {"text": "a"})]:
            response = client.post(path, json=payload)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
            assert int(response.headers["Retry-After"]) >= 1


def test_loading_is_told_with_its_progress() -> None:
    with (
        FakeEngine(faults=Faults(loading=True)) as engine,
        running_gateway(engine.url, ready=False) as gateway,
        httpx.Client(base_url=gateway.url, trust_env=False) as client,
    ):
        end = time.monotonic() + SETTLE_SECONDS
        while (said := client.get("/health/ready").json()).get("progress") != 0.5:
            assert time.monotonic() < end, said
        assert said == {"state": "loading", "progress": 0.5, "stage": "weights"}
        response = client.post("/generate", json={"prompt": "a"})
        assert (response.status_code, response.headers["Retry-After"]) == (503, "2")


def test_a_client_that_goes_away_frees_the_engine(gateway: RunningGateway, engine: FakeEngine) -> None:
    async def go_away() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        body = json.dumps({"prompt": "a", "max_tokens": 8000, "ignore_eos": True}).encode()
        writer.write(b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        async with asyncio.timeout(SETTLE_SECONDS):
            while not engine.num_running:
                await asyncio.sleep(0.005)
            writer.close()
            while engine.num_running:
                await asyncio.sleep(0.005)

    asyncio.run(go_away())


def test_metrics_are_for_this_machine(client: httpx.Client) -> None:
    response = client.get("/metrics")
    assert response.status_code == 200
    assert "gorgon_gateway:num_requests_running 0.0" in response.text


def test_the_openapi_description_is_whole(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()
    for path in ("/generate", "/tokenize", "/detokenize"):
        body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert body.rsplit("/", 1)[1] in schema["components"]["schemas"]
