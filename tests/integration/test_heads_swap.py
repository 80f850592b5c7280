"""New heads for engines that run: taken up with streams running, by file and by announcement; bad ones refused."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis
from integration.conftest import MakeHeads

from gorgon_trainer.publish import publish
from support.clients import Generation, generate, has_begun
from support.services import RedisServer, Service, engine_service, gateway_service

STREAMS = 4
NEVER = 3600.0


def payload(number: int) -> dict[str, Any]:
    return {"prompt": f"the cat {number}", "max_tokens": 1200, "ignore_eos": True, "temperature": 0.7, "seed": number}


def wait_for(engine: Service, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    end = time.monotonic() + 30.0
    while not done(heads := engine.get("/heads")):
        assert time.monotonic() < end, heads
        time.sleep(0.02)
    return dict(heads)


async def streams_while(url: str, act: Callable[[], None]) -> list[Generation]:
    begun = [Generation() for _ in range(STREAMS)]
    streams = asyncio.gather(*(generate(url, payload(number), one) for number, one in enumerate(begun)))
    await has_begun(begun)
    await asyncio.to_thread(act)
    assert any(one.messages[-1]["type"] == "token" for one in begun), "the streams were over before the swap"
    return await streams


def test_a_new_latest_is_taken_up_while_streams_run(tiny: Path, tmp_path: Path, make_heads: MakeHeads) -> None:
    store = tmp_path / "store"
    publish(make_heads("1", seed=1), store)
    with (
        engine_service(model=tiny, store=store, heads_poll_seconds=0.1, num_slots=STREAMS) as engine,
        gateway_service(engine) as gateway,
    ):
        assert engine.get("/info")["heads"]["current"] == "tiny@1"
        expected = asyncio.run(streams_while(gateway.url, lambda: None))

        def swap() -> None:
            publish(make_heads("2", seed=2), store)
            wait_for(engine, lambda heads: heads["current"] == "tiny@2")

        swapped = asyncio.run(streams_while(gateway.url, swap))
        assert [one.token_ids for one in swapped] == [one.token_ids for one in expected]
        assert {one.end["metrics"]["heads"] for one in swapped} == {"tiny@2"}

        def refuse() -> None:
            # Another model's: everything but the identity fits.
            foreign = make_heads("3", backbone={"identity": "ab" * 32, "name": "Other"})
            (store / "Tiny" / "tiny@3").mkdir()
            for file in foreign.iterdir():
                (store / "Tiny" / "tiny@3" / file.name).write_bytes(file.read_bytes())
            (store / "Tiny" / "latest").write_text("tiny@3\n")
            heads = wait_for(engine, lambda heads: heads["refused"] is not None)
            assert (heads["current"], heads["refused"]) == ("tiny@2", "tiny@3")
            assert heads["last_error"]

        kept = asyncio.run(streams_while(gateway.url, refuse))
        assert [one.token_ids for one in kept] == [one.token_ids for one in expected]
        refusals = [line for line in engine.log.splitlines() if "heads_refused" in line]
        assert len(refusals) == 1, "said once, not at every look"


def test_damaged_weights_are_refused_until_they_are_whole(tiny: Path, tmp_path: Path, make_heads: MakeHeads) -> None:
    store = tmp_path / "store"
    publish(make_heads("1", seed=1), store)
    with engine_service(model=tiny, store=store, heads_poll_seconds=0.1) as engine:
        place = Path(publish(make_heads("2", seed=2), store, move_latest=False))
        weights = place / "heads.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-8] + b"\0" * 8)
        (store / "Tiny" / "latest").write_text("tiny@2\n")
        heads = wait_for(engine, lambda heads: heads["refused"] == "tiny@2")
        assert heads["current"] == "tiny@1"
        weights.write_bytes(whole)
        (store / "Tiny" / "latest").write_text("tiny@2\n")
        assert wait_for(engine, lambda heads: heads["current"] == "tiny@2")["last_error"] is None


def test_an_announcement_spares_the_wait(
    tiny: Path, tmp_path: Path, make_heads: MakeHeads, redis_service: RedisServer
) -> None:
    """The store is looked at once an hour: without the announcement nothing would come."""
    store = tmp_path / "store"
    publish(make_heads("1", seed=1), store)
    with (
        engine_service(
            model=tiny, store=store, heads_poll_seconds=NEVER, redis_url=redis_service.url, num_slots=STREAMS
        ) as engine,
        gateway_service(redis_url=redis_service.url) as gateway,
        redis.Redis.from_url(redis_service.url) as client,
    ):

        def swap() -> None:
            publish(make_heads("2", seed=2), store)
            client.publish("gorgon:heads", json.dumps({"version": "tiny@2"}))
            wait_for(engine, lambda heads: heads["current"] == "tiny@2")

        asyncio.run(streams_while(gateway.url, swap))
