"""How soon clients are told that no engine is left: engines are killed under streams, and the error events are timed.

    PYTHONPATH=tests python benchmarks/serving/engine_loss.py [--clients 100] [--rounds 5] [--json FILE]

A real gateway process, and fake engines (`tests/support/fake_engine.py`: the real protocol, no model) that are
processes of their own, so that SIGKILL ends them as it ends real ones. Half of the clients hold a WebSocket, half an
OpenAI stream. A round starts everything anew. Its clock starts just before the last engine is killed and stops at each
client's error event; a client that gets none, another one, or anything behind it ends the benchmark with an error.

- *one engine*: it is killed in the middle of all answers.
- *two engines*: both are killed at once.
- *one after another*: the second is killed when the first of the answers of the other goes on at it.
- *before the first token*: the engine is killed while all requests wait there.

An engine whose machine loses its power says nothing at all: it is given up after `silence_seconds`, which is not timed
here.

Prediction: below 1 s for the last one of 100 clients.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import orjson
import uvloop
from streams import LineStream, WebSocketClient

from support.services import Service, fake_engine_process, gateway_service

_MESSAGES_PER_SECOND = 2500.0  # in all: half of what a gateway must be able to relay
_BEGIN_SECONDS = 60.0  # for all answers to begin
_TOLD_SECONDS = 60.0  # for everybody to be told: far above what is promised, to be measured instead of missed
_BEHIND_SECONDS = 0.2  # nothing may come behind the end
_POLL_SECONDS = 0.001


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    num_engines: int = 1
    is_apart: bool = False  # the last engine dies when answers go on at it
    is_silent: bool = False  # nothing was said yet


SCENARIOS = (
    Scenario("one engine"),
    Scenario("two engines", num_engines=2),
    Scenario("one after another", num_engines=2, is_apart=True),
    Scenario("before the first token", is_silent=True),
)


@dataclass(frozen=True, slots=True)
class Row:
    """Milliseconds from the kill to the error event, over all clients and rounds."""

    scenario: str
    num_events: int
    median: float
    p99: float
    max: float


@dataclass(slots=True)
class Listener:
    """What one client has heard."""

    has_begun: bool = False
    told_at: float | None = None  # time.perf_counter() of the error event
    strange: list[bytes] = field(default_factory=list)  # that must not have come

    def take(self, payload: bytes) -> None:
        """A WebSocket's message, or the line of an OpenAI stream's event."""
        now = time.perf_counter()
        fields = orjson.loads(payload.removeprefix(b"data: "))
        error = fields if fields.get("type") == "error" else fields.get("error")
        if self.told_at is not None or fields.get("type") == "finished":
            self.strange.append(payload)
        elif error is not None:
            self.told_at = now
            if error["code"] != "unavailable":
                self.strange.append(payload)
        elif fields.get("type") != "status":
            self.has_begun = True


async def open_clients(
    gateway: Service, num_clients: int, *, only_sockets: bool
) -> tuple[list[Listener], list[WebSocketClient | LineStream]]:
    listeners = [Listener() for _ in range(num_clients)]
    clients: list[WebSocketClient | LineStream] = []
    for number, listener in enumerate(listeners):
        payload = {"prompt": f"client {number}", "max_tokens": 8000}
        if number % 2 == 0 or only_sockets:
            socket = await WebSocketClient.open(f"{gateway.url}/generate_stream", listener.take)
            socket.send(orjson.dumps({**payload, "ignore_eos": True}))
            clients.append(socket)
        else:
            body = orjson.dumps({**payload, "model": "fake", "stream": True, "ignore_eos": True})
            url = f"{gateway.url}/v1/completions"
            clients.append(await LineStream.open(url, body, listener.take, prefix=b"data: {"))
    return listeners, clients


async def until(what: str, seconds: float, listeners: Sequence[Listener], condition: str) -> None:
    """Wait until a field of every listener is set. Raises `RuntimeError` where that takes too long."""
    end = time.monotonic() + seconds
    while missing := sum(getattr(listener, condition) in (None, False) for listener in listeners):
        if time.monotonic() > end:
            strange = next((repr(payload) for one in listeners for payload in one.strange), "nothing else")
            raise RuntimeError(f"{what} did not come to {missing} clients within {seconds:g} s, but {strange}")
        await asyncio.sleep(_POLL_SECONDS)


async def play(scenario: Scenario, num_clients: int) -> list[float]:
    """Seconds until each client was told."""
    with ExitStack() as stack:
        faults = json.dumps({"first_delay_seconds": 600.0} if scenario.is_silent else {})
        engines = [
            stack.enter_context(
                fake_engine_process(
                    name=f"fake-{number}",
                    step_seconds=num_clients / _MESSAGES_PER_SECOND,
                    num_slots=2 * num_clients,
                    faults=faults,
                )
            )
            for number in range(scenario.num_engines)
        ]
        gateway = stack.enter_context(gateway_service(*engines))
        listeners, clients = await open_clients(gateway, num_clients, only_sockets=scenario.is_silent)
        if scenario.is_silent:
            await until_asked(engines[-1], num_clients)
        else:
            await until("the first token", _BEGIN_SECONDS, listeners, "has_begun")
        killed_at = await kill(engines, scenario)
        await until("the error event", _TOLD_SECONDS, listeners, "told_at")
        await asyncio.sleep(_BEHIND_SECONDS)
        for client in clients:
            client.close()
        await asyncio.gather(*(client.closed for client in clients))
    strange = [payload for listener in listeners for payload in listener.strange]
    if strange:
        raise RuntimeError(f"{len(strange)} messages that must not come, the first: {strange[0].decode()}")
    return [listener.told_at - killed_at for listener in listeners if listener.told_at is not None]


async def kill(engines: Sequence[Service], scenario: Scenario) -> float:
    """When the last engine was killed."""
    dying = list(engines)
    if scenario.is_apart:
        num_before = await num_asked(engines[-1])
        for engine in engines[:-1]:
            engine.kill()
        await until_asked(engines[-1], num_before + 1)
        dying = dying[-1:]
    killed_at = time.perf_counter()
    for engine in dying:
        engine.is_ended = True
        engine.process.kill()  # not waited for: the clock runs
    return killed_at


async def num_asked(engine: Service) -> int:
    """Requests that have ever come to it."""
    stats = await asyncio.to_thread(engine.get, "/_stats")
    return int(stats["num_requests"])


async def until_asked(engine: Service, num_requests: int) -> None:
    """Raises `RuntimeError` where not so many requests reach the engine."""
    end = time.monotonic() + _BEGIN_SECONDS
    while await num_asked(engine) < num_requests:
        if time.monotonic() > end:
            raise RuntimeError(f"{num_requests} requests did not reach the engine within {_BEGIN_SECONDS:g} s")
        await asyncio.sleep(_POLL_SECONDS)


async def measure(scenario: Scenario, num_clients: int, num_rounds: int) -> Row:
    milliseconds = [1e3 * seconds for _ in range(num_rounds) for seconds in await play(scenario, num_clients)]
    return Row(
        scenario=scenario.name,
        num_events=len(milliseconds),
        median=statistics.median(milliseconds),
        p99=statistics.quantiles(milliseconds, n=100, method="inclusive")[98],
        max=max(milliseconds),
    )


def table(rows: Sequence[Row], num_clients: int) -> str:
    lines = [
        f"from the last engine's end to the error event, {num_clients} clients at a time, milliseconds",
        f"{'':24} {'events':>7} {'median':>8} {'p99':>8} {'max':>8}",
    ]
    lines += [f"{row.scenario:24} {row.num_events:7} {row.median:8.1f} {row.p99:8.1f} {row.max:8.1f}" for row in rows]
    return "\n".join(lines)


async def measure_all(num_clients: int, num_rounds: int) -> list[Row]:
    return [await measure(scenario, num_clients, num_rounds) for scenario in SCENARIOS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100, help="at a time, at least 2")
    parser.add_argument("--rounds", type=int, default=5, help="of each scenario")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    rows = uvloop.run(measure_all(arguments.clients, arguments.rounds))
    print(table(rows, arguments.clients))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
