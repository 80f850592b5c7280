"""Every request ends with exactly one terminal event, whatever the engines do and whatever its client is.

The relay's own part of the promise is in `test_relay.py`; here a whole gateway is asked by clients of every kind at
once, and each looks at what comes behind its end.
"""

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.clients import Generation, open_socket, receive
from support.fake_engine import Faults, ScriptedEngine
from support.gateways import RunningGateway, running_gateway

SETTLE_SECONDS = 30.0
REQUESTS: list[dict[str, Any]] = [
    {"max_tokens": 1},
    {"max_tokens": 30, "temperature": 1.0},
    {"max_tokens": 60, "stop": ["7 w", "猫"]},
    {"max_tokens": 20, "frequency_penalty": 0.5},
]


@dataclass(frozen=True, slots=True)
class Plan:
    """What one client does."""

    kind: str  # "websocket", "rest", "stream" (of OpenAI's API)
    action: str  # "read", "leave", or "cancel", which WebSockets alone can
    after_messages: int
    request: int  # of REQUESTS


FAULTS = st.one_of(
    st.builds(Faults, drop_after=st.integers(0, 12)),
    st.builds(Faults, end_after=st.integers(0, 12)),
    st.builds(Faults, garbage_after=st.integers(0, 12)),
    st.builds(Faults, error_after=st.integers(0, 12)),
    st.builds(Faults, hang_after=st.integers(0, 12)),
    st.builds(Faults, first_delay_seconds=st.sampled_from([0.02, 0.5])),  # the second is longer than the patience
    st.builds(Faults, refuse=st.sampled_from(["queue_full", "unavailable"])),
    st.just(Faults()),
)
PLANS = st.builds(
    Plan,
    kind=st.sampled_from(["websocket", "websocket", "rest", "stream"]),
    action=st.sampled_from(["read", "read", "leave", "cancel"]),
    after_messages=st.integers(1, 8),
    request=st.integers(0, len(REQUESTS) - 1),
)


@dataclass(frozen=True, slots=True)
class House:
    engines: tuple[ScriptedEngine, ScriptedEngine]
    gateway: RunningGateway


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    quick: dict[str, Any] = {
        "silence_seconds": 0.2,
        "queue_seconds": 0.2,
        "resume_queue_seconds": 0.3,
        "penalty_seconds": 0.05,
    }
    with (
        ScriptedEngine(name="one", step_seconds=0.001) as one,
        ScriptedEngine(name="two", step_seconds=0.001) as two,
        running_gateway(one.url, two.url, loading_seconds=0.5, **quick) as gateway,
    ):
        yield House((one, two), gateway)


async def websocket(url: str, plan: Plan) -> None:
    async with open_socket(url) as socket:
        await socket.send(json.dumps({"prompt": "a b c", **REQUESTS[plan.request]}))
        generation = Generation()
        if plan.action != "read":
            await receive(socket, generation, until=lambda g: len(g.messages) >= plan.after_messages)
            if plan.action == "leave":
                socket.transport.abort()
                return
            await socket.send('{"type": "cancel"}')
        if not generation.messages or generation.messages[-1]["type"] not in ("finished", "error"):
            await receive(socket, generation)
        assert generation.end["type"] in ("finished", "error")
        # What comes next is the answer to what is said next, and no second end.
        await socket.send("{")
        after = await receive(socket)
        assert [(m["type"], m.get("code"), m.get("request_id")) for m in after.messages] == [
            ("error", "invalid_request", None)
        ]


async def rest(url: str, plan: Plan, session: aiohttp.ClientSession) -> None:
    payload = {"prompt": "a b c", **REQUESTS[plan.request]}
    try:
        async with asyncio.timeout(0.005 * plan.after_messages if plan.action == "leave" else None):
            async with session.post(f"{url}/generate", json=payload) as response:
                answer = await response.json()
    except TimeoutError:
        return
    if response.status == 200:
        assert answer["finish_reason"] in ("stop", "length")
    else:
        assert set(answer) == {"error"}


async def stream(url: str, plan: Plan, session: aiohttp.ClientSession) -> None:
    payload = {"model": "fake", "prompt": "a b c", "stream": True, **REQUESTS[plan.request]}
    ends: list[str] = []
    num_lines = 0
    async with session.post(f"{url}/v1/completions", json=payload) as response:
        if response.status != 200:
            assert set(await response.json()) == {"error"}
            return
        async for line in response.content:
            num_lines += 1
            if plan.action == "leave" and num_lines >= plan.after_messages:
                return
            if line.startswith(b"event: error"):
                ends.append("error")
            elif line == b"data: [DONE]\n":
                ends.append("done")
            elif line.startswith(b"data: ") and not ends:
                choices = json.loads(line.removeprefix(b"data: ")).get("choices", ())
                ends += ["finished" for choice in choices if choice["finish_reason"]]
    assert ends in (["finished", "done"], ["error"])


@settings(max_examples=60, deadline=None)
@given(
    plans=st.lists(PLANS, min_size=1, max_size=6),
    first=st.lists(FAULTS, max_size=5),
    second=st.lists(FAULTS, max_size=5),
)
def test_every_request_ends_exactly_once(
    house: House, plans: list[Plan], first: list[Faults], second: list[Faults]
) -> None:
    one, two = house.engines
    one.script, two.script = list(first), list(second)
    url = house.gateway.url

    async def everybody() -> None:
        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
            for plan in plans:
                if plan.kind == "websocket":
                    group.create_task(websocket(url, plan))
                else:
                    group.create_task((rest if plan.kind == "rest" else stream)(url, plan, session))

    asyncio.run(everybody())
    one.script, two.script = [], []
    end = time.monotonic() + SETTLE_SECONDS
    while house.gateway.gateway.relay.num_running or one.num_running or two.num_running:
        assert time.monotonic() < end, "somebody is still generated for"
        time.sleep(0.002)
    assert [engine.num_own for engine in house.gateway.gateway.engines.all] == [0, 0]
