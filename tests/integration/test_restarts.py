"""Gateways and engines that are told to stop, or started anew, with streams running."""

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

from websockets.exceptions import ConnectionClosed

from support.clients import Generation, generate, has_begun, open_socket, receive
from support.services import Service, engine_service, gateway_service

LONG: dict[str, Any] = {"max_tokens": 3000, "ignore_eos": True}


def test_clients_go_on_behind_a_new_gateway(tiny: Path) -> None:
    """With what they have: the tokens, and the seed that a status message told them."""
    with engine_service(model=tiny, num_slots=8, ready=False) as engine:
        asked = [{"prompt": f"cat {number}", "temperature": 0.8, **LONG, "max_tokens": 600} for number in range(8)]
        begun = [Generation() for _ in asked]

        async def until_it_breaks(url: str, payload: dict[str, Any], generation: Generation) -> None:
            try:
                async with open_socket(url) as socket:
                    await socket.send(json.dumps(payload))
                    await receive(socket, generation)
            except ConnectionClosed:
                return

        async def broken(gateway: Service) -> None:
            streams = asyncio.gather(
                *(until_it_breaks(gateway.url, payload, one) for payload, one in zip(asked, begun, strict=True))
            )
            await has_begun(begun, num_tokens=5)
            gateway.kill()
            await streams

        with gateway_service(engine) as gateway:
            asyncio.run(broken(gateway))
        assert any(one.messages[-1]["type"] == "token" for one in begun)
        with gateway_service(engine) as gateway:

            async def go_on(payload: dict[str, Any], generation: Generation) -> Generation:
                said = {"seed": generation.seed, "generated_token_ids": generation.token_ids}
                if generation.messages[-1]["type"] == "finished":
                    return generation
                return await generate(gateway.url, payload | said, generation)

            async def all_of_them() -> tuple[list[Generation], list[Generation]]:
                resumed = await asyncio.gather(*map(go_on, asked, begun))
                whole = [payload | {"seed": one.seed} for payload, one in zip(asked, resumed, strict=True)]
                return resumed, await asyncio.gather(*(generate(gateway.url, payload) for payload in whole))

            resumed, expected = asyncio.run(all_of_them())
    for one, same in zip(resumed, expected, strict=True):
        assert one.token_ids == same.token_ids
        assert one.text == same.text
        assert one.end["usage"] == same.end["usage"]


async def streams_while(url: str, act: Any, *, num_streams: int = 4, **fields: Any) -> list[Generation]:
    """Streams that have begun when `act` is called, and their ends."""
    begun = [Generation() for _ in range(num_streams)]
    streams = asyncio.gather(
        *(generate(url, {"prompt": f"cat {n}", **LONG, **fields}, one) for n, one in enumerate(begun))
    )
    await has_begun(begun)
    act()
    return await streams


def test_a_draining_engine_finishes_what_runs(tiny: Path) -> None:
    with engine_service(model=tiny, num_slots=4, ready=False) as engine, gateway_service(engine) as gateway:
        generations = asyncio.run(
            streams_while(gateway.url, lambda: engine.process.send_signal(signal.SIGTERM), max_tokens=1000)
        )
        assert engine.process.wait(30) == 0
    for one in generations:
        assert one.end["finish_reason"] == "length"
        assert len(one.token_ids) == 1000


def test_a_draining_gateway_finishes_what_runs(tiny: Path) -> None:
    with engine_service(model=tiny, num_slots=4, ready=False) as engine, gateway_service(engine) as gateway:
        generations = asyncio.run(
            streams_while(gateway.url, lambda: gateway.process.send_signal(signal.SIGTERM), max_tokens=1000)
        )
        assert gateway.process.wait(30) == 0
        assert engine.get("/info")["num_running"] == 0
    for one in generations:
        assert one.end["finish_reason"] == "length"
        assert len(one.token_ids) == 1000


def test_what_does_not_end_in_time_is_told(tiny: Path) -> None:
    """The engine's limit is reached and nobody can go on: a typed error, and the engine ends all the same."""
    with (
        engine_service(model=tiny, num_slots=4, drain_seconds=0.3, ready=False) as engine,
        gateway_service(engine) as gateway,
    ):
        generations = asyncio.run(
            streams_while(gateway.url, lambda: engine.process.send_signal(signal.SIGTERM), max_tokens=8000)
        )
        assert engine.process.wait(30) == 0
    assert {one.end.get("code") for one in generations} == {"unavailable"}
