"""Engines by their heartbeats, in a real Redis that goes and comes back."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

from redis.asyncio import Redis

from gorgon_gateway.discovery import RedisDiscovery, connect_redis
from support.fake_engine import FakeEngine
from support.gateways import running_relay, settings_for
from support.services import RedisServer, redis_server

SECONDS = 20.0


async def beat(redis: Redis, name: str, url: Any, *, milliseconds: int = 60_000) -> None:
    await redis.set(f"gorgon:engines:{name}", json.dumps({"url": url, "state": "ready"}), px=milliseconds)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not is_so():
            await asyncio.sleep(0.02)


def test_engines_are_those_that_beat() -> None:
    async def run(server: RedisServer, engine: FakeEngine) -> None:
        redis = connect_redis(settings_for(redis_url=server.url))
        assert redis is not None
        async with running_relay("http://127.0.0.1:9", ready=False) as relay:
            discovery = asyncio.ensure_future(RedisDiscovery(redis, relay.engines, ("http://127.0.0.1:9",)).run())
            try:
                await beat(redis, "one", engine.url)
                await beat(redis, "short", "http://127.0.0.1:10", milliseconds=1500)
                # None of these may be spoken to, nor harm the others.
                await beat(redis, "bad-1", "http://169.254.169.254")
                await beat(redis, "bad-2", "file:///etc/passwd")
                await beat(redis, "bad-3", 5)
                await redis.set("gorgon:engines:bad-4", b"\xff")
                await redis.set("gorgon:engines:bad-5", b"[]")
                known = relay.engines
                await until(lambda: len(known.all) == 3)
                await until(lambda: [e.url for e in known.ready] == [engine.url])
                await until(lambda: len(known.all) == 2)
                await redis.delete("gorgon:engines:one")
                await until(lambda: [e.url for e in known.all] == ["http://127.0.0.1:9"])
            finally:
                discovery.cancel()
                await asyncio.gather(discovery, return_exceptions=True)
                await redis.aclose()

    with redis_server() as server, FakeEngine() as engine:
        asyncio.run(run(server, engine))


def test_engines_stay_known_while_redis_is_away() -> None:
    async def run(server: RedisServer, engine: FakeEngine) -> None:
        redis = connect_redis(settings_for(redis_url=server.url))
        assert redis is not None
        async with running_relay("http://127.0.0.1:9", ready=False) as relay:
            listing = RedisDiscovery(redis, relay.engines)
            discovery = asyncio.ensure_future(listing.run())
            try:
                await beat(redis, "one", engine.url)
                await until(lambda: [e.url for e in relay.engines.ready] == [engine.url])
                await asyncio.to_thread(server.stop)
                await until(lambda: listing.is_connected is False)
                assert [e.url for e in relay.engines.ready] == [engine.url]
                await asyncio.to_thread(server.start)
                # It comes back empty: engines have not written yet.
                await until(lambda: bool(listing.is_connected))
                assert [e.url for e in relay.engines.ready] == [engine.url]
            finally:
                discovery.cancel()
                await asyncio.gather(discovery, return_exceptions=True)
                await redis.aclose()

    with redis_server() as server, FakeEngine() as engine:
        asyncio.run(run(server, engine))


def test_without_a_url_there_is_no_redis() -> None:
    assert connect_redis(settings_for("http://127.0.0.1:9")) is None


def test_a_cancellation_is_heeded_whenever_it_comes() -> None:
    """A client that waits with `asyncio.wait_for` may swallow one, and a gateway would not end."""

    async def run(server: RedisServer) -> None:
        redis = connect_redis(settings_for(redis_url=server.url))
        assert redis is not None
        async with running_relay("http://127.0.0.1:9", ready=False) as relay:
            for num_yields in range(60):
                listing = asyncio.ensure_future(RedisDiscovery(redis, relay.engines).run())
                for _ in range(num_yields):
                    await asyncio.sleep(0)
                listing.cancel()
                done, _ = await asyncio.wait((listing,), timeout=SECONDS)
                assert done, f"cancelled after {num_yields} turns of the loop it went on"
        await redis.aclose()

    with redis_server() as server:
        asyncio.run(run(server))
