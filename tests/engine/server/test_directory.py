"""The engine and a real Redis: heartbeats, announcements, and Redis going and coming back."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from gorgon_engine.server.directory import EngineDirectory, listen_for_heads
from gorgon_protocol.messages import MESSAGE
from gorgon_trainer.publish import publish
from support.services import RedisServer, redis_server

BODY = {"prompt": "the cat", "request_id": "mine", "seed": 3, "max_tokens": 8}


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as started:
        yield started


@pytest.fixture
def redis(server: RedisServer) -> Iterator[Redis]:
    with Redis.from_url(server.url, decode_responses=True) as client:
        client.flushall()
        yield client


def entries(redis: Redis) -> list[dict[str, Any]]:
    return [json.loads(str(redis.get(key) or "{}")) for key in redis.scan_iter("gorgon:engines:*")]


def test_a_ready_engine_is_in_the_directory_until_it_ends(serve: Any, server: RedisServer, redis: Redis) -> None:
    with serve(redis_url=server.url, engine_id="one", heartbeat_seconds=0.1) as running:
        running.wait_until_ready()
        running.wait_for(lambda: [e.get("state") for e in entries(redis)] == ["ready"])
        assert list(redis.scan_iter("gorgon:*")) == ["gorgon:engines:one"]
        (entry,) = entries(redis)
        assert entry == {
            "url": running.url.replace("127.0.0.1:", "127.0.0.1:"),
            "model": "tiny-llama",
            "backbone": running.info()["backbone"],
            "num_slots": 8,
            "num_running": 0,
            "num_waiting": 0,
            "kv_cache_usage": 0.0,
            "heads": None,
            "state": "ready",
        }
        assert 0 < int(redis.pttl("gorgon:engines:one")) <= 300  # type: ignore[arg-type]
    assert entries(redis) == []


def test_an_engine_says_at_once_that_it_drains(serve: Any, server: RedisServer, redis: Redis) -> None:
    with serve(redis_url=server.url, advertise_url="http://engine-1:8101/", heartbeat_seconds=30) as running:
        running.wait_for(lambda: [e.get("state") for e in entries(redis)] == ["ready"])
        assert entries(redis)[0]["url"] == "http://engine-1:8101"
        running.on_loop(lambda: running.service._set_state("draining"))
        running.wait_for(lambda: entries(redis)[0]["state"] == "draining")


def test_redis_may_go_and_come_back(serve: Any) -> None:
    with redis_server() as server, serve(redis_url=server.url, engine_id="one", heartbeat_seconds=0.1) as running:
        running.wait_until_ready()

        def is_listed() -> bool:
            with Redis.from_url(server.url) as client:
                return bool(client.exists("gorgon:engines:one"))

        running.wait_for(is_listed)
        server.stop()
        answer = running.client.post("/generate", json=BODY)
        assert MESSAGE.validate_json(answer.text.splitlines()[-1]).type == "finished"
        server.start()
        running.wait_for(is_listed)


def test_an_engine_starts_and_serves_without_its_redis(serve: Any) -> None:
    with serve(redis_url="redis://127.0.0.1:9", heartbeat_seconds=0.1) as running:
        running.wait_until_ready()
        answer = running.client.post("/generate", json=BODY)
        assert MESSAGE.validate_json(answer.text.splitlines()[-1]).type == "finished"


def test_announced_heads_are_taken_up_without_waiting_for_the_next_look(
    serve: Any, server: RedisServer, redis: Redis, tmp_path: Path, make_heads: Any
) -> None:
    store = tmp_path / "store"
    publish(make_heads("1"), store)
    with serve(redis_url=server.url, store=str(store), heads_poll_seconds=3600) as running:
        running.wait_until_ready()
        running.wait_for(lambda: redis.pubsub_numsub("gorgon:heads")[0][1] == 1)
        publish(make_heads("2", seed=2), store)
        redis.publish("gorgon:heads", "whatever it says is a hint only")
        running.wait_for(lambda: running.info()["heads"]["current"] == "tiny@2")


def beat(url: str) -> Coroutine[Any, Any, None]:
    return EngineDirectory(url, "one", heartbeat_seconds=60, describe=dict).run()


def listen(url: str) -> Coroutine[Any, Any, None]:
    return listen_for_heads(url, lambda: None)


@pytest.mark.parametrize("work", [beat, listen])
def test_a_cancellation_is_heeded_whenever_it_comes(
    work: Callable[[str], Coroutine[Any, Any, None]], server: RedisServer
) -> None:
    """The client waits with `asyncio.wait_for`, which may swallow one: the engine would not end when told to."""

    async def run() -> None:
        for num_yields in range(60):
            task = asyncio.ensure_future(work(server.url))
            for _ in range(num_yields):
                await asyncio.sleep(0)
            task.cancel()
            done, _ = await asyncio.wait((task,), timeout=5.0)
            assert done, f"cancelled after {num_yields} turns of the loop it went on"
            assert task.cancelled()

    asyncio.run(run())


def test_a_redis_with_a_password_is_used_with_that_of_the_file(serve: Any, tmp_path: Path, make_heads: Any) -> None:
    store = tmp_path / "store"
    publish(make_heads("1"), store)
    with redis_server(password="hush") as server:
        settings = {"redis_url": server.url, "heartbeat_seconds": 0.1, "store": str(store), "heads_poll_seconds": 3600}
        with (
            Redis.from_url(server.url, password="hush", decode_responses=True) as redis,
            serve(redis_password="hush", **settings) as running,
        ):
            running.wait_until_ready()
            running.wait_for(lambda: [e.get("state") for e in entries(redis)] == ["ready"])
            running.wait_for(lambda: redis.pubsub_numsub("gorgon:heads")[0][1] == 1)
            publish(make_heads("2", seed=2), store)
            redis.publish("gorgon:heads", "look")
            running.wait_for(lambda: running.info()["heads"]["current"] == "tiny@2")
