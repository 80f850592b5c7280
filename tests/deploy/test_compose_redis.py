"""The Redis of docker-compose.yml: a real server with its configuration and users, asked by the services' own code."""

import asyncio
import hashlib
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, RedisError

from gorgon_engine.server.directory import HEADS_CHANNEL, EngineDirectory, listen_for_heads
from gorgon_gateway.callers import Caller, CallerLimits
from gorgon_gateway.discovery import ENGINE_KEYS
from gorgon_gateway.redis_limits import RedisLimiter

FOLDER = Path(__file__).parents[2] / "deploy" / "redis"
PASSWORD = "not-a-secret"
SECONDS = 20.0


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """As start.sh does it, but for the places of files."""
    folder = tmp_path_factory.mktemp("redis")
    digest = hashlib.sha256(PASSWORD.encode()).hexdigest()
    (folder / "users.acl").write_text((FOLDER / "users.acl").read_text().replace("PASSWORD_SHA256", digest))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = int(listener.getsockname()[1])
    command = ["redis-server", str(FOLDER / "redis.conf"), "--port", str(number), "--bind", "127.0.0.1"]
    command += ["--aclfile", str(folder / "users.acl"), "--dir", str(folder)]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            end = time.monotonic() + SECONDS
            while not answers(number):
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < end
                time.sleep(0.05)
            yield number
        finally:
            process.kill()


def answers(port: int) -> bool:
    try:
        with Redis(port=port) as redis:
            return bool(redis.ping())
    except RedisConnectionError:
        return False


def url(port: int) -> str:
    return f"redis://gorgon@127.0.0.1:{port}/0"


def test_a_stranger_can_only_ping(port: int) -> None:
    with Redis(port=port) as redis:
        assert redis.ping()
        for command in (
            ["GET", "gorgon:engines:x"],
            ["KEYS", "*"],
            ["PUBLISH", HEADS_CHANNEL, "x"],
            ["CONFIG", "GET", "*"],
        ):
            with pytest.raises(NoPermissionError):
                redis.execute_command(*command)


def test_services_reach_what_is_theirs_and_no_more(port: int) -> None:
    with Redis.from_url(url(port), password=PASSWORD) as redis:
        for command in (
            ["GET", "other"],
            ["SET", "other", "1"],
            ["PUBLISH", "other", "x"],
            ["FLUSHALL"],
            ["KEYS", "*"],
            ["CONFIG", "GET", "*"],
            ["ACL", "LIST"],
            ["CLIENT", "KILL", "ID", "1"],
            ["SHUTDOWN"],
        ):
            with pytest.raises(NoPermissionError):
                redis.execute_command(*command)


def test_a_wrong_password_is_refused(port: int) -> None:
    with Redis.from_url(url(port), password="wrong") as redis, pytest.raises(RedisError):
        redis.ping()


def test_the_engine_s_directory_and_the_gateway_s_limits_work(port: int) -> None:
    async def run() -> None:
        directory = EngineDirectory(
            url(port), "one", heartbeat_seconds=1.0, describe=lambda: {"url": "http://engine:8101"}, password=PASSWORD
        )
        heard = asyncio.Event()
        beating = asyncio.ensure_future(directory.run())
        listening = asyncio.ensure_future(listen_for_heads(url(port), heard.set, password=PASSWORD))
        async with AsyncRedis.from_url(url(port), password=PASSWORD) as redis, asyncio.timeout(SECONDS):
            while not (keys := [key async for key in redis.scan_iter(match=ENGINE_KEYS)]):
                await asyncio.sleep(0.05)
            (entry,) = await redis.mget(keys)
            assert entry is not None
            assert json.loads(entry) == {"url": "http://engine:8101"}
            await heard.wait()  # subscribed
            heard.clear()
            assert await redis.publish(HEADS_CHANNEL, "new") == 1
            await heard.wait()

            limits = CallerLimits(requests_per_minute=1, tokens_per_minute=100, tokens_per_day=100, max_concurrent=1)
            limiter = RedisLimiter(redis)
            caller = Caller(id="key:alice", key_name="alice", limits=limits, host="127.0.0.1")
            lease = await limiter.admit(caller, max_tokens=10)
            await lease.release(5)
            (day_tokens,) = await redis.hmget("gorgon:limits:{key:alice}", "day_tokens")
            assert day_tokens is not None
            assert float(day_tokens) == 5.0
            await limiter.close()
            beating.cancel()
            listening.cancel()
            await asyncio.gather(beating, listening, return_exceptions=True)
            await directory.remove()
            assert not [key async for key in redis.scan_iter(match=ENGINE_KEYS)]

    asyncio.run(run())
