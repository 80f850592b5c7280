"""The gateway as a process: how it starts, what it says where it cannot, and how it ends."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from gorgon_gateway.app import create_app
from gorgon_gateway.server import make_config
from gorgon_gateway.settings import GatewaySettings
from support.clients import Generation, generate, has_begun, open_socket, receive
from support.fake_engine import FakeEngine
from support.services import Service, gateway_service

LONG = {"prompt": "a b", "max_tokens": 400, "ignore_eos": True}
STOP_SECONDS = 20.0


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeEngine]:
    with FakeEngine(step_seconds=0.01) as engine:
        yield engine


def run(*arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
    environment = {f"GORGON_GATEWAY_{name.upper()}": str(value) for name, value in settings.items()}
    return subprocess.run(
        [sys.executable, "-m", "gorgon_gateway", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_port_in_use_is_said_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for settings, name in [({"port": port}, "PORT"), ({"port": 0, "metrics_port": port}, "METRICS_PORT")]:
            ended = run(**settings)
            assert ended.returncode == 1
            assert f"port {port} is in use" in ended.stderr
            assert f"GORGON_GATEWAY_{name}" in ended.stderr
            assert ended.stderr.count("\n") == 1


def test_what_cannot_be_used_is_said_in_one_line(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    for settings, named in [
        ({"prot": 8100}, "GORGON_GATEWAY_PORT"),
        ({"engine_secret_file": tmp_path / "none"}, "ENGINE_SECRET_FILE"),
        ({"engine_secret_file": empty}, "ENGINE_SECRET_FILE"),
        ({"api_keys_file": tmp_path / "none"}, str(tmp_path / "none")),
        ({"host": "no.such.host.invalid", "port": 0}, "no.such.host.invalid"),
    ]:
        ended = run(**settings)
        assert ended.returncode == 1, settings
        assert named in ended.stderr
        assert ended.stderr.count("\n") == 1, ended.stderr


def test_a_new_key_is_printed_with_its_line() -> None:
    ended = run("keys", "new", "alice")
    key, line = (text.split(maxsplit=1)[1] for text in ended.stdout.splitlines())
    assert key.startswith("gorgon_")
    assert json.loads(line)["name"] == "alice"
    assert key not in line
    assert run("keys", "new", "a b").returncode == 1


async def with_streams(gateway: Service, numbers: list[int]) -> tuple[list[Generation], int | None]:
    """Streams that have begun when the signals come, and the close code of a socket that waits."""
    begun = [Generation() for _ in range(4)]
    async with open_socket(gateway.url) as idle:
        streams = asyncio.gather(*(generate(gateway.url, LONG, one) for one in begun))
        await has_begun(begun)
        for number in numbers:
            gateway.process.send_signal(number)
            await asyncio.sleep(0.3)
        if len(numbers) == 1:
            # While it drains it says so, and takes nothing new.
            health = await asyncio.to_thread(gateway.get, "/health/ready")
            assert health["state"] == "draining"
            refused = await asyncio.to_thread(
                httpx.post, f"{gateway.url}/generate", json={"prompt": "a"}, trust_env=False
            )
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        await idle.wait_closed()
        return await streams, idle.close_code


def test_who_reads_slowly_is_not_taken_for_dead() -> None:
    """A pong comes behind everything that the reader has not read yet, and for that it has its own time."""
    settings = GatewaySettings(slow_reader_seconds=77.0)
    config = make_config(create_app(settings, {}), settings)
    assert config.ws_ping_timeout is not None
    assert config.ws_ping_timeout > settings.slow_reader_seconds


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_streams_finish(engine: FakeEngine, number: int) -> None:
    with gateway_service(engines=engine.url) as gateway:
        streams, code = asyncio.run(with_streams(gateway, [number]))
        assert gateway.process.wait(STOP_SECONDS) == 0
        assert "Traceback" not in gateway.log
    assert code == 1012
    assert [len(one.token_ids) for one in streams] == [400] * 4
    assert {one.end["finish_reason"] for one in streams} == {"length"}


def test_what_does_not_finish_in_time_is_told(engine: FakeEngine) -> None:
    with gateway_service(engines=engine.url, drain_seconds=0.1) as gateway:

        async def cut() -> Generation:
            async with open_socket(gateway.url) as websocket:
                await websocket.send(json.dumps({**LONG, "max_tokens": 8000}))
                begun = await receive(websocket, until=lambda generation: bool(generation.token_ids))
                gateway.process.send_signal(signal.SIGTERM)
                return await receive(websocket, begun)

        generation = asyncio.run(cut())
        assert gateway.process.wait(STOP_SECONDS) == 0
    assert generation.end["code"] == "unavailable"


def test_a_second_signal_ends_it_at_once(engine: FakeEngine) -> None:
    with gateway_service(engines=engine.url) as gateway:

        async def cut() -> Generation:
            async with open_socket(gateway.url) as websocket:
                await websocket.send(json.dumps({**LONG, "max_tokens": 8000}))
                begun = await receive(websocket, until=lambda generation: bool(generation.token_ids))
                for _ in range(2):
                    gateway.process.send_signal(signal.SIGINT)
                    await asyncio.sleep(0.3)
                return await receive(websocket, begun)

        assert asyncio.run(cut()).end["code"] == "unavailable"
        assert gateway.process.wait(STOP_SECONDS) == 0
        assert "Traceback" not in gateway.log


def test_metrics_have_a_port_of_their_own(engine: FakeEngine) -> None:
    with gateway_service(engines=engine.url, metrics_port=0) as gateway:
        lines = [json.loads(line) for line in gateway.log.splitlines()]
        (url,) = [line["address"] for line in lines if line["event"] == "metrics"]
        response = httpx.get(f"{url}/metrics", trust_env=False)
        assert "gorgon_gateway:engines_ready 1.0" in response.text
        assert httpx.get(f"{url}/info", trust_env=False).status_code == 404
        assert gateway.status("/metrics") == 404
        assert gateway.terminate() == 0


def test_an_open_door_is_said_in_the_log(engine: FakeEngine) -> None:
    with gateway_service(engines=engine.url, host="0.0.0.0") as gateway:
        end = time.monotonic() + STOP_SECONDS
        while "open_to_all" not in gateway.log:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert "GORGON_GATEWAY_API_KEYS_FILE" in gateway.log
