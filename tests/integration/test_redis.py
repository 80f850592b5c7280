"""Redis comes and goes: engines are found by it, callers are limited by it, streams need it not."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp

from support.clients import Generation, generate, has_begun
from support.services import RedisServer, Service, engine_service, gateway_service


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def ask(gateway: Service, **fields: Any) -> tuple[int, dict[str, Any], str | None]:
    """(status, answer, Retry-After) of a short whole answer."""

    async def post() -> tuple[int, dict[str, Any], str | None]:
        payload = {"prompt": "the cat", "max_tokens": 3, "ignore_eos": True, **fields}
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{gateway.url}/generate", json=payload) as response,
        ):
            return response.status, await response.json(), response.headers.get("Retry-After")

    return asyncio.run(post())


def test_engines_are_found_and_lost_by_their_heartbeats(tiny: Path, redis_service: RedisServer) -> None:
    settings: dict[str, Any] = {"redis_url": redis_service.url, "heartbeat_seconds": 0.2}
    with gateway_service(redis_url=redis_service.url, engines="", ready=False) as gateway:
        wait_until(lambda: is_listening(gateway), "the gateway does not listen")
        assert gateway.status("/health/ready") == 503
        with engine_service(model=tiny, **settings) as engine:
            gateway.wait_until_ready()
            assert ask(gateway)[0] == 200
            engine.kill()
            wait_until(lambda: gateway.status("/health/ready") == 503, "a dead engine's entry does not expire")
        with engine_service(model=tiny, **settings) as engine:
            gateway.wait_until_ready()
            assert engine.terminate() == 0
            wait_until(lambda: gateway.status("/health/ready") == 503, "a stopped engine does not take leave")


def is_listening(service: Service) -> bool:
    try:
        return service.status("/health/live") == 200
    except OSError:
        return False


def test_streams_go_on_without_redis_and_the_directory_comes_back(tiny: Path, redis_service: RedisServer) -> None:
    with (
        engine_service(
            model=tiny, redis_url=redis_service.url, heartbeat_seconds=0.2, num_slots=4, ready=False
        ) as engine,
        gateway_service(redis_url=redis_service.url, engines="") as gateway,
    ):

        async def through_the_outage() -> list[Generation]:
            payload = {"max_tokens": 1200, "ignore_eos": True}
            begun = [Generation() for _ in range(4)]
            streams = asyncio.gather(
                *(generate(gateway.url, {"prompt": f"cat {n}", **payload}, one) for n, one in enumerate(begun))
            )
            await has_begun(begun)
            redis_service.stop()
            return await streams

        for one in asyncio.run(through_the_outage()):
            assert one.end["finish_reason"] == "length"
            assert len(one.token_ids) == 1200
        redis_service.start()  # empty: nothing was on disk
        gateway.wait_until_ready()
        assert ask(gateway)[0] == 200
        assert engine.process.poll() is None


def test_limits_fall_back_to_the_gateways_own(tiny: Path, redis_service: RedisServer) -> None:
    """As documented: while Redis is away each gateway counts for itself, from nothing; nobody is locked out."""
    with (
        engine_service(model=tiny, ready=False) as engine,
        gateway_service(engine, redis_url=redis_service.url, requests_per_minute=3) as gateway,
    ):
        statuses = [ask(gateway)[0] for _ in range(4)]
        assert statuses == [200, 200, 200, 429]
        _, answer, retry_after = ask(gateway)
        assert answer["error"]["code"] == "rate_limit_exceeded"
        assert retry_after is not None
        redis_service.stop()
        statuses = [ask(gateway)[0] for _ in range(4)]
        assert statuses == [200, 200, 200, 429]
        redis_service.start()
        wait_until(lambda: ask(gateway)[0] == 200, "the limits in Redis are not used again")


def test_two_gateways_share_a_callers_limit(tiny: Path, redis_service: RedisServer) -> None:
    limits: dict[str, Any] = {"redis_url": redis_service.url, "requests_per_minute": 4}
    with (
        engine_service(model=tiny, ready=False) as engine,
        gateway_service(engine, **limits, ready=False) as first,
        gateway_service(engine, **limits, ready=False) as second,
    ):
        for service in (first, second):
            service.wait_until_ready()
        statuses = [ask(gateway)[0] for gateway in (first, second) * 3]
    assert statuses == [200, 200, 200, 200, 429, 429]
