"""What an engine does with Redis: it says that it is there, and listens for new heads.

Neither is in the way of serving: Redis may go and come back at any time. While it is away the gateway loses sight of
the engine when the last heartbeat expires, and new heads are found by polling alone.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import orjson
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from gorgon_engine.server.logs import logger
from gorgon_protocol.cancellation import heed_cancellation

ENGINE_KEY = "gorgon:engines:{engine_id}"
HEADS_CHANNEL = "gorgon:heads"

_TIMEOUT_SECONDS = 2.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0
_PING_SECONDS = 10.0
_EXPIRY_HEARTBEATS = 3

_LOST = (RedisError, OSError, TimeoutError)


class EngineDirectory:
    """One engine's entry in the directory, written again and again, with an expiry."""

    def __init__(
        self,
        url: str,
        engine_id: str,
        *,
        heartbeat_seconds: float,
        describe: Callable[[], dict[str, Any]],
        password: str | None = None,
    ) -> None:
        """describe: the entry as it is now. password: instead of one in the URL."""
        self._url = url
        self._password = password
        self._key = ENGINE_KEY.format(engine_id=engine_id)
        self._heartbeat_seconds = heartbeat_seconds
        self._describe = describe
        self._changed = asyncio.Event()
        self._is_connected: bool | None = None  # None: not tried yet

    def changed(self) -> None:
        """The state is another: say so now."""
        self._changed.set()

    async def run(self) -> None:
        """Write the entry until cancelled."""
        pause = _FIRST_PAUSE
        async with _client(self._url, self._password) as redis:
            while True:
                wait = self._heartbeat_seconds
                self._changed.clear()
                try:
                    await self._write(redis)
                    self._tell(True)
                    pause = _FIRST_PAUSE
                except _LOST as error:
                    self._tell(False, error)
                    wait = min(wait, pause * random.uniform(0.5, 1.0))
                    pause = min(2 * pause, _LONGEST_PAUSE)
                heed_cancellation()
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._changed.wait()

    async def remove(self) -> None:
        """Take the entry out. Never raises: without Redis it expires."""
        with suppress(*_LOST):
            async with asyncio.timeout(_TIMEOUT_SECONDS), _client(self._url, self._password) as redis:
                await redis.delete(self._key)

    async def _write(self, redis: Redis) -> None:
        expiry = int(1000 * _EXPIRY_HEARTBEATS * self._heartbeat_seconds)
        async with asyncio.timeout(2 * _TIMEOUT_SECONDS):
            await redis.set(self._key, orjson.dumps(self._describe()), px=expiry)

    def _tell(self, connected: bool, error: BaseException | None = None) -> None:
        """Each change once."""
        if connected == self._is_connected:
            return
        self._is_connected = connected
        if connected:
            logger().info("directory_connected", key=self._key)
        else:
            logger().warning("directory_lost", key=self._key, reason=str(error) or type(error).__name__)


async def listen_for_heads(url: str, notify: Callable[[], None], *, password: str | None = None) -> None:
    """Call `notify` for every announcement until cancelled. Whatever an announcement says is only a hint to look.

    password: instead of one in the URL.
    """
    pause = _FIRST_PAUSE
    while True:
        try:
            client = _client(url, password, health_check_interval=_PING_SECONDS)
            async with client as redis, redis.pubsub() as channel:
                await channel.subscribe(HEADS_CHANNEL)
                heed_cancellation()
                pause = _FIRST_PAUSE
                notify()  # for what was said while nobody listened
                while True:
                    message = await channel.get_message(ignore_subscribe_messages=True, timeout=_PING_SECONDS)
                    heed_cancellation()
                    if message is not None:
                        notify()
        except _LOST:
            heed_cancellation()
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)


@asynccontextmanager
async def _client(url: str, password: str | None, **options: Any) -> AsyncIterator[Redis]:
    if password is not None:
        options["password"] = password
    redis = Redis.from_url(
        url,
        socket_timeout=_TIMEOUT_SECONDS,
        socket_connect_timeout=_TIMEOUT_SECONDS,
        retry=Retry(NoBackoff(), 0),
        **options,
    )
    try:
        yield redis
    finally:
        with suppress(*_LOST):
            await redis.aclose()
