"""Limits: the same rules in process and in a real Redis, by example and by random schedules."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from gorgon_gateway.callers import Caller, CallerLimits
from gorgon_gateway.limits import CallerLimitError, InProcessLimiter, Lease, Limiter, RateLimitStatus
from gorgon_gateway.observability.metrics import GatewayMetrics
from gorgon_gateway.redis_limits import RedisLimiter
from support.services import RedisServer, redis_server

DAY = 86_400
NOON = 20_000 * DAY + DAY / 2


@dataclass(slots=True)
class Clock:
    now: float = NOON

    def __call__(self) -> float:
        return self.now


def caller(limits: CallerLimits, name: str = "alice") -> Caller:
    return Caller(id=f"key:{name}", key_name=name, limits=limits, host="127.0.0.1")


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with redis_server() as server:
        yield server.url


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis is waited for as long as a busy machine takes: a gateway would count for itself by then."""
    monkeypatch.setattr("gorgon_gateway.redis_limits._ASK_SECONDS", 30.0)


Body = Callable[[Limiter, Clock], Awaitable[None]]
Run = Callable[[Body], None]


@pytest.fixture(params=["in process", "redis"])
def run(request: pytest.FixtureRequest, patient: None) -> Run:
    """Run a body on a limiter that knows nobody."""

    async def in_redis(body: Body, url: str) -> None:
        async with Redis.from_url(url) as redis:
            await redis.flushall()
            clock = Clock()
            limiter = RedisLimiter(redis, lease_seconds=100 * DAY, clock=clock)
            await body(limiter, clock)
            await limiter.close()

    async def in_process(body: Body) -> None:
        clock = Clock()
        await body(InProcessLimiter(clock=clock), clock)

    if request.param == "redis":
        url = request.getfixturevalue("redis_url")
        return lambda body: asyncio.run(in_redis(body, url))
    return lambda body: asyncio.run(in_process(body))


def test_requests_a_minute(run: Run) -> None:
    async def body(limiter: Limiter, clock: Clock) -> None:
        alice = caller(CallerLimits(requests_per_minute=3))
        for _ in range(3):
            await (await limiter.admit(alice, max_tokens=1)).release(1)
        with pytest.raises(CallerLimitError, match="your 3 requests a minute are used up") as caught:
            await limiter.admit(alice, max_tokens=1)
        assert (caught.value.limit, caught.value.retry_after_seconds) == ("requests", pytest.approx(20.0))
        assert caught.value.retry_after_seconds is not None
        clock.now += caught.value.retry_after_seconds
        await limiter.admit(alice, max_tokens=1)
        with pytest.raises(CallerLimitError):
            await limiter.admit(alice, max_tokens=1)
        await limiter.admit(caller(alice.limits, "bob"), max_tokens=1)  # another caller's are another's

    run(body)


def test_tokens_are_reserved_and_settled(run: Run) -> None:
    async def body(limiter: Limiter, clock: Clock) -> None:
        alice = caller(CallerLimits(tokens_per_minute=600))
        lease = await limiter.admit(alice, max_tokens=500)
        with pytest.raises(
            CallerLimitError, match="may need 200 tokens, and of your 600 a minute 100 are left"
        ) as caught:
            await limiter.admit(alice, max_tokens=200)
        assert (caught.value.limit, caught.value.retry_after_seconds) == ("tokens", pytest.approx(10.0))
        await lease.release(50)  # 450 come back
        await limiter.admit(alice, max_tokens=200)

    run(body)


def test_more_than_a_minutes_tokens_need_a_full_bucket_and_leave_a_debt(run: Run) -> None:
    async def body(limiter: Limiter, clock: Clock) -> None:
        alice = caller(CallerLimits(tokens_per_minute=600))
        await (await limiter.admit(alice, max_tokens=10_000)).release(1200)
        with pytest.raises(CallerLimitError) as caught:
            await limiter.admit(alice, max_tokens=10)
        assert caught.value.retry_after_seconds == pytest.approx(61.0)  # 600 below zero, then 10

    run(body)


def test_a_days_quota_begins_anew_at_midnight(run: Run) -> None:
    async def body(limiter: Limiter, clock: Clock) -> None:
        alice = caller(CallerLimits(tokens_per_day=1000))
        late = await limiter.admit(alice, max_tokens=600)
        with pytest.raises(CallerLimitError, match="of your 1000 a day 400 are left: lower max_tokens, or") as caught:
            await limiter.admit(alice, max_tokens=401)
        assert (caught.value.limit, caught.value.retry_after_seconds) == ("day", DAY / 2)
        await (await limiter.admit(alice, max_tokens=400)).release(400)
        clock.now += DAY / 2
        await limiter.admit(alice, max_tokens=1000)
        await late.release(10)  # of yesterday: changes nothing today
        with pytest.raises(CallerLimitError):
            await limiter.admit(alice, max_tokens=1)

    run(body)


def test_generations_at_a_time(run: Run) -> None:
    async def body(limiter: Limiter, clock: Clock) -> None:
        alice = caller(CallerLimits(max_concurrent=2, requests_per_minute=3))
        first = await limiter.admit(alice, max_tokens=1)
        await limiter.admit(alice, max_tokens=1)
        with pytest.raises(CallerLimitError, match="2 generations run already") as caught:
            await limiter.admit(alice, max_tokens=1)
        assert (caught.value.limit, caught.value.retry_after_seconds) == ("concurrent", 1.0)
        await first.release(0)
        await limiter.admit(alice, max_tokens=1)  # the refused one took no request from the three

    run(body)


def test_the_longest_wait_is_the_one_that_is_said(run: Run) -> None:
    async def body(limiter: Limiter, clock: Clock) -> None:
        alice = caller(CallerLimits(requests_per_minute=6, tokens_per_minute=60, max_concurrent=6))
        for _ in range(6):
            await limiter.admit(alice, max_tokens=10)
        with pytest.raises(CallerLimitError) as caught:
            await limiter.admit(alice, max_tokens=30)
        assert (caught.value.limit, caught.value.retry_after_seconds) == ("tokens", pytest.approx(30.0))

    run(body)


def test_headers_are_openais(run: Run) -> None:
    async def body(limiter: Limiter, clock: Clock) -> None:
        alice = caller(CallerLimits(requests_per_minute=60, tokens_per_minute=600))
        await limiter.admit(alice, max_tokens=540)
        assert limiter.status(alice).headers() == {
            "x-ratelimit-limit-requests": "60",
            "x-ratelimit-remaining-requests": "59",
            "x-ratelimit-reset-requests": "1s",
            "x-ratelimit-limit-tokens": "600",
            "x-ratelimit-remaining-tokens": "60",
            "x-ratelimit-reset-tokens": "54s",
        }
        assert limiter.status(caller(CallerLimits(max_concurrent=1), "bob")).headers() == {}

    run(body)


@pytest.mark.parametrize(
    ("level", "text"),
    [(60.0, "0ms"), (59.9, "100ms"), (58.5, "1.5s"), (0.0, "1m0s"), (-300.0, "6m0s"), (-7001.0, "1h57m41s")],
)
def test_durations_are_written_as_openai_does(level: float, text: str) -> None:
    headers = RateLimitStatus(CallerLimits(requests_per_minute=60), requests=level).headers()
    assert headers["x-ratelimit-reset-requests"] == text


def test_limits_may_change_while_generations_run(run: Run) -> None:
    async def body(limiter: Limiter, clock: Clock) -> None:
        lease = await limiter.admit(caller(CallerLimits(tokens_per_minute=1000)), max_tokens=900)
        tight = caller(CallerLimits(tokens_per_minute=60, max_concurrent=1))
        with pytest.raises(CallerLimitError, match="1 generations run already"):
            await limiter.admit(tight, max_tokens=10)
        await lease.release(0)
        await limiter.admit(tight, max_tokens=60)

    run(body)


LIMITS = st.builds(
    CallerLimits,
    requests_per_minute=st.none() | st.integers(1, 20),
    tokens_per_minute=st.none() | st.integers(1, 2000),
    tokens_per_day=st.none() | st.integers(1, 5000),
    max_concurrent=st.none() | st.integers(1, 4),
)
# (seconds until then, admit so many tokens | release the i-th running with so many tokens)
STEPS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.001, 0.7, 3.3, 61.0, 40_000.0]) | st.floats(0.0, 200.0),
        st.booleans(),
        st.integers(0, 3),
        st.integers(1, 3000),
    ),
    max_size=25,
)


@dataclass(slots=True)
class Schedule:
    """Plays steps on a limiter and writes down what came of them."""

    limits: CallerLimits
    running: list[Lease] = field(default_factory=list)
    outcomes: list[object] = field(default_factory=list)

    async def play(self, limiter: Limiter, clock: Clock, steps: list[tuple[float, bool, int, int]]) -> list[object]:
        alice = caller(self.limits)
        for seconds, admits, index, num_tokens in steps:
            clock.now += seconds
            if not admits and self.running:
                await self.running.pop(index % len(self.running)).release(num_tokens)
                continue
            try:
                self.running.append(await limiter.admit(alice, max_tokens=num_tokens))
            except CallerLimitError as error:
                self.outcomes.append((error.limit, error.retry_after_seconds, error.status))
                await self._waits_exactly(error, limiter, clock, alice, num_tokens)
            else:
                self.outcomes.append("admitted")
        return self.outcomes

    async def _waits_exactly(
        self, error: CallerLimitError, limiter: Limiter, clock: Clock, alice: Caller, num_tokens: int
    ) -> None:
        """Who comes a little too early is refused by the same limit, who comes in time is not."""
        if error.limit == "concurrent":
            return
        assert error.retry_after_seconds is not None
        assert error.retry_after_seconds > 0.0
        then = clock.now + error.retry_after_seconds
        if error.retry_after_seconds > 0.01:
            clock.now = then - 0.005
            with pytest.raises(CallerLimitError):
                await limiter.admit(alice, max_tokens=num_tokens)
        clock.now = then
        try:
            self.running.append(await limiter.admit(alice, max_tokens=num_tokens))
        except CallerLimitError as again:
            if again.limit != "concurrent":
                raise


@pytest.mark.usefixtures("patient")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(limits=LIMITS, steps=STEPS)
def test_both_count_the_same_and_say_how_long_to_wait(
    redis_url: str, limits: CallerLimits, steps: list[tuple[float, bool, int, int]]
) -> None:
    async def compare() -> None:
        async with Redis.from_url(redis_url) as redis:
            await redis.flushall()
            clocks = Clock(), Clock()
            in_redis = RedisLimiter(redis, lease_seconds=100 * DAY, clock=clocks[1])
            expected = await Schedule(limits).play(InProcessLimiter(clock=clocks[0]), clocks[0], steps)
            assert await Schedule(limits).play(in_redis, clocks[1], steps) == expected
            await in_redis.close()

    asyncio.run(compare())


def test_callers_without_limits_cost_nothing(redis_url: str) -> None:
    async def body() -> None:
        async with Redis.from_url("redis://127.0.0.1:1") as nowhere:
            limiter = RedisLimiter(nowhere)
            await (await limiter.admit(caller(CallerLimits()), max_tokens=5)).release(3)
            await limiter.close()
        in_process = InProcessLimiter()
        await (await in_process.admit(caller(CallerLimits()), max_tokens=5)).release(3)
        assert not in_process._states

    asyncio.run(body())


def test_callers_that_are_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gorgon_gateway.limits._MIN_STATES_TO_SWEEP", 100)

    async def body() -> None:
        clock = Clock()
        limiter = InProcessLimiter(clock=clock, _sweep_at=100)
        limits = CallerLimits(requests_per_minute=10, max_concurrent=1)
        stays = await limiter.admit(caller(limits, "stays"), max_tokens=1)
        for i in range(1000):
            clock.now += 1.0
            await (await limiter.admit(caller(limits, f"visitor-{i}"), max_tokens=1)).release(1)
        assert len(limiter._states) <= 200
        with pytest.raises(CallerLimitError):
            await limiter.admit(caller(limits, "stays"), max_tokens=1)
        await stays.release(1)

    asyncio.run(body())


# Redis alone: clocks, leases and outages


@pytest.mark.usefixtures("patient")
def test_several_gateways_count_together_by_redis_clock(redis_url: str) -> None:
    async def body() -> None:
        async with Redis.from_url(redis_url) as redis:
            await redis.flushall()
            gateways = [RedisLimiter(redis) for _ in range(3)]
            alice = caller(CallerLimits(requests_per_minute=6, max_concurrent=6))
            results = await asyncio.gather(
                *(gateway.admit(alice, max_tokens=1) for gateway in gateways for _ in range(4)), return_exceptions=True
            )
            leases = [result for result in results if not isinstance(result, BaseException)]
            assert len(leases) == 6
            assert {type(result) for result in results if isinstance(result, BaseException)} == {CallerLimitError}
            await asyncio.gather(*(lease.release(1) for lease in leases))
            assert await redis.zcard("gorgon:limits:{key:alice}:leases") == 0
            assert 0 < await redis.ttl("gorgon:limits:{key:alice}") <= 2 * DAY
            for gateway in gateways:
                await gateway.close()

    asyncio.run(body())


@pytest.mark.usefixtures("patient")
def test_seats_of_a_gateway_that_died_come_back_and_those_of_a_live_one_stay(redis_url: str) -> None:
    async def body() -> None:
        async with Redis.from_url(redis_url) as redis:
            await redis.flushall()
            limits = CallerLimits(max_concurrent=1)
            dead, live = RedisLimiter(redis, lease_seconds=0.6), RedisLimiter(redis, lease_seconds=0.6)
            await dead.admit(caller(limits, "of the dead"), max_tokens=1)
            await live.admit(caller(limits, "of the live"), max_tokens=1)
            await dead.close()  # its renewals end as with its process
            await asyncio.sleep(1.2)
            await live.admit(caller(limits, "of the dead"), max_tokens=1)
            with pytest.raises(CallerLimitError):
                await live.admit(caller(limits, "of the live"), max_tokens=1)
            await live.close()

    asyncio.run(body())


@pytest.mark.usefixtures("patient")
def test_a_request_that_is_cancelled_while_it_is_admitted_keeps_no_seat(redis_url: str) -> None:
    async def body() -> None:
        async with Redis.from_url(redis_url) as redis:
            await redis.flushall()
            limiter = RedisLimiter(redis)
            alice = caller(CallerLimits(max_concurrent=1))
            for turns in range(40):  # wherever it is cut off
                admission = asyncio.create_task(limiter.admit(alice, max_tokens=1))
                for _ in range(turns):
                    await asyncio.sleep(0)
                admission.cancel()
                (result,) = await asyncio.gather(admission, return_exceptions=True)
                if not isinstance(result, BaseException):
                    await result.release(0)
                while limiter._tasks:
                    await asyncio.sleep(0)
            lease = await limiter.admit(alice, max_tokens=1)
            await lease.release(0)
            await limiter.close()

    asyncio.run(body())


def gauge(metrics: GatewayMetrics, name: str) -> float | None:
    return metrics.registry.get_sample_value(f"gorgon_gateway:{name}")


def test_without_redis_limits_hold_in_process_until_it_is_back() -> None:
    async def body(server: RedisServer) -> None:
        metrics = GatewayMetrics()
        assert gauge(metrics, "limiter_redis_up") is None
        async with Redis.from_url(server.url) as redis:
            limiter = RedisLimiter(redis, watcher=metrics)
            alice = caller(CallerLimits(requests_per_minute=2))
            before = await limiter.admit(alice, max_tokens=1)
            assert gauge(metrics, "limiter_redis_up") == 1.0

            server.stop()
            await before.release(1)  # lost, and says nothing
            during = [await limiter.admit(alice, max_tokens=1) for _ in range(2)]
            with pytest.raises(CallerLimitError):
                await limiter.admit(alice, max_tokens=1)
            assert (gauge(metrics, "limiter_redis_up"), gauge(metrics, "limiter_fallbacks_total")) == (0.0, 3.0)
            assert limiter.status(alice).headers()["x-ratelimit-remaining-requests"] == "0"

            server.start()
            async with asyncio.timeout(20.0):
                while gauge(metrics, "limiter_redis_up") != 1.0:
                    await limiter.admit(caller(CallerLimits(requests_per_minute=10_000), "bob"), max_tokens=1)
                    await asyncio.sleep(0.05)
            await limiter.admit(alice, max_tokens=1)  # the new Redis knows of nothing
            for lease in during:
                await lease.release(1)
            await limiter.close()

    with redis_server() as server:
        asyncio.run(body(server))


def test_a_redis_that_hangs_delays_one_request_not_all() -> None:
    async def body() -> None:
        asked = 0

        async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal asked
            asked += 1
            await reader.read()
            writer.close()

        server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, Redis(host="127.0.0.1", port=port) as redis:
            limiter = RedisLimiter(redis)
            limits = CallerLimits(requests_per_minute=100)
            for i in range(50):
                await limiter.admit(caller(limits, f"caller-{i}"), max_tokens=1)
            await limiter.close()
        assert asked < 5

    asyncio.run(body())
