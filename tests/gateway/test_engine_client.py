"""The wire to engines: lines however they are cut, and what an engine that misbehaves is taken for."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from gorgon_gateway.engine_client import EngineClient, EngineLost, RelayedMessage, known_error
from gorgon_protocol.errors import ContextLengthError, GorgonError, QueueFullError, UnavailableError
from support.fake_engine import FakeEngine, Faults

TOKEN = {"type": "token", "text": " é猫", "token_ids": [5], "pieces": [" é猫"], "num_accepted": 0, "num_nodes": 1}
FINISHED = {"type": "finished", "text": ""}
BODY = json.dumps({"prompt": "a", "request_id": "r", "seed": 1, "max_tokens": 5}).encode()

Handler = Callable[[web.Request], Coroutine[Any, Any, web.StreamResponse]]


@asynccontextmanager
async def client_of(
    handler: Handler | None = None, secret: str | None = None
) -> AsyncIterator[tuple[EngineClient, str]]:
    """A client, and the URL of a server whose every route is `handler`."""
    app = web.Application()
    if handler is not None:
        app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    client = EngineClient(secret=secret, connect_seconds=1.0)
    await client.start()
    try:
        yield client, f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await client.close()
        await runner.cleanup()


async def read_all(client: EngineClient, url: str) -> tuple[list[RelayedMessage], EngineLost | None]:
    stream = await client.generate(url, BODY)
    messages: list[RelayedMessage] = []
    try:
        while not messages or messages[-1].fields["type"] != "finished":
            messages += await stream.read()
    except EngineLost as lost:
        return messages, lost
    finally:
        stream.close()
    return messages, None


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_lines_come_whole_however_they_are_cut(size: int) -> None:
    lines = [json.dumps(TOKEN, ensure_ascii=False).encode()] * 3 + [b"", json.dumps(FINISHED).encode()]
    content = b"".join(line + b"\n" for line in lines)

    async def serve(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for start in range(0, len(content), size):
            await response.write(content[start : start + size])
            if size < 100:
                await asyncio.sleep(0)
        return response

    async def run() -> None:
        async with client_of(serve) as (client, url):
            messages, lost = await read_all(client, url)
            assert lost is None
            assert [message.fields for message in messages] == [TOKEN, TOKEN, TOKEN, FINISHED]
            assert [message.raw for message in messages] == [line for line in lines if line]

    asyncio.run(run())


@pytest.mark.parametrize(
    "bad",
    [
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"type": "delete"}',
        b'{"text": "a"}',
        b'{"type": "token"}',
        b'{"type": "token", "text": "a", "token_ids": "5", "num_accepted": 0, "num_nodes": 1}',
        b'{"type": "token", "text": null, "token_ids": [], "num_accepted": 0, "num_nodes": 1}',
        b'{"type": "token", "text": "a", "token_ids": [5], "num_accepted": null, "num_nodes": 1}',
        b"a" * (17 << 20),
    ],
    ids=range(11),
)
def test_what_comes_before_nonsense_is_kept(bad: bytes) -> None:
    async def serve(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(json.dumps(TOKEN).encode() + b"\n" + bad + (b"\n" if len(bad) < 1000 else b""))
        await asyncio.sleep(30)
        return response

    async def run() -> None:
        async with client_of(serve) as (client, url):
            messages, lost = await read_all(client, url)
            assert [message.fields for message in messages] == [TOKEN]
            assert lost is not None
            assert len(str(lost)) < 300

    asyncio.run(run())


def answers(status: int, body: bytes, headers: dict[str, str] | None = None) -> Handler:
    async def serve(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, body=body, headers=headers)

    return serve


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (429, b'{"error": {"code": "queue_full", "message": "full", "retry_after_seconds": 7}}', QueueFullError),
        (400, b'{"error": {"code": "context_length_exceeded", "message": "long"}}', ContextLengthError),
        (503, b'{"error": {"code": "unavailable", "message": "loading"}}', UnavailableError),
        (500, b'{"error": {"code": "of_the_future", "message": "new"}}', GorgonError),
        (401, b'{"error": {"code": "invalid_api_key", "message": "secret"}}', EngineLost),
        (500, b"oops", EngineLost),
        (404, b"{}", EngineLost),
        (302, b"{}", EngineLost),
        (200, b"", EngineLost),
    ],
)
def test_refusals_are_told_from_failures(status: int, body: bytes, error: type[Exception]) -> None:
    async def run() -> None:
        async with client_of(answers(status, body, {"Location": "http://127.0.0.1:1/"})) as (client, url):
            stream = await client.generate(url, BODY)
            await stream.read()

    with pytest.raises(error) as raised:
        asyncio.run(run())
    assert type(raised.value) is error
    if isinstance(raised.value, QueueFullError):
        assert raised.value.retry_after_seconds == 7


def test_an_engine_that_is_not_there_is_refused() -> None:
    async def run() -> None:
        async with client_of() as (client, _):
            await client.generate("http://127.0.0.1:9", BODY)

    with pytest.raises(EngineLost) as lost:
        asyncio.run(run())
    assert lost.value.is_refused


def test_the_secret_and_the_trace_are_sent() -> None:
    seen: list[Any] = []

    async def serve(request: web.Request) -> web.StreamResponse:
        seen.append(request.headers.copy())
        return web.json_response({"num_tokens": 3})

    async def run() -> None:
        async with client_of(serve, secret="s3cret") as (client, url):
            await client.call(url, "/tokenize", b"{}")
            await (await client.generate(url, BODY, {"traceparent": "00-1"})).read()

    with pytest.raises(EngineLost):  # the answer to the second is no stream
        asyncio.run(run())
    assert [headers["Authorization"] for headers in seen] == ["Bearer s3cret"] * 2
    assert seen[1]["traceparent"] == "00-1"


def test_closing_wakes_the_reader_and_cancels() -> None:
    async def run(engine: FakeEngine) -> None:
        async with client_of() as (client, _):
            stream = await client.generate(engine.url, BODY)
            await stream.read()
            reader = asyncio.ensure_future(stream.read())
            await asyncio.sleep(0.05)
            stream.close()
            with pytest.raises(EngineLost):
                await reader
            async with asyncio.timeout(10):
                while engine.num_running:
                    await asyncio.sleep(0.005)

    with FakeEngine(faults=Faults(hang_after=1)) as engine:
        asyncio.run(run(engine))


def test_a_slow_answer_is_given_up() -> None:
    async def serve(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.Response()

    async def run() -> None:
        async with client_of(serve) as (client, url):
            await client.ask("GET", f"{url}/info", seconds=0.1)

    with pytest.raises(EngineLost, match="did not answer"):
        asyncio.run(run())


def test_errors_are_known_by_their_code() -> None:
    error = known_error("queue_full", "full", retry_after_seconds=3.0)
    assert isinstance(error, QueueFullError)
    assert (str(error), error.retry_after_seconds) == ("full", 3.0)
    assert known_error("unheard_of", "x").code == "internal"
