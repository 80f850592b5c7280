"""A gateway in the test's own process: its parts on the test's loop, or a whole server on a thread."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import uvloop

from gorgon_gateway.app import create_app
from gorgon_gateway.callers import Caller, CallerLimits
from gorgon_gateway.engine_client import EngineClient, RelayedMessage
from gorgon_gateway.engines import Engines
from gorgon_gateway.gateway import Gateway
from gorgon_gateway.generation import Generation
from gorgon_gateway.limits import InProcessLimiter
from gorgon_gateway.observability.generations import GenerationWatch
from gorgon_gateway.observability.metrics import GatewayMetrics
from gorgon_gateway.observability.tracing import NoTelemetry
from gorgon_gateway.relay import Relay
from gorgon_gateway.server import GatewayServer, listen, make_config
from gorgon_gateway.settings import GatewaySettings
from gorgon_protocol.requests import GenerateRequest

ANYBODY = Caller(id="host:test", key_name=None, limits=CallerLimits(), host="127.0.0.1")
_START_SECONDS = 20.0
_QUICK: dict[str, Any] = {"poll_seconds": 0.05, "penalty_seconds": 0.2, "connect_seconds": 1.0}


@dataclass(frozen=True, slots=True)
class RunningGateway:
    url: str
    port: int
    gateway: Gateway
    server: GatewayServer

    @property
    def websocket_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/generate_stream"


def settings_for(*engine_urls: str, **settings: Any) -> GatewaySettings:
    """Settings that notice quickly, beside those given."""
    return GatewaySettings(port=0, engines=engine_urls, **{**_QUICK, **settings})


@contextmanager
def running_gateway(*engine_urls: str, ready: bool = True, **settings: Any) -> Iterator[RunningGateway]:
    """A whole gateway on a thread; drained at the end. ready: wait until an engine can be asked."""
    chosen = settings_for(*engine_urls, **settings)
    app = create_app(chosen, {})
    gateway: Gateway = app.state.gateway
    listener = listen(chosen.host, 0, "PORT")
    port = int(listener.getsockname()[1])
    server = GatewayServer(make_config(app, chosen), gateway)
    is_up = threading.Event()

    async def serve() -> None:
        serving = asyncio.ensure_future(server.serve([listener]))
        while not serving.done() and not (server.started and (gateway.engines.ready or not ready)):
            await asyncio.sleep(0.005)
        is_up.set()
        await serving

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        assert is_up.wait(_START_SECONDS), "the gateway did not start, or no engine became ready"
        yield RunningGateway(f"http://127.0.0.1:{port}", port, gateway, server)
    finally:
        server.should_exit = True
        thread.join(_START_SECONDS)
        assert not thread.is_alive(), "the gateway did not stop"


@asynccontextmanager
async def running_relay(*engine_urls: str, ready: bool = True, **settings: Any) -> AsyncIterator[Relay]:
    """A relay on the running loop. ready: wait until every engine can be asked."""
    chosen = settings_for(*engine_urls, **settings)
    client = EngineClient(secret=None, connect_seconds=chosen.connect_seconds)
    await client.start()
    engines = Engines(
        client,
        chosen.engines,
        poll_seconds=chosen.poll_seconds,
        poll_timeout_seconds=chosen.poll_timeout_seconds,
        penalty_seconds=chosen.penalty_seconds,
    )
    engines.start()
    relay = Relay(engines, InProcessLimiter(), chosen, GenerationWatch(GatewayMetrics(), NoTelemetry()).begun)
    watch = asyncio.ensure_future(relay.watch())
    try:
        async with asyncio.timeout(_START_SECONDS):
            while ready and len(engines.ready) < len(chosen.engines):
                await asyncio.sleep(0.005)
        yield relay
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        await engines.close()
        await client.close()


async def everything(generation: Generation) -> list[RelayedMessage]:
    """All messages of a generation, which is closed."""
    try:
        return [message async for message in generation]
    finally:
        await generation.aclose()


def wanted(**fields: Any) -> GenerateRequest:
    return GenerateRequest(**{"prompt": "once upon a time", **fields})
