"""The parts of one gateway process, and how they start and stop together."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final

from gorgon_gateway.callers import Authenticator, CallerLimits
from gorgon_gateway.discovery import RedisDiscovery, connect_redis
from gorgon_gateway.engine_client import EngineClient
from gorgon_gateway.engines import Engines
from gorgon_gateway.limits import InProcessLimiter, Limiter
from gorgon_gateway.observability.generations import GenerationWatch
from gorgon_gateway.observability.logs import logger
from gorgon_gateway.observability.metrics import GatewayMetrics
from gorgon_gateway.observability.tracing import make_telemetry
from gorgon_gateway.redis_limits import RedisLimiter
from gorgon_gateway.relay import Relay
from gorgon_gateway.settings import GatewaySettings
from gorgon_gateway.websocket import GenerateStream
from gorgon_protocol.errors import UnavailableError

_LAST_WORDS_SECONDS: Final = 3.0
_POLL_SECONDS: Final = 0.05


class Gateway:
    """Made before the event loop runs; `start` and `close` belong to it."""

    def __init__(self, settings: GatewaySettings, environment: Mapping[str, str]) -> None:
        """environment: of OpenTelemetry. Raises `BadRequestError` where a file of the settings cannot be used."""
        self.settings = settings
        self.is_draining = False
        self.metrics = GatewayMetrics()
        self.telemetry = make_telemetry(environment)
        self.authenticator = Authenticator(
            settings.api_keys_file,
            defaults=CallerLimits(
                requests_per_minute=settings.requests_per_minute,
                tokens_per_minute=settings.tokens_per_minute,
                tokens_per_day=settings.tokens_per_day,
                max_concurrent=settings.max_concurrent,
            ),
        )
        self.client = EngineClient(secret=settings.engine_secret(), connect_seconds=settings.connect_seconds)
        self.engines = Engines(
            self.client,
            settings.static_engines,
            poll_seconds=settings.poll_seconds,
            poll_timeout_seconds=settings.poll_timeout_seconds,
            penalty_seconds=settings.penalty_seconds,
        )
        self.metrics.watch_engines(known=lambda: len(self.engines.all), ready=lambda: len(self.engines.ready))
        self._redis = connect_redis(settings)
        self.limiter: Limiter = (
            InProcessLimiter(self.metrics)
            if self._redis is None
            else RedisLimiter(self._redis, InProcessLimiter(self.metrics), watcher=self.metrics)
        )
        watch = GenerationWatch(self.metrics, self.telemetry, log_prompts=settings.log_prompts)
        self.relay = Relay(self.engines, self.limiter, settings, watch.begun)
        self.stream = GenerateStream(self.relay, settings, self.metrics)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self.client.start()
        self.engines.start()
        self._spawn(self.relay.watch())
        if self._redis is not None:
            discovery = RedisDiscovery(self._redis, self.engines, self.settings.static_engines)
            self._spawn(discovery.run())

    async def drain(self, *, is_forced: Callable[[], bool] = lambda: False) -> None:
        """Refuse new generations and let the running ones finish, for as long as the settings allow, or until
        `is_forced`; then end them with an error."""
        self.is_draining = True
        logger().info("draining", num_running=self.relay.num_running, limit_seconds=self.settings.drain_seconds)
        self.relay.refuse(UnavailableError("the gateway is stopping: ask again in a moment"))
        self.stream.drain()
        await _until(lambda: not self.relay.num_running or is_forced(), self.settings.drain_seconds)
        self.relay.end_all(UnavailableError("the gateway stopped before the answer was complete: ask again"))
        await _until(lambda: not self.relay.num_running and not self.stream.num_sockets, _LAST_WORDS_SECONDS)

    async def close(self) -> None:
        """Let go of everything."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.engines.close()
        await self.client.close()
        await self.limiter.close()
        if self._redis is not None:
            await self._redis.aclose()
        await asyncio.to_thread(self.telemetry.close)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(work))


async def _until(is_so: Callable[[], bool], seconds: float) -> None:
    """At most so long."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    while not is_so() and loop.time() < until:
        await asyncio.sleep(_POLL_SECONDS)
