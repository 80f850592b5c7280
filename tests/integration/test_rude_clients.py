"""Clients that vanish, dawdle, shout or stay silent: they harm nobody but themselves."""

import asyncio
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from support.clients import Generation, generate, open_slow_socket, open_socket, receive
from support.services import Service, engine_service, gateway_service

ENDLESS: dict[str, Any] = {"prompt": "the cat", "max_tokens": 8000, "ignore_eos": True}
SETTLE_SECONDS = 60.0


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[Service]:
    with engine_service(model=tiny, num_slots=4) as engine:
        yield engine


@pytest.fixture(scope="module")
def gateway(engine: Service) -> Iterator[Service]:
    with gateway_service(
        engine,
        header_seconds=1.0,
        body_seconds=1.0,
        first_message_seconds=1.0,
        slow_reader_seconds=120.0,
        max_body_bytes=20_000,
    ) as gateway:
        yield gateway


def wait_until_idle(engine: Service) -> None:
    """An endless answer must not run on: its slot is free again long before it would have ended."""
    end = time.monotonic() + SETTLE_SECONDS
    while (info := engine.get("/info"))["num_running"] or info["num_waiting"]:
        assert time.monotonic() < end, info
        time.sleep(0.02)


def wait_for_the_queue(engine: Service, num_waiting: int) -> None:
    end = time.monotonic() + SETTLE_SECONDS
    while (info := engine.get("/info"))["num_waiting"] < num_waiting:
        assert time.monotonic() < end, info
        time.sleep(0.02)


def num_generated(engine: Service) -> float:
    """Tokens that the engine has made in its life."""
    lines = engine.get_text("/metrics").splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("gorgon:generation_tokens_total"))


def test_a_vanished_websocket_frees_its_slot(engine: Service, gateway: Service) -> None:
    async def vanish() -> None:
        async with open_socket(gateway.url) as websocket:
            await websocket.send(json.dumps(ENDLESS))
            await receive(websocket, until=lambda generation: bool(generation.token_ids))
            websocket.transport.abort()

    before = num_generated(engine)
    asyncio.run(vanish())
    wait_until_idle(engine)
    assert num_generated(engine) - before < 8000


def test_a_vanished_rest_client_frees_its_slot(engine: Service, gateway: Service) -> None:
    async def vanish() -> None:
        async with aiohttp.ClientSession() as session:
            with pytest.raises(TimeoutError):
                await session.post(f"{gateway.url}/generate", json=ENDLESS, timeout=aiohttp.ClientTimeout(total=0.2))

    before = num_generated(engine)
    asyncio.run(vanish())
    wait_until_idle(engine)
    assert num_generated(engine) - before < 8000


def test_a_vanished_client_leaves_the_queue(engine: Service, gateway: Service) -> None:
    """Its request waits, and must not be started for nobody."""

    async def vanish() -> None:
        sockets = [open_socket(gateway.url) for _ in range(8)]
        opened = [await one.__aenter__() for one in sockets]
        for websocket in opened[:4]:  # as many as there are slots: the rest can only wait
            await websocket.send(json.dumps(ENDLESS))
            await receive(websocket, until=lambda generation: bool(generation.token_ids))
        for websocket in opened[4:]:
            await websocket.send(json.dumps(ENDLESS))
        await asyncio.to_thread(wait_for_the_queue, engine, 4)
        for websocket in reversed(opened):  # the waiting ones first: no slot is free before they are gone
            websocket.transport.abort()
        for one in sockets:
            await one.__aexit__(None, None, None)

    before = num_generated(engine)
    asyncio.run(vanish())
    wait_until_idle(engine)
    assert num_generated(engine) - before < 8000


def test_a_slow_reader_gets_all_of_it_and_holds_up_nobody(engine: Service, gateway: Service) -> None:
    payload = ENDLESS | {"max_tokens": 1500, "tree_debug": True}

    async def both() -> tuple[Generation, Generation]:
        async with open_slow_socket(gateway.url) as websocket:
            await websocket.send(json.dumps(payload))
            slow = await receive(websocket, until=lambda generation: bool(generation.token_ids))
            quick = await generate(gateway.url, payload)  # from its first token to its last meanwhile
            return await receive(websocket, slow), quick

    slow, quick = asyncio.run(both())
    assert slow.end["finish_reason"] == quick.end["finish_reason"] == "length"
    assert slow.token_ids == quick.token_ids
    assert slow.text == quick.text


def test_a_reader_that_stands_still_is_let_go(engine: Service, tiny: Path) -> None:
    with gateway_service(
        engine, slow_reader_seconds=0.5, max_buffered_messages=8, max_buffered_bytes=16_384
    ) as gateway:

        async def stand_still() -> Generation:
            async with open_slow_socket(gateway.url, close_timeout=1.0) as websocket:
                await websocket.send(json.dumps(ENDLESS | {"tree_debug": True, "logprobs": 20}))  # big messages
                generation = await receive(websocket, until=lambda generation: bool(generation.token_ids))
                await asyncio.to_thread(wait_until_idle, engine)
                return await receive(websocket, generation)

        generation = asyncio.run(stand_still())
    assert generation.end["code"] == "slow_reader"
    assert len(generation.token_ids) < 8000


@pytest.mark.parametrize(
    "beginning",
    [
        b"",
        b"GET /health/live HT",
        b"GET /health/live HTTP/1.1\r\nHost: a\r\n",
        b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{",
    ],
    ids=["silent", "half a line", "half the headers", "half the body"],
)
def test_who_does_not_finish_a_request_is_let_go(gateway: Service, beginning: bytes) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=SETTLE_SECONDS) as connection:
        connection.sendall(beginning)
        while connection.recv(4096):  # an error may be told first
            pass
    assert gateway.status("/health/live") == 200


def test_a_silent_websocket_is_let_go(gateway: Service) -> None:
    async def stay_silent() -> int | None:
        async with open_socket(gateway.url) as websocket:
            async with asyncio.timeout(SETTLE_SECONDS):
                await websocket.wait_closed()
            return websocket.close_code

    assert asyncio.run(stay_silent()) in (1000, 1001, 1008)


TOO_LONG = "1" * 9000  # a token each

BAD_BODIES = [
    (b'{"prompt": "\xff\xfe"}', 400, "invalid_request"),
    (b'{"prompt": "a"', 400, "invalid_request"),
    (b'{"prompt": ["a"]}', 400, "invalid_request"),
    (b'{"prompt": "a", "colour": "red"}', 400, "invalid_request"),
    (json.dumps({"prompt": TOO_LONG}).encode(), 400, "context_length_exceeded"),
    (b'{"prompt": "' + b"a" * 30_000 + b'"}', 413, "too_large"),
]


@pytest.mark.parametrize(("body", "status", "code"), BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_bad_bodies_are_answered_by_one_error(gateway: Service, body: bytes, status: int, code: str) -> None:
    async def post() -> tuple[int, Any]:
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{gateway.url}/generate", data=body, headers={"Content-Type": "application/json"}) as answer,
        ):
            return answer.status, await answer.json()

    got, answer = asyncio.run(post())
    assert (got, answer["error"]["code"]) == (status, code)
    assert "\n" not in answer["error"]["message"]


@pytest.mark.parametrize(("body", "code"), [(body, code) for body, _, code in BAD_BODIES[:5]], ids=range(5))
def test_a_socket_survives_what_it_cannot_read(gateway: Service, body: bytes, code: str) -> None:
    async def talk() -> tuple[Generation, Generation]:
        async with open_socket(gateway.url) as websocket:
            await websocket.send(body, text=b"\xff" not in body)
            refused = await receive(websocket)
            await websocket.send('{"prompt": "the cat", "max_tokens": 3, "ignore_eos": true}')
            return refused, await receive(websocket)

    refused, served = asyncio.run(talk())
    assert refused.end["code"] == code
    assert served.end["finish_reason"] == "length"


def test_too_long_a_prompt_is_told_both_lengths(gateway: Service) -> None:
    answer = asyncio.run(generate(gateway.url, {"prompt": TOO_LONG})).end
    assert {"9000", "8192"} <= set(re.findall(r"\d+", answer["message"])), answer
