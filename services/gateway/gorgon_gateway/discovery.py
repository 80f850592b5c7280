"""Which engines there are, by the heartbeats that they write into Redis.

Redis may go and come back: while it is away, and a little longer until every engine has written again, the engines that
were known stay known. Those that are gone are noticed by asking them.
"""

import asyncio
import time
from typing import Any, Final

import orjson
import structlog
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from gorgon_gateway.engines import Engines
from gorgon_gateway.settings import GatewaySettings, engine_url
from gorgon_protocol.cancellation import heed_cancellation

ENGINE_KEYS: Final = "gorgon:engines:*"
_POLL_SECONDS: Final = 1.0
_TIMEOUT_SECONDS: Final = 2.0
_GRACE_SECONDS: Final = 10.0  # behind an outage; engines write every 2 s, and wait up to 5 s to connect again
_MAX_ENGINES: Final = 10_000


def connect_redis(settings: GatewaySettings) -> "Redis | None":
    """A client that fails fast and connects again by itself; None where no Redis is configured."""
    if settings.redis_url is None:
        return None
    options: dict[str, Any] = {}
    if (password := settings.redis_password()) is not None:
        options["password"] = password
    return Redis.from_url(
        settings.redis_url,
        socket_timeout=_TIMEOUT_SECONDS,
        socket_connect_timeout=_TIMEOUT_SECONDS,
        retry=Retry(NoBackoff(), 0),
        health_check_interval=10,
        **options,
    )


class RedisDiscovery:
    """Keeps `Engines` at what Redis lists, and at what is configured besides."""

    def __init__(self, redis: "Redis", engines: Engines, configured: tuple[str, ...] = ()) -> None:
        self._redis = redis
        self._engines = engines
        self._configured = configured
        self.is_connected: bool | None = None  # None: not tried yet
        self._found: set[str] = set()
        self._lost_at: float | None = None  # when Redis was last seen to be away
        self._refused: set[str] = set()  # entries that were complained about
        self._log = structlog.get_logger("gorgon")

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(2 * _TIMEOUT_SECONDS):
                    urls = await self._look()
            except (RedisError, OSError, TimeoutError) as error:
                self._lost_at = time.monotonic()
                if self.is_connected is not False:
                    self._log.warning("redis_lost", reason=str(error) or type(error).__name__)
                self.is_connected = False
            else:
                if self.is_connected is False:
                    self._log.info("redis_back")
                self.is_connected = True
                if self._lost_at is not None and time.monotonic() < self._lost_at + _GRACE_SECONDS:
                    urls |= self._found
                self._found = urls
                self._engines.set_urls((*self._configured, *urls))
            heed_cancellation()
            await asyncio.sleep(_POLL_SECONDS)

    async def _look(self) -> set[str]:
        keys = [key async for key in self._redis.scan_iter(match=ENGINE_KEYS, count=1000)][:_MAX_ENGINES]
        entries = await self._redis.mget(keys) if keys else []
        urls = set()
        for key, entry in zip(keys, entries, strict=True):
            if entry is None:
                continue  # expired in between
            try:
                urls.add(engine_url(orjson.loads(entry)["url"]))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                self._refuse(repr(key)[:200], error)
        return urls

    def _refuse(self, key: str, error: Exception) -> None:
        if key not in self._refused and len(self._refused) < _MAX_ENGINES:
            self._refused.add(key)
            self._log.warning("engine_entry_refused", key=key, reason=str(error)[:200])
