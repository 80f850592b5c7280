"""The WebSocket as clients use and misuse it, against a whole gateway and a fake engine."""

import asyncio
import base64
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from gorgon_gateway.callers import new_key
from gorgon_protocol.messages import MESSAGE
from support.clients import Generation, generate, open_slow_socket, open_socket, receive
from support.fake_engine import FakeEngine, Faults
from support.gateways import RunningGateway, running_gateway

ENDLESS = {"prompt": "a b c", "max_tokens": 8000, "ignore_eos": True}
SHORT = {"prompt": "a b c", "max_tokens": 5, "ignore_eos": True}
LARGE = {**ENDLESS, "tree_debug": True, "logprobs": 20}  # more than the system's buffers hold
SETTLE_SECONDS = 20.0


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeEngine]:
    with FakeEngine(step_seconds=0.002) as engine:
        yield engine


@pytest.fixture(scope="module")
def gateway(engine: FakeEngine) -> Iterator[RunningGateway]:
    with running_gateway(engine.url, max_body_bytes=20_000) as gateway:
        yield gateway


async def ask(socket: ClientConnection, payload: Any) -> Generation:
    await socket.send(payload if isinstance(payload, str | bytes) else json.dumps(payload))
    return await receive(socket)


def wait_until_idle(engine: FakeEngine) -> None:
    end = time.monotonic() + SETTLE_SECONDS
    while engine.num_running:
        assert time.monotonic() < end, "the engine still generates"
        time.sleep(0.01)


def test_generations_follow_one_another_on_a_socket(gateway: RunningGateway) -> None:
    async def talk() -> list[Generation]:
        async with open_socket(gateway.url) as socket:
            return [
                await ask(socket, {**SHORT, "tree_debug": True, "request_id": f"mine-{number}"}) for number in range(5)
            ]

    for number, generation in enumerate(asyncio.run(talk())):
        for message in generation.messages:
            MESSAGE.validate_python(message)
        assert generation.end["finish_reason"] == "length"
        assert generation.end["request_id"] == f"mine-{number}"
        assert len(generation.token_ids) == generation.end["usage"]["completion_tokens"] == 5
        tree = generation.of("token")[1]["tree_debug"]
        assert len(tree["candidates"]) == len(tree["accepted"]) == len(tree["parents"]) == 15


def test_what_the_seed_asks_for_is_what_it_gets(gateway: RunningGateway) -> None:
    drawn = {**SHORT, "temperature": 1.0, "max_tokens": 30}

    async def talk() -> list[Generation]:
        async with open_socket(gateway.url) as socket:
            first = await ask(socket, drawn)
            again = await ask(socket, {**drawn, "seed": first.seed})
            return [first, again, await ask(socket, drawn)]

    first, again, other = asyncio.run(talk())
    assert first.token_ids == again.token_ids != other.token_ids
    assert first.seed < 2**53


def test_cancel_finishes_the_generation_alone(gateway: RunningGateway, engine: FakeEngine) -> None:
    async def talk() -> tuple[Generation, Generation]:
        async with open_socket(gateway.url) as socket:
            await socket.send(json.dumps(ENDLESS))
            begun = await receive(socket, until=lambda generation: len(generation.token_ids) > 3)
            await socket.send('{"type": "cancel"}')
            await receive(socket, begun)
            await socket.send('{"type": "cancel"}')  # of nothing: it may be late
            return begun, await ask(socket, SHORT)

    cancelled, served = asyncio.run(talk())
    assert cancelled.end["finish_reason"] == "cancelled"
    assert cancelled.end["usage"]["completion_tokens"] == len(cancelled.token_ids) < 8000
    assert cancelled.end["usage"]["prompt_tokens"] == 3
    assert served.end["finish_reason"] == "length"
    wait_until_idle(engine)


def test_a_second_generation_at_a_time_is_refused_and_the_first_goes_on(gateway: RunningGateway) -> None:
    async def talk() -> list[dict[str, Any]]:
        async with open_socket(gateway.url) as socket:
            await socket.send(json.dumps({**SHORT, "max_tokens": 300, "request_id": "first"}))
            await socket.send(json.dumps({**SHORT, "request_id": "second"}))
            await socket.send("{")
            messages: list[dict[str, Any]] = []
            while not messages or messages[-1]["type"] != "finished":
                messages.append(json.loads(await asyncio.wait_for(socket.recv(), SETTLE_SECONDS)))
            return messages

    messages = asyncio.run(talk())
    errors = [message for message in messages if message["type"] == "error"]
    assert [(e["code"], e["request_id"]) for e in errors] == [("busy", None), ("invalid_request", None)]
    assert messages[-1]["request_id"] == "first"
    assert sum(len(m["token_ids"]) for m in messages if m["type"] == "token") == 300


@pytest.mark.parametrize(
    ("payload", "named"),
    [
        ("", "JSON"),
        ("{", "JSON"),
        ("[]", "object"),
        ("null", "object"),
        ('{"prompt": "\\ud800"}', "JSON"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        ("[" * 5000, "JSON"),
        ({"prompt": "a", "colour": "red"}, "colour"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens"),
        ({"prompt": "a", "temperature": None}, "temperature"),
        ('{"prompt": "a", "temperature": NaN}', "temperature"),
        ({"prompt": "a", "seed": 2**70}, "seed"),
        ({"prompt": ""}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "exactly one"),
        ({"prompt": "a", "type": "delete"}, "type"),
        ({"type": "cancel", "reason": "bored"}, "reason"),
        ({"prompt": "a", "request_id": "../../x"}, "request_id"),
        ({"prompt": "a", "model": "another"}, "another"),
    ],
)
def test_what_is_wrong_is_told_and_the_socket_stays_usable(gateway: RunningGateway, payload: Any, named: str) -> None:
    async def talk() -> tuple[Generation, Generation]:
        async with open_socket(gateway.url) as socket:
            return await ask(socket, payload), await ask(socket, SHORT)

    refused, served = asyncio.run(talk())
    assert refused.end["type"] == "error"
    assert named in refused.end["message"]
    assert "\n" not in refused.end["message"]
    assert served.end["type"] == "finished"


@pytest.mark.parametrize(
    ("payload", "code", "close_code"),
    [(b'{"prompt": "\xff"}', "invalid_request", 1007), (b'{"prompt": "' + b"a" * 30_000 + b'"}', "too_large", 1009)],
    ids=["invalid UTF-8", "too large"],
)
def test_what_ends_the_connection_by_the_standard_is_told_before(
    gateway: RunningGateway, payload: bytes, code: str, close_code: int
) -> None:
    async def talk() -> tuple[Generation, int | None]:
        async with open_socket(gateway.url) as socket:
            await socket.send(payload, text=True)
            refused = await receive(socket)
            await socket.wait_closed()
            return refused, socket.close_code

    refused, closed = asyncio.run(talk())
    assert (refused.end["code"], closed) == (code, close_code)


def test_a_client_that_vanishes_frees_the_engine(gateway: RunningGateway, engine: FakeEngine) -> None:
    async def vanish() -> None:
        async with open_socket(gateway.url) as socket:
            await socket.send(json.dumps(ENDLESS))
            await receive(socket, until=lambda generation: bool(generation.token_ids))
            socket.transport.abort()

    asyncio.run(vanish())
    wait_until_idle(engine)


def test_a_slow_reader_loses_no_token_and_holds_up_no_engine() -> None:
    async def stand_still(gateway: RunningGateway, engine: FakeEngine) -> Generation:
        async with open_slow_socket(gateway.url) as socket:
            await socket.send(json.dumps(LARGE))
            begun = await receive(socket, until=lambda generation: bool(generation.token_ids))
            await asyncio.to_thread(wait_until_idle, engine)
            return await receive(socket, begun)

    with FakeEngine() as engine, running_gateway(engine.url, max_buffered_messages=20) as gateway:
        slow = asyncio.run(stand_still(gateway, engine))
        whole = asyncio.run(generate(gateway.url, LARGE))
    assert slow.end["usage"]["completion_tokens"] == len(slow.token_ids) == 8000
    assert (slow.token_ids, slow.text) == (whole.token_ids, whole.text)
    merged = max(slow.of("token"), key=lambda message: len(message["token_ids"]))
    assert len(merged["token_ids"]) == len(merged["pieces"]) > 100
    assert len(merged["logprobs"]) == len(merged["token_ids"])
    assert "".join(merged["pieces"]) == merged["text"]
    MESSAGE.validate_python(merged)


def test_who_reads_nothing_for_too_long_is_told_and_let_go() -> None:
    async def stand_still(gateway: RunningGateway, engine: FakeEngine) -> Generation:
        async with open_slow_socket(gateway.url) as socket:
            await socket.send(json.dumps(LARGE))
            begun = await receive(socket, until=lambda generation: bool(generation.token_ids))
            await asyncio.to_thread(wait_until_idle, engine)
            return await receive(socket, begun)

    with (
        FakeEngine(step_seconds=0.001) as engine,
        running_gateway(engine.url, slow_reader_seconds=0.3, max_buffered_messages=20) as gateway,
    ):
        generation = asyncio.run(stand_still(gateway, engine))
    assert generation.end["code"] == "slow_reader"
    assert 0 < len(generation.token_ids) < 8000


def test_silent_sockets_are_closed(engine: FakeEngine) -> None:
    async def stay_silent(gateway: RunningGateway) -> list[int | None]:
        codes = []
        for has_asked in (False, True):
            async with open_socket(gateway.url) as socket:
                if has_asked:
                    assert (await ask(socket, SHORT)).end["type"] == "finished"
                async with asyncio.timeout(SETTLE_SECONDS):
                    await socket.wait_closed()
                codes.append(socket.close_code)
        return codes

    with running_gateway(engine.url, first_message_seconds=0.3, idle_seconds=0.3) as gateway:
        assert asyncio.run(stay_silent(gateway)) == [1001, 1001]


def test_a_generation_longer_than_the_silence_allowed_goes_on(engine: FakeEngine) -> None:
    with running_gateway(engine.url, first_message_seconds=0.2, idle_seconds=0.2) as gateway:
        generation = asyncio.run(generate(gateway.url, {**SHORT, "max_tokens": 600}))
    assert generation.end["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("origin", "allowed", "is_let_in"),
    [
        (None, [], True),
        ("http://127.0.0.1:{port}", [], True),
        ("http://localhost:{port}", [], False),  # not what the request is addressed to
        ("http://evil.example", [], False),
        ("null", [], False),
        ("https://app.example", ["https://app.example"], True),
        ("https://app.example", ["https://other.example"], False),
        ("http://evil.example", ["*"], True),
    ],
)
def test_pages_of_other_sites_are_kept_out(
    engine: FakeEngine, origin: str | None, allowed: list[str], is_let_in: bool
) -> None:
    async def knock(gateway: RunningGateway) -> str:
        headers = {} if origin is None else {"Origin": origin.format(port=gateway.port)}
        async with open_socket(gateway.url, additional_headers=headers) as socket:
            return str((await ask(socket, SHORT)).end["type"])

    with running_gateway(engine.url, allowed_origins=",".join(allowed)) as gateway:
        if is_let_in:
            assert asyncio.run(knock(gateway)) == "finished"
        else:
            with pytest.raises(InvalidStatus) as refused:
                asyncio.run(knock(gateway))
            assert refused.value.response.status_code == 403
            assert json.loads(refused.value.response.body)["error"]["code"] == "forbidden"


def test_a_name_that_is_made_to_point_here_does_not_lead_in(gateway: RunningGateway) -> None:
    """DNS rebinding: a page's own name resolves to this machine, so that page and gateway have one origin."""

    async def knock() -> None:
        headers = {"Origin": f"http://evil.example:{gateway.port}", "Host": f"evil.example:{gateway.port}"}
        async with open_socket(gateway.url, additional_headers=headers):
            pass

    with pytest.raises(InvalidStatus):
        asyncio.run(knock())


def test_a_wrong_path_is_not_found(gateway: RunningGateway) -> None:
    async def knock() -> None:
        async with connect(f"ws://127.0.0.1:{gateway.port}/generate", proxy=None):
            pass

    with pytest.raises(InvalidStatus) as refused:
        asyncio.run(knock())
    assert refused.value.response.status_code == 404
    error = json.loads(refused.value.response.body)["error"]
    assert error["code"] == "not_found"
    assert "/generate_stream" in error["message"]


def test_a_key_opens_by_header_and_by_subprotocol(engine: FakeEngine, tmp_path: Any) -> None:
    made = new_key("alice")
    file = tmp_path / "keys"
    file.write_text(made.line)
    encoded = base64.urlsafe_b64encode(made.key.encode()).decode().rstrip("=")

    async def knock(gateway: RunningGateway, **arguments: Any) -> tuple[str, str | None]:
        async with open_socket(gateway.url, **arguments) as socket:
            return str((await ask(socket, SHORT)).end["type"]), socket.subprotocol

    with running_gateway(engine.url, api_keys_file=file) as gateway:
        bearer = {"Authorization": f"Bearer {made.key}"}
        assert asyncio.run(knock(gateway, additional_headers=bearer)) == ("finished", None)
        assert asyncio.run(knock(gateway, subprotocols=["gorgon", f"key.{encoded}"])) == ("finished", "gorgon")
        for arguments, status in [
            ({}, 401),
            ({"additional_headers": {"Authorization": "Bearer wrong"}}, 401),
            ({"subprotocols": ["gorgon", "key.d3Jvbmc"]}, 401),
            ({"subprotocols": ["gorgon", "key.!!!"]}, 401),
            ({"subprotocols": [f"key.{encoded}"]}, 400),
        ]:
            with pytest.raises(InvalidStatus) as refused:
                asyncio.run(knock(gateway, **arguments))
            assert refused.value.response.status_code == status


def test_loading_is_told_while_it_lasts() -> None:
    async def talk(gateway: RunningGateway, engine: FakeEngine) -> Generation:
        async with open_socket(gateway.url) as socket:
            await socket.send(json.dumps(SHORT))
            begun = await receive(socket, until=lambda generation: bool(generation.of("status")))
            engine.faults = Faults()
            return await receive(socket, begun)

    with (
        FakeEngine(faults=Faults(loading=True)) as engine,
        running_gateway(engine.url, ready=False) as gateway,
    ):
        generation = asyncio.run(talk(gateway, engine))
    assert generation.messages[0]["state"] == "loading"
    assert generation.end["type"] == "finished"


def test_a_client_that_asks_on_without_reading_is_let_go(engine: FakeEngine) -> None:
    async def shout(gateway: RunningGateway) -> int | None:
        async with open_slow_socket(gateway.url, write_limit=1 << 20, close_timeout=0.5) as socket:
            try:
                async with asyncio.timeout(SETTLE_SECONDS):
                    while True:
                        await socket.send("{" * 100)
            except ConnectionClosed as closed:
                return closed.rcvd.code if closed.rcvd is not None else None

    with running_gateway(engine.url, max_buffered_messages=4, slow_reader_seconds=0.3) as gateway:
        assert asyncio.run(shout(gateway)) in (1008, None)
        assert asyncio.run(generate(gateway.url, SHORT)).end["type"] == "finished"
