"""What the gateway costs: messages relayed on one core, latency added, memory of idle sockets.

    PYTHONPATH=tests python benchmarks/serving/relay.py [--streams 250] [--seconds 10] [--json FILE]

The gateway runs alone on the first core; the fake engine (`tests/support/fake_engine.py`: the real protocol, 2.5
tokens a message, no model) and this client share the last one. Three parts:

- *throughput*: the engine offers more than the gateway can take (--offered messages/s). Messages/s of the engine that
  reached the clients, and the gateway's CPU time for each.
- *latency*: the streams are paced, each with a phase of its own, to a total of --rates messages/s. A message's text is
  the time at which the engine sent it (CLOCK_MONOTONIC is the same in all processes); the same streams are read
  directly from the engine and through the gateway in turn, and the differences of the percentiles are what the gateway
  adds. Direct readers spend about as much time as those behind the gateway (`streams.py`). Percentiles are the medians
  of --rounds: what else a machine does now and then must not decide; the worst round's p99 stands beside them.
- *idle*: the gateway's resident memory before and after --idle sockets were opened that say nothing.

Predictions: at least 5,000 messages/s (aim 10,000), p99 added at most 5 ms at 250 streams and 5,000 messages/s, 5,000
idle sockets in less than 300 MB.
"""

import argparse
import asyncio
import json
import os
import resource
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import orjson
import uvloop
from streams import LineStream, WebSocketClient

from support.services import Service, fake_engine_process, gateway_service

_CORES = sorted(os.sched_getaffinity(0))
GATEWAY_CORE, OTHER_CORE = _CORES[0], _CORES[-1]
_STAMP = b'"text":"'
_WARM_UP_SECONDS = 1.0
_ENDLESS = 10**8


@dataclass(frozen=True, slots=True)
class Throughput:
    messages_per_second: float  # of the engine, that reached clients
    tokens_per_second: float
    gateway_microseconds: float  # CPU time a message
    gateway_cpu: float  # share of its core
    frames_per_second: float  # fewer than messages where the gateway merged some for a slow reader


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds from the engine's write to the client's read, medians over the rounds."""

    rate: float  # messages/s that were meant
    direct_rate: float  # and that came
    gateway_rate: float
    direct_p50: float
    direct_p99: float
    gateway_p50: float
    gateway_p99: float
    gateway_worst_p99: float  # of a round
    gateway_cpu: float

    @property
    def added_p50(self) -> float:
        return self.gateway_p50 - self.direct_p50

    @property
    def added_p99(self) -> float:
        return self.gateway_p99 - self.direct_p99


@dataclass(frozen=True, slots=True)
class Idle:
    num_sockets: int
    before_megabytes: float
    added_megabytes: float
    kilobytes_a_socket: float


@dataclass(frozen=True, slots=True)
class Report:
    num_streams: int
    throughput: Throughput
    latencies: list[Latency]
    idle: Idle


@dataclass(slots=True)
class Counter:
    """What comes in while it counts."""

    is_counting: bool = False
    num_frames: int = 0
    num_tokens: int = 0
    latencies: list[float] = field(default_factory=list)  # seconds
    error: bytes | None = None

    def tokens(self, payload: bytes) -> None:
        if self.is_counting:
            self.num_frames += 1
            self.num_tokens += len(orjson.loads(payload).get("token_ids", ()))
        self._check(payload)

    def stamp(self, payload: bytes) -> None:
        start = payload.find(_STAMP) + len(_STAMP)
        if self.is_counting and start >= len(_STAMP):
            sent = int(payload[start : payload.index(b'"', start)])
            self.latencies.append((time.monotonic_ns() - sent) * 1e-9)
        self._check(payload)

    def _check(self, payload: bytes) -> None:
        if payload.startswith((b'{"type":"error"', b'{"type":"finished"')):  # neither should come
            self.error = payload


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of time in which messages were counted."""

    counter: Counter
    seconds: float
    gateway_seconds: float  # of CPU time


def payload(number: int) -> dict[str, object]:
    return {"prompt": f"stream {number}", "seed": number, "max_tokens": _ENDLESS, "ignore_eos": True}


async def count(
    target: Service, gateway: Service, num_streams: int, seconds: float, *, stamps: bool, spread_seconds: float = 0.0
) -> Window:
    """Open the streams, spread over some time, and count for `seconds`. Raises `RuntimeError` if one ends."""
    counter = Counter()
    take = counter.stamp if stamps else counter.tokens
    readers: list[WebSocketClient | LineStream] = []
    for number in range(num_streams):
        if target is gateway:
            socket = await WebSocketClient.open(f"{target.url}/generate_stream", take)
            socket.send(orjson.dumps(payload(number)))
            readers.append(socket)
        else:
            body = orjson.dumps({**payload(number), "request_id": f"direct-{number}"})
            readers.append(await LineStream.open(f"{target.url}/generate", body, take))
        await asyncio.sleep(spread_seconds / num_streams)
    await asyncio.sleep(_WARM_UP_SECONDS)
    counter.is_counting = True
    began, cpu = time.perf_counter(), gateway.cpu_seconds
    await asyncio.sleep(seconds)
    counter.is_counting = False
    window = Window(counter, time.perf_counter() - began, gateway.cpu_seconds - cpu)
    for reader in readers:
        reader.close()
    await asyncio.gather(*(reader.closed for reader in readers))
    if counter.error is not None:
        raise RuntimeError(f"a stream ended: {counter.error.decode()}")
    return window


async def throughput(num_streams: int, seconds: float, offered: float) -> Throughput:
    with (
        fake_engine(num_streams, step_seconds=num_streams / offered) as engine,
        gateway_in_front(engine, num_streams) as gateway,
    ):
        window = await count(gateway, gateway, num_streams, seconds, stamps=False)
        stats = engine.get("/_stats")
    tokens_a_message = stats["num_tokens"] / stats["num_messages"]
    messages = window.counter.num_tokens / tokens_a_message
    return Throughput(
        messages_per_second=messages / window.seconds,
        tokens_per_second=window.counter.num_tokens / window.seconds,
        gateway_microseconds=window.gateway_seconds / messages * 1e6,
        gateway_cpu=window.gateway_seconds / window.seconds,
        frames_per_second=window.counter.num_frames / window.seconds,
    )


async def latency(num_streams: int, seconds: float, rate: float, rounds: int) -> Latency:
    pace = num_streams / rate
    direct: list[Window] = []
    through: list[Window] = []
    with (
        fake_engine(num_streams, step_seconds=pace, stamp=True) as engine,
        gateway_in_front(engine, num_streams) as gateway,
    ):
        for _ in range(rounds):
            for target, windows in ((engine, direct), (gateway, through)):
                windows.append(
                    await count(
                        target, gateway, num_streams, seconds / rounds, stamps=True, spread_seconds=min(pace, 1.0)
                    )
                )
    return Latency(
        rate=rate,
        direct_rate=_rate(direct),
        gateway_rate=_rate(through),
        direct_p50=_percentile(direct, 50),
        direct_p99=_percentile(direct, 99),
        gateway_p50=_percentile(through, 50),
        gateway_p99=_percentile(through, 99),
        gateway_worst_p99=max(_percentile([window], 99) for window in through),
        gateway_cpu=sum(window.gateway_seconds for window in through) / sum(window.seconds for window in through),
    )


async def idle(num_sockets: int) -> Idle:
    with fake_engine(1) as engine, gateway_in_front(engine, num_sockets) as gateway:
        sockets = [await WebSocketClient.open(f"{gateway.url}/generate_stream", _ignore) for _ in range(100)]
        before = gateway.rss_bytes
        for _ in range(num_sockets):
            sockets.append(await WebSocketClient.open(f"{gateway.url}/generate_stream", _ignore))
        await asyncio.sleep(1.0)
        after = gateway.rss_bytes
        closed = sum(socket.closed.done() for socket in sockets)
        for socket in sockets:
            socket.close()
    if closed:
        raise RuntimeError(f"the gateway closed {closed} of {num_sockets} idle sockets")
    return Idle(
        num_sockets=num_sockets,
        before_megabytes=before / 1e6,
        added_megabytes=(after - before) / 1e6,
        kilobytes_a_socket=(after - before) / num_sockets / 1e3,
    )


def fake_engine(num_streams: int, **arguments: object) -> AbstractContextManager[Service]:
    return fake_engine_process(core=OTHER_CORE, num_slots=2 * num_streams, context=2 * _ENDLESS, **arguments)


def gateway_in_front(engine: Service, num_streams: int) -> AbstractContextManager[Service]:
    """Its own cap of connections out of the way, and the one on silence: idle sockets are asked for here."""
    return gateway_service(engine, core=GATEWAY_CORE, max_connections=2 * num_streams + 1000, first_message_seconds=600)


def _ignore(payload: bytes) -> None:
    """Of a socket that says nothing."""


def _rate(windows: Sequence[Window]) -> float:
    return sum(len(window.counter.latencies) for window in windows) / sum(window.seconds for window in windows)


def _percentile(windows: Sequence[Window], percent: int) -> float:
    """In milliseconds: the median of the windows' own."""
    return 1e3 * statistics.median(
        statistics.quantiles(window.counter.latencies, n=100)[percent - 1] for window in windows
    )


def table(report: Report) -> str:
    t, i = report.throughput, report.idle
    lines = [
        f"more than it can take, {report.num_streams} streams: {t.messages_per_second:,.0f} messages/s "
        f"({t.tokens_per_second:,.0f} tokens/s, {t.frames_per_second:,.0f} frames/s), gateway "
        f"{t.gateway_microseconds:.0f} us of CPU a message, {t.gateway_cpu:.0%} of its core",
        "",
        f"{'messages/s':>10} {'came':>7} {'direct p50':>11} {'p99':>6} {'gateway p50':>12} {'p99':>6}"
        f" {'worst':>7} {'added p50':>10} {'p99':>6} {'gateway CPU':>12}",
    ]
    for row in report.latencies:
        lines.append(
            f"{row.rate:10,.0f} {row.gateway_rate:7,.0f} {row.direct_p50:11.2f} {row.direct_p99:6.2f}"
            f" {row.gateway_p50:12.2f} {row.gateway_p99:6.2f} {row.gateway_worst_p99:7.2f}"
            f" {row.added_p50:10.2f} {row.added_p99:6.2f} {row.gateway_cpu:12.0%}"
        )
    lines += [
        "(milliseconds from the engine's write to the client's read)",
        "",
        f"{i.num_sockets:,} idle sockets: {i.added_megabytes:.0f} MB above {i.before_megabytes:.0f} MB, "
        f"{i.kilobytes_a_socket:.0f} KB each",
    ]
    return "\n".join(lines)


async def measure(arguments: argparse.Namespace) -> Report:
    return Report(
        num_streams=arguments.streams,
        throughput=await throughput(arguments.streams, arguments.seconds, arguments.offered),
        latencies=[
            await latency(arguments.streams, arguments.seconds, rate, arguments.rounds) for rate in arguments.rates
        ],
        idle=await idle(arguments.idle),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=250)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--offered", type=float, default=40_000, help="messages/s of the throughput part")
    parser.add_argument("--rounds", type=int, default=5, help="that the seconds are divided into")
    parser.add_argument("--rates", type=float, nargs="+", default=[1000, 2500, 5000, 7500, 10000], help="messages/s")
    parser.add_argument("--idle", type=int, default=5000, help="sockets")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {OTHER_CORE})
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # inherited by the gateway
    report = uvloop.run(measure(arguments))
    print(table(report))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(asdict(report), indent=1) + "\n")


if __name__ == "__main__":
    main()
