"""Engines die while they speak: clients lose nothing and get nothing twice."""

import asyncio
import json
from pathlib import Path
from typing import Any

from support.clients import Generation, generate, has_begun, open_socket, receive
from support.services import engine_service, gateway_service

NUM_STREAMS = 50
NUM_TOKENS = 400


def payloads() -> list[dict[str, Any]]:
    """Greedy, drawn, penalised, with stops, spoken as chats: what an answer may depend on."""
    made: list[dict[str, Any]] = []
    for number in range(NUM_STREAMS):
        payload: dict[str, Any] = {"prompt": f"the cat {number} sat", "max_tokens": NUM_TOKENS, "ignore_eos": True}
        match number % 5:
            case 1:
                payload |= {"temperature": 0.9, "seed": number}
            case 2:
                payload |= {"temperature": 1.2, "seed": number, "repetition_penalty": 1.2, "frequency_penalty": 0.3}
            case 3:
                payload |= {"stop": ["zzzz never said", "the mat on the cat"], "logprobs": 1}
            case 4:
                payload |= {"messages": [{"role": "user", "content": payload.pop("prompt")}], "tree_debug": True}
        made.append(payload)
    return made


async def undisturbed(url: str) -> list[Generation]:
    return await asyncio.gather(*(generate(url, payload) for payload in payloads()))


def test_streams_go_on_when_an_engine_is_killed(tiny: Path) -> None:
    with (
        engine_service(model=tiny, num_slots=50, max_waiting=100, ready=False) as first,
        engine_service(model=tiny, num_slots=50, max_waiting=100, ready=False) as second,
        gateway_service(first, second, ready=False) as gateway,
    ):
        for service in (first, second, gateway):
            service.wait_until_ready()
        expected = asyncio.run(undisturbed(gateway.url))

        async def disturbed() -> list[Generation]:
            begun = [Generation() for _ in range(NUM_STREAMS)]
            streams = asyncio.gather(
                *(generate(gateway.url, payload, one) for payload, one in zip(payloads(), begun, strict=True))
            )
            await has_begun(begun, num_tokens=3)
            first.kill()
            return await streams

        generations = asyncio.run(disturbed())
    for one, same in zip(generations, expected, strict=True):
        assert one.end["type"] == same.end["type"] == "finished"
        assert one.token_ids == same.token_ids
        assert one.text == same.text
        assert (one.end["finish_reason"], one.end["usage"]) == (same.end["finish_reason"], same.end["usage"])
        metrics = one.end["metrics"]["speculative_decoding"]
        histogram = metrics["acceptance_histogram"]
        assert sum(histogram) == metrics["num_spec_steps"]
        assert sum(i * count for i, count in enumerate(histogram)) == metrics["num_accepted_draft_tokens"]
    # Both engines had work, or nothing was shown.
    resumed = [one for one in generations if one.end["metrics"]["num_resumptions"]]
    assert 0 < len(resumed) < NUM_STREAMS
    logged = [entry for one in generations for message in one.of("token") for entry in message.get("logprobs") or ()]
    assert len(logged) == sum(len(one.token_ids) for one in generations[3::5])


def test_with_no_engine_left_a_stream_ends_with_a_typed_error(tiny: Path) -> None:
    with engine_service(model=tiny, ready=False) as engine, gateway_service(engine) as gateway:

        async def orphaned() -> Generation:
            async with open_socket(gateway.url) as socket:
                await socket.send(json.dumps({"prompt": "the cat", "max_tokens": 8000, "ignore_eos": True}))
                begun = await receive(socket, until=lambda generation: bool(generation.token_ids))
                engine.kill()
                await receive(socket, begun)
                # The socket is still good: the next one is refused in its own right.
                await socket.send('{"prompt": "again", "max_tokens": 3}')
                assert (await receive(socket)).end["code"] == "unavailable"
                return begun

        assert asyncio.run(orphaned()).end["code"] == "unavailable"
        assert gateway.status("/health/ready") == 503
        assert gateway.status("/health/live") == 200


def test_an_engine_that_comes_back_is_used(tiny: Path) -> None:
    """On the same port, as a container that is restarted."""
    with engine_service(model=tiny, ready=False) as engine, gateway_service(engine) as gateway:
        engine.kill()
        with engine_service(model=tiny, port=engine.port):
            gateway.wait_until_ready()
            payload = {"prompt": "the cat", "max_tokens": 5, "ignore_eos": True}
            assert len(asyncio.run(generate(gateway.url, payload)).token_ids) == 5
