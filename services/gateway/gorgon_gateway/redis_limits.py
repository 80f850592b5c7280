"""Limits that hold for all gateways together, counted in Redis: one script an admission, one a settlement.

While Redis cannot be asked, limits hold per gateway process (`InProcessLimiter`, which starts full), a warning is
logged and `gorgon_gateway:limiter_redis_up` is 0; once a second one request tries Redis again. What was reserved in
Redis and ends meanwhile is not settled: its lease runs out, its tokens refill.

A generation's seat (`max_concurrent`) is a lease that this process renews, so that a gateway that dies gives its seats
back after `lease_seconds`.
"""

import asyncio
import contextlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from gorgon_gateway.callers import Caller, CallerLimits
from gorgon_gateway.limits import (
    CONCURRENCY_WAIT_SECONDS,
    LIMIT_NAMES,
    TOLERANCE_SECONDS,
    UNLIMITED,
    Decision,
    InProcessLimiter,
    Lease,
    LimitWatcher,
    RateLimitStatus,
    Reservation,
    refusal,
)

LEASE_SECONDS: Final = 60.0
_ASK_SECONDS: Final = 0.5
_RETRY_SECONDS: Final = 1.0
_STATE_SECONDS: Final = 2 * 86_400
_MAX_STATUSES: Final = 10_000

_COMMON: Final = """
local now = tonumber(ARGV[1])
if not now then  -- Redis's own clock: several gateways need one
  local time = redis.call('TIME')
  now = tonumber(time[1]) + tonumber(time[2]) / 1000000
end
local saved = redis.call('HMGET', KEYS[1], 'at', 'requests', 'tokens', 'day', 'day_tokens')
local at = tonumber(saved[1] or now)
local per_minute_requests, per_minute_tokens = tonumber(ARGV[3]), tonumber(ARGV[4])
local function level(text, per_minute)  -- no limit: nil
  if not per_minute then return nil end
  if not text then return per_minute end
  return math.min(per_minute, tonumber(text) + math.max(0, now - at) * per_minute / 60)
end
local function exact(number) return string.format('%.17g', number) end
local requests, tokens = level(saved[2], per_minute_requests), level(saved[3], per_minute_tokens)
local day, day_tokens = tonumber(saved[4] or 0), tonumber(saved[5] or 0)
local function save()
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], 'at', exact(math.max(at, now)), 'day', exact(day), 'day_tokens', exact(day_tokens))
  if requests then redis.call('HSET', KEYS[1], 'requests', exact(requests)) end
  if tokens then redis.call('HSET', KEYS[1], 'tokens', exact(tokens)) end
  redis.call('EXPIRE', KEYS[1], STATE_SECONDS)
end
""".replace("STATE_SECONDS", str(_STATE_SECONDS))

# KEYS: state, leases. ARGV: now, lease, requests and tokens a minute, tokens a day, max_concurrent, max_tokens,
# lease_seconds, tolerance, wait for a seat. Empty = none. Gives: wait, limit (0 = let in), levels, day's tokens,
# reservation.
_ADMIT: Final = (
    _COMMON
    + """
local per_day, max_concurrent, max_tokens = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local lease_seconds, tolerance = tonumber(ARGV[8]), tonumber(ARGV[9])
local today = math.floor(now / 86400)
if day ~= today then day, day_tokens = today, 0 end
local reserved = per_minute_tokens and math.min(max_tokens, per_minute_tokens) or max_tokens
local day_reserved = per_day and math.min(max_tokens, per_day) or max_tokens
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', exact(now))

local wait, limit = 0, 0
local function refuse(number, seconds)
  if seconds > tolerance and (limit == 0 or seconds > wait) then wait, limit = seconds, number end
end
if max_concurrent and redis.call('ZCARD', KEYS[2]) >= max_concurrent then refuse(1, tonumber(ARGV[10])) end
if requests then refuse(2, (1 - requests) * 60 / per_minute_requests) end
if tokens then refuse(3, (reserved - tokens) * 60 / per_minute_tokens) end
if per_day and day_tokens + day_reserved > per_day then refuse(4, (today + 1) * 86400 - now) end

if limit == 0 then
  if requests then requests = requests - 1 end
  if tokens then tokens = tokens - reserved end
  day_tokens = day_tokens + day_reserved
  save()
  redis.call('ZADD', KEYS[2], exact(now + lease_seconds), ARGV[2])
  redis.call('EXPIRE', KEYS[2], math.ceil(lease_seconds) + 1)
end
return {exact(wait), limit, requests and exact(requests) or '', tokens and exact(tokens) or '', exact(day_tokens),
        exact(reserved), exact(day_reserved), exact(today)}
"""
)

# ARGV: now, lease, requests and tokens a minute, reserved, reserved of the day, the day, tokens given. A lease that is
# not there was settled before, ran out, or was never given: nothing to do.
_SETTLE: Final = (
    _COMMON
    + """
if redis.call('ZREM', KEYS[2], ARGV[2]) == 0 then return 0 end
local given = tonumber(ARGV[8])
if tokens then tokens = math.min(per_minute_tokens, tokens + tonumber(ARGV[5]) - given) end
if day == tonumber(ARGV[7]) then day_tokens = math.max(0, day_tokens + given - tonumber(ARGV[6])) end
save()
return 1
"""
)

# KEYS: leases. ARGV: now, lease_seconds, the leases. Those that are gone stay gone.
_RENEW: Final = """
local now = tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = tonumber(time[1]) + tonumber(time[2]) / 1000000
end
local seconds = tonumber(ARGV[2])
for i = 3, #ARGV do
  redis.call('ZADD', KEYS[1], 'XX', string.format('%.17g', now + seconds), ARGV[i])
end
redis.call('EXPIRE', KEYS[1], math.ceil(seconds) + 1)
return 1
"""


class RedisLimiter:
    """Owns neither the client nor the fallback's metrics; `close` ends its renewals.

    Admissions and settlements take one round trip. Callers without limits take none.
    """

    def __init__(
        self,
        redis: Redis,
        fallback: InProcessLimiter | None = None,
        *,
        watcher: LimitWatcher | None = None,
        lease_seconds: float = LEASE_SECONDS,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """clock: Unix time, Redis's own when None."""
        self._fallback = fallback or InProcessLimiter(watcher)
        self._watcher = watcher
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._admit = redis.register_script(_ADMIT)
        self._settle = redis.register_script(_SETTLE)
        self._renew = redis.register_script(_RENEW)
        self._leases: dict[str, set[str]] = {}  # caller -> leases that run here
        self._statuses: OrderedDict[str, tuple[float, RateLimitStatus]] = OrderedDict()
        self._is_up = True
        self._ask_again_at = 0.0  # of the monotonic clock
        self._tasks: set[asyncio.Task[None]] = set()
        self._renewal: asyncio.Task[None] | None = None
        if watcher is not None:
            watcher.limiter_redis_up(True)

    async def admit(self, caller: Caller, *, max_tokens: int) -> Lease:
        """Raises `CallerLimitError`."""
        if caller.limits.is_unlimited:
            return UNLIMITED
        lease = _RedisLease(self, caller, secrets.token_hex(8), Reservation(0.0, 0.0, 0))
        try:
            reply = await self._ask(self._admission(lease, max_tokens))
        except asyncio.CancelledError:
            self._in_background(self._settle_now(lease, 0))  # the script may have run: nobody sits on that seat
            raise
        if reply is None:
            if self._watcher is not None:
                self._watcher.limiter_fell_back()
            return await self._fallback.admit(caller, max_tokens=max_tokens)
        decision = _decision(reply)
        self._remember(caller, RateLimitStatus(caller.limits, decision.requests, decision.tokens))
        if decision.limit is not None:
            if self._watcher is not None:
                self._watcher.rate_limited(decision.limit)
            raise refusal(caller, decision)
        lease.reservation = decision.reservation
        self._leases.setdefault(caller.id, set()).add(lease.id)
        if self._renewal is None:
            self._renewal = asyncio.create_task(self._renew_forever(), name="limits-renewal")
        return lease

    def status(self, caller: Caller) -> RateLimitStatus:
        """As of this gateway's last admission of the caller, refilled since."""
        if not self._is_up:
            return self._fallback.status(caller)
        limits = caller.limits
        at, known = self._statuses.get(caller.id, (0.0, RateLimitStatus(limits)))
        elapsed = time.monotonic() - at

        def refilled(level: float | None, per_minute: int | None) -> float | None:
            if per_minute is None:
                return None
            return float(per_minute) if level is None else min(per_minute, level + elapsed * per_minute / 60)

        return RateLimitStatus(
            limits,
            refilled(known.requests, limits.requests_per_minute),
            refilled(known.tokens, limits.tokens_per_minute),
        )

    async def close(self) -> None:
        if self._renewal is not None:
            self._renewal.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._renewal
            self._renewal = None
        await asyncio.gather(*self._tasks)
        await self._fallback.close()

    async def release(self, lease: "_RedisLease", num_tokens: int) -> None:
        """What `lease.release` does. It is done even where the caller is cancelled."""
        await asyncio.shield(self._in_background(self._settle_now(lease, num_tokens)))

    async def _settle_now(self, lease: "_RedisLease", num_tokens: int) -> None:
        running = self._leases.get(lease.caller.id)
        if running is not None:
            running.discard(lease.id)
            if not running:
                del self._leases[lease.caller.id]
        limits, held = lease.caller.limits, lease.reservation
        await self._ask(
            self._settle(
                keys=_keys(lease.caller),
                args=[
                    *self._first_arguments(lease, limits),
                    *(_exact(held.tokens), _exact(held.day_tokens), held.day, num_tokens),
                ],
            )
        )

    def _admission(self, lease: "_RedisLease", max_tokens: int) -> Coroutine[Any, Any, Any]:
        limits = lease.caller.limits
        return self._admit(
            keys=_keys(lease.caller),
            args=[
                *self._first_arguments(lease, limits),
                *(_number(limits.tokens_per_day), _number(limits.max_concurrent), max_tokens),
                *(_exact(self._lease_seconds), _exact(TOLERANCE_SECONDS), _exact(CONCURRENCY_WAIT_SECONDS)),
            ],
        )

    def _first_arguments(self, lease: "_RedisLease", limits: CallerLimits) -> list[str]:
        return [self._now(), lease.id, _number(limits.requests_per_minute), _number(limits.tokens_per_minute)]

    def _now(self) -> str:
        return "" if self._clock is None else _exact(self._clock())

    async def _ask(self, question: Coroutine[Any, Any, Any]) -> Any:
        """The answer, or None while Redis gives none."""
        now = time.monotonic()
        if not self._is_up:
            if now < self._ask_again_at:
                question.close()
                return None
            self._ask_again_at = now + _RETRY_SECONDS  # one tries, the others do not wait for it
        try:
            async with asyncio.timeout(_ASK_SECONDS):
                reply = await question
        except (RedisError, OSError, TimeoutError) as error:
            self._ask_again_at = time.monotonic() + _RETRY_SECONDS
            self._set_up(False, reason=str(error) or type(error).__name__)
            return None
        self._set_up(True)
        return reply

    def _set_up(self, up: bool, *, reason: str = "") -> None:
        if up == self._is_up:
            return
        self._is_up = up
        log = structlog.get_logger("gorgon")
        if up:
            log.info("limits_in_redis")
        else:
            log.warning("limits_in_process", reason=reason, remedy="limits hold for each gateway until Redis is back")
        if self._watcher is not None:
            self._watcher.limiter_redis_up(up)

    async def _renew_forever(self) -> None:
        while True:
            await asyncio.sleep(self._lease_seconds / 3)
            for caller_id, leases in list(self._leases.items()):
                if leases:
                    keys = [_leases_key(caller_id)]
                    await self._ask(self._renew(keys=keys, args=[self._now(), _exact(self._lease_seconds), *leases]))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _remember(self, caller: Caller, status: RateLimitStatus) -> None:
        self._statuses[caller.id] = (time.monotonic(), status)
        self._statuses.move_to_end(caller.id)
        if len(self._statuses) > _MAX_STATUSES:
            self._statuses.popitem(last=False)


@dataclass(slots=True)
class _RedisLease:
    limiter: RedisLimiter
    caller: Caller
    id: str
    reservation: Reservation

    async def release(self, num_tokens: int) -> None:
        await self.limiter.release(self, num_tokens)


def _keys(caller: Caller) -> list[str]:
    return [f"gorgon:limits:{{{caller.id}}}", _leases_key(caller.id)]


def _leases_key(caller_id: str) -> str:
    return f"gorgon:limits:{{{caller_id}}}:leases"  # the braces keep both keys on one node of a cluster


def _exact(number: float) -> str:
    return format(number, ".17g")


def _number(limit: int | None) -> str:
    return "" if limit is None else str(limit)


def _decision(reply: list[Any]) -> Decision:
    wait, limit, requests, tokens, day_tokens, reserved, day_reserved, day = reply
    return Decision(
        wait_seconds=float(wait),
        limit=LIMIT_NAMES[int(limit) - 1] if int(limit) else None,
        requests=float(requests) if requests else None,
        tokens=float(tokens) if tokens else None,
        day_tokens=float(day_tokens),
        reservation=Reservation(float(reserved), float(day_reserved), int(float(day))),
    )
