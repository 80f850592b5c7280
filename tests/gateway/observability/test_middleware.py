"""The access log of a whole gateway: one line a request, named by the route's template."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from support.clients import generate
from support.fake_engine import FakeEngine
from support.gateways import running_gateway

NOWHERE = "http://127.0.0.1:9"


def access_log(entries: list[MutableMapping[str, Any]]) -> list[tuple[str, str, int]]:
    """(method, route, status) of each request."""
    return [(e["method"], e["route"], e["status"]) for e in entries if e["event"] == "request"]


@pytest.mark.parametrize(
    ("method", "path", "route", "status"),
    [
        ("GET", "/", "/", 200),
        ("GET", "/v1/models", "/v1/models", 200),
        ("GET", "/generate", "/generate", 405),
        ("GET", "/assets/none.js", "/assets", 404),
        ("GET", "/nothing/here", "other", 404),
        ("GET", "/generate_stream", "/generate_stream", 426),
    ],
)
def test_a_request_is_named_by_the_route_that_served_it(method: str, path: str, route: str, status: int) -> None:
    with capture_logs() as entries, running_gateway(NOWHERE, ready=False) as gateway:
        assert httpx.request(method, gateway.url + path, trust_env=False).status_code == status
    assert access_log(entries) == [(method, route, status)]


def test_a_websocket_is_named_by_its_route() -> None:
    with capture_logs() as entries, FakeEngine() as engine, running_gateway(engine.url) as gateway:
        asyncio.run(generate(gateway.url, {"prompt": "a b c", "max_tokens": 3}))
    assert access_log(entries) == [("WEBSOCKET", "/generate_stream", 101)]


def test_a_websocket_to_nowhere_has_no_route(caplog: pytest.LogCaptureFixture) -> None:
    async def knock(url: str) -> int:
        with pytest.raises(InvalidStatus) as refused:
            async with connect(f"{url}/nothing/here", proxy=None):
                pass
        return refused.value.response.status_code

    with capture_logs() as entries, running_gateway(NOWHERE, ready=False) as gateway:
        status = asyncio.run(knock(gateway.url.replace("http", "ws", 1)))
    assert status == 404
    assert access_log(entries) == [("WEBSOCKET", "other", 404)]
    assert not caplog.records, "uvicorn has nothing to say of it"
