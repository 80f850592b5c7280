"""What no request gets past: origins, keys, sizes, times. (WebSockets: test_websocket.py.)"""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gorgon_gateway.callers import new_key
from support.fake_engine import FakeEngine
from support.gateways import RunningGateway, running_gateway

SECONDS = 20.0


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeEngine]:
    with FakeEngine() as engine:
        yield engine


@pytest.fixture(scope="module")
def web_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built page, as small as it can be."""
    folder = tmp_path_factory.mktemp("web")
    (folder / "index.html").write_text("<!doctype html><title>Gorgon</title>")
    (folder / "assets").mkdir()
    (folder / "assets" / "page.js").write_text("export {};")
    return folder


@pytest.fixture(scope="module")
def open_gateway(engine: FakeEngine, web_root: Path) -> Iterator[RunningGateway]:
    with running_gateway(engine.url, max_body_bytes=10_000, body_seconds=0.4, web_root=web_root) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def key() -> Any:
    return new_key("alice")


@pytest.fixture(scope="module")
def closed_gateway(
    engine: FakeEngine, key: Any, web_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(key.line)
    with running_gateway(engine.url, api_keys_file=file, web_root=web_root) as gateway:
        yield gateway


PATHS = ["/generate", "/tokenize", "/detokenize", "/info", "/metrics", "/openapi.json", "/v1/models", "/v1/completions"]


@pytest.mark.parametrize("path", [*PATHS, "/nowhere", "/generate_stream", "/health/live/", "//", "/assets"])
def test_everything_needs_a_key_that_is_not_public(closed_gateway: RunningGateway, path: str) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer gorgon_wrong"},
        {"X-API-Key": "wrong"},
        {"Authorization": "Basic YQ=="},
    ):
        response = httpx.get(closed_gateway.url + path, headers=headers, trust_env=False)
        assert (response.status_code, response.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert response.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/", "/assets/page.js", "/health/live", "/health/ready"])
def test_the_page_and_health_are_public(closed_gateway: RunningGateway, path: str) -> None:
    assert httpx.get(closed_gateway.url + path, trust_env=False).status_code == 200


def test_a_key_in_the_query_is_none(closed_gateway: RunningGateway, key: Any) -> None:
    assert httpx.get(f"{closed_gateway.url}/info?key={key.key}", trust_env=False).status_code == 401


def test_a_known_key_is_let_in(closed_gateway: RunningGateway, key: Any) -> None:
    for headers in ({"Authorization": f"Bearer {key.key}"}, {"X-API-Key": key.key}):
        response = httpx.post(
            f"{closed_gateway.url}/generate", json={"prompt": "a", "max_tokens": 2}, headers=headers, trust_env=False
        )
        assert response.status_code == 200


def test_a_page_of_another_site_cannot_post(open_gateway: RunningGateway) -> None:
    for origin in ("http://evil.example", "null", f"http://localhost:{open_gateway.port}"):
        response = httpx.post(
            f"{open_gateway.url}/generate", content=b'{"prompt": "a"}', headers={"Origin": origin}, trust_env=False
        )
        assert (response.status_code, response.json()["error"]["code"]) == (403, "forbidden")
    own = httpx.post(
        f"{open_gateway.url}/generate",
        json={"prompt": "a", "max_tokens": 2},
        headers={"Origin": open_gateway.url},
        trust_env=False,
    )
    assert own.status_code == 200


def test_an_allowed_origin_is_told_so(engine: FakeEngine) -> None:
    headers = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    with running_gateway(engine.url, allowed_origins="https://app.example") as gateway:
        asked = httpx.options(f"{gateway.url}/generate", headers=headers, trust_env=False)
        assert asked.status_code == 200
        assert asked.headers["Access-Control-Allow-Origin"] == "https://app.example"
        headers["Origin"] = "https://other.example"
        assert httpx.options(f"{gateway.url}/generate", headers=headers, trust_env=False).status_code == 400


def test_security_headers_are_on_every_response(open_gateway: RunningGateway) -> None:
    for path in ("/", "/assets/page.js", "/info", "/nowhere", "/health/ready"):
        response = httpx.get(open_gateway.url + path, trust_env=False)
        assert response.headers["X-Content-Type-Options"] == "nosniff", path
        assert response.headers["X-Frame-Options"] == "DENY"
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert "server" not in response.headers


def exchange(gateway: RunningGateway, *parts: bytes) -> tuple[int, dict[str, Any]]:
    """What is answered to raw bytes, read to the end of the JSON."""
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=SECONDS) as connection:
        for part in parts:
            connection.sendall(part)
        answer = b""
        while b"\r\n\r\n" not in answer or not answer.endswith(b"}"):
            received = connection.recv(65536)
            if not received:
                break
            answer += received
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def test_a_large_body_is_refused_before_it_is_read(open_gateway: RunningGateway) -> None:
    status, answer = exchange(
        open_gateway, b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000000\r\n\r\n"
    )
    assert (status, answer["error"]["code"]) == (413, "too_large")


@pytest.mark.parametrize("path", [b"/generate", b"/v1/completions"])
def test_a_body_without_a_length_is_counted_while_it_comes(open_gateway: RunningGateway, path: bytes) -> None:
    head = b"POST " + path + b" HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"1000\r\n" + b"a" * 0x1000 + b"\r\n"
    status, answer = exchange(open_gateway, head, chunk, chunk, chunk, chunk)
    assert (status, answer["error"]["code"]) == (413, "too_large")


@pytest.mark.parametrize("path", [b"/generate", b"/v1/completions"])
def test_a_body_that_does_not_come_is_not_waited_for(open_gateway: RunningGateway, path: bytes) -> None:
    head = b"POST " + path + b" HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n"
    with socket.create_connection(("127.0.0.1", open_gateway.port), timeout=SECONDS) as connection:
        connection.sendall(head + b'{"prompt"')
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "timeout"


def test_a_connection_is_good_again_behind_a_body_that_was_too_large(open_gateway: RunningGateway) -> None:
    with httpx.Client(base_url=open_gateway.url, trust_env=False) as client:
        for _ in range(3):
            assert client.post("/generate", content=b"a" * 200_000).status_code == 413
            assert client.post("/generate", json={"prompt": "a", "max_tokens": 2}).status_code == 200


def test_who_comes_through_a_trusted_proxy_is_known_by_its_header(engine: FakeEngine, tmp_path: Path) -> None:
    with running_gateway(engine.url, trusted_proxies="127.0.0.1") as gateway:
        headers = {"X-Forwarded-For": "203.0.113.9"}
        # Metrics are for this machine alone, and this caller is another one.
        assert httpx.get(f"{gateway.url}/metrics", headers=headers, trust_env=False).status_code == 403
    with running_gateway(engine.url) as gateway:
        assert httpx.get(f"{gateway.url}/metrics", headers=headers, trust_env=False).status_code == 200
