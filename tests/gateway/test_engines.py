"""The directory: what engines say of themselves, and which is asked next."""

import asyncio
from typing import Any

import pytest

from gorgon_gateway.engine_client import EngineClient, EngineLost
from gorgon_gateway.engines import Engine, Engines, LoadingError
from gorgon_protocol.errors import ModelNotFoundError, UnavailableError
from support.fake_engine import FakeEngine, Faults
from support.gateways import running_relay


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def directory(*engines: dict[str, Any], clock: Clock | None = None) -> Engines:
    """Engines in the states given, by their numbers as URLs; nothing is polled."""
    known = Engines(
        EngineClient(secret=None, connect_seconds=1.0),
        (),
        poll_seconds=1.0,
        poll_timeout_seconds=1.0,
        penalty_seconds=2.0,
        clock=clock or Clock(),
    )
    for number, fields in enumerate(engines):
        state = fields.pop("state", "ready")
        info = {"model": "some/model", "backbone": "b", "num_slots": 8, "num_running": 0, "num_waiting": 0, **fields}
        known._engines[str(number)] = Engine(str(number), state=state, info=info)
    return known


def test_the_least_loaded_is_asked_first() -> None:
    known = directory({"num_running": 8, "num_waiting": 3}, {"num_running": 5}, {"num_running": 8, "num_slots": 16})
    assert known.choose().url == "2"
    assert known.choose(exclude=["2"]).url == "1"


def test_of_equally_loaded_ones_the_emptier_cache_is_asked() -> None:
    known = directory({"kv_cache_usage": 0.5}, {"kv_cache_usage": 0.1})
    assert {known.choose().url for _ in range(20)} == {"1"}


def test_what_was_sent_since_the_last_answer_counts() -> None:
    known = directory({}, {"num_running": 1})
    for _ in range(3):
        known.entered(known.all[0])
    assert known.choose().url == "1"
    for _ in range(3):
        known.left(known.all[0])
    assert known.choose().url == "0"


@pytest.mark.parametrize("state", ["unknown", "loading", "draining", "failed", "unreachable"])
def test_who_is_not_ready_is_not_asked(state: str) -> None:
    known = directory({"state": state}, {"num_running": 100})
    assert known.choose().url == "1"
    with pytest.raises(UnavailableError) as none:
        known.choose(exclude=["1"])
    assert isinstance(none.value, LoadingError) == (state in ("unknown", "loading"))


def test_who_failed_lately_is_asked_last() -> None:
    clock = Clock()
    known = directory({}, {"num_running": 50}, clock=clock)
    known.failed(known.all[0], EngineLost("broke off"))
    assert known.choose().url == "1"
    assert known.choose(exclude=["1"]).url == "0"
    clock.now += 3.0
    assert known.choose().url == "0"


def test_where_nothing_listens_nobody_asks() -> None:
    known = directory({})
    known.failed(known.all[0], EngineLost("refused", is_refused=True))
    with pytest.raises(UnavailableError):
        known.choose()


def test_models_are_told_apart() -> None:
    known = directory({"model": "llama"}, {"model": "org/smollm2"})
    assert known.choose(model="llama").url == "0"
    assert known.choose(model="org/smollm2").url == known.choose(model="smollm2").url == "1"
    assert {known.choose().url for _ in range(20)} == {"0"}  # one and the same for who does not care
    with pytest.raises(ModelNotFoundError, match="llama, org/smollm2"):
        known.choose(model="gpt-5")


def test_a_model_that_loads_is_not_missing() -> None:
    known = directory({"model": "llama", "state": "loading"}, {"model": "other"})
    with pytest.raises(LoadingError):
        known.choose(model="llama")


def test_only_the_same_backbone_goes_on() -> None:
    known = directory({"backbone": "b1", "num_running": 9}, {"backbone": "b2"})
    assert known.choose(backbone="b1").url == "0"
    with pytest.raises(UnavailableError):
        known.choose(backbone="b3")


def test_states_are_what_engines_say() -> None:
    async def until(relay: Any, *states: str) -> None:
        async with asyncio.timeout(20):
            while [engine.state for engine in relay.engines.all] != list(states):
                await asyncio.sleep(0.01)

    async def run() -> None:
        async with running_relay(engine.url, ready=False) as relay:
            await until(relay, "loading")
            assert (relay.engines.all[0].stage, relay.engines.all[0].progress) == ("weights", 0.5)
            engine.faults = Faults()
            await until(relay, "ready")
            assert relay.engines.models == ["fake"]
            assert relay.engines.all[0].backbone == "fake-backbone"
            assert relay.engines.is_responsive(relay.engines.all[0])
            await asyncio.to_thread(engine.stop)
            await until(relay, "unreachable")
            assert relay.engines.models == []

    with FakeEngine(faults=Faults(loading=True)) as engine:
        asyncio.run(run())


def test_a_secret_that_does_not_fit_is_no_engine() -> None:
    async def run() -> str | None:
        async with running_relay(engine.url, ready=False) as relay:
            async with asyncio.timeout(20):
                while relay.engines.all[0].state != "unreachable":
                    await asyncio.sleep(0.01)
            return relay.engines.all[0].problem

    with FakeEngine(secret="s3cret") as engine:
        assert "secret" in str(asyncio.run(run()))


def test_engines_come_and_go_with_the_list() -> None:
    async def run() -> None:
        async with running_relay(first.url) as relay:
            relay.engines.set_urls([second.url])
            async with asyncio.timeout(20):
                while [engine.url for engine in relay.engines.ready] != [second.url]:
                    await asyncio.sleep(0.01)
            relay.engines.set_urls([])
            with pytest.raises(UnavailableError, match="no engine is known"):
                relay.engines.choose()

    with FakeEngine() as first, FakeEngine() as second:
        asyncio.run(run())
