"""What one caller may take: requests and tokens a minute, tokens a day, generations at a time.

Requests and tokens a minute are token buckets: they hold a minute's worth and refill steadily. A generation reserves
the tokens that it may give and settles what it gave; one that gave more than it reserved leaves a debt that refills
first. A day is a day of UTC. Nothing is taken from a request that is refused.

`InProcessLimiter` counts in this process. `redis_limits.RedisLimiter` counts in Redis, for all gateways together, with
the same arithmetic.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from gorgon_gateway.callers import Caller, CallerLimits
from gorgon_protocol.errors import RateLimitError

LimitName = Literal["concurrent", "requests", "tokens", "day"]
LIMIT_NAMES: Final[tuple[LimitName, ...]] = ("concurrent", "requests", "tokens", "day")

DAY_SECONDS: Final = 86_400
CONCURRENCY_WAIT_SECONDS: Final = 1.0  # nobody knows when a generation ends
TOLERANCE_SECONDS: Final = 1e-3  # who waits as long as was said is let in, whatever clocks round
_ROUNDING: Final = 1e-6
_MIN_STATES_TO_SWEEP: Final = 10_000


@dataclass(frozen=True, slots=True)
class RateLimitStatus:
    """Where a caller stands. Levels are None where there is no limit, and below zero in debt."""

    limits: CallerLimits
    requests: float | None = None
    tokens: float | None = None

    def headers(self) -> dict[str, str]:
        """As OpenAI names them: `x-ratelimit-{limit,remaining,reset}-{requests,tokens}`; none where there is no limit.
        `reset` is the time until the bucket is full, like `6m0s` or `120ms`."""
        headers: dict[str, str] = {}
        for name, level, per_minute in (
            ("requests", self.requests, self.limits.requests_per_minute),
            ("tokens", self.tokens, self.limits.tokens_per_minute),
        ):
            if level is None or per_minute is None:
                continue
            headers[f"x-ratelimit-limit-{name}"] = str(per_minute)
            headers[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(level + _ROUNDING)))
            headers[f"x-ratelimit-reset-{name}"] = _duration((per_minute - level) * 60 / per_minute)
        return headers


class CallerLimitError(RateLimitError):
    """A limit of one caller is reached; `limit` names it."""

    def __init__(self, message: str, *, retry_after_seconds: float, limit: LimitName, status: RateLimitStatus) -> None:
        super().__init__(message, retry_after_seconds=retry_after_seconds)
        self.limit = limit
        self.status = status


class Lease(Protocol):
    """One generation that was let in."""

    async def release(self, num_tokens: int) -> None:
        """It ended and gave so many tokens. Exactly once; raises nothing."""


class Limiter(Protocol):
    async def admit(self, caller: Caller, *, max_tokens: int) -> Lease:
        """max_tokens: what the generation may give at most. Raises `CallerLimitError`, a `RateLimitError`."""

    def status(self, caller: Caller) -> RateLimitStatus:
        """Where the caller stands, by what this process knows."""

    async def close(self) -> None: ...


class LimitWatcher(Protocol):
    """Who counts what limits do: the gateway's metrics."""

    def rate_limited(self, limit: str) -> None: ...

    def limiter_redis_up(self, up: bool) -> None: ...

    def limiter_fell_back(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a generation holds until it is settled."""

    tokens: float
    day_tokens: float
    day: int


@dataclass(frozen=True, slots=True)
class Decision:
    """`wait_seconds` is 0 where the request was let in; else `limit` is the one that makes it wait longest."""

    wait_seconds: float
    limit: LimitName | None
    requests: float | None
    tokens: float | None
    day_tokens: float  # given or reserved today, this request left out where it was refused
    reservation: Reservation


@dataclass(slots=True)
class _State:
    """One caller's buckets as they were at `at` (Unix time)."""

    at: float
    requests: float | None = None
    tokens: float | None = None
    day: int = 0
    day_tokens: float = 0.0
    num_running: int = 0

    def admit(self, limits: CallerLimits, now: float, max_tokens: int) -> Decision:
        """The arithmetic of `redis_limits._ADMIT`, operation by operation."""
        requests = self._level(self.requests, limits.requests_per_minute, now)
        tokens = self._level(self.tokens, limits.tokens_per_minute, now)
        day = math.floor(now / DAY_SECONDS)
        day_tokens = self.day_tokens if self.day == day else 0.0
        reserved = float(max_tokens if limits.tokens_per_minute is None else min(max_tokens, limits.tokens_per_minute))
        day_reserved = float(max_tokens if limits.tokens_per_day is None else min(max_tokens, limits.tokens_per_day))

        waits: dict[LimitName, float] = {}
        if limits.max_concurrent is not None and self.num_running >= limits.max_concurrent:
            waits["concurrent"] = CONCURRENCY_WAIT_SECONDS
        if requests is not None and limits.requests_per_minute is not None:
            waits["requests"] = (1.0 - requests) * 60 / limits.requests_per_minute
        if tokens is not None and limits.tokens_per_minute is not None:
            waits["tokens"] = (reserved - tokens) * 60 / limits.tokens_per_minute
        if limits.tokens_per_day is not None and day_tokens + day_reserved > limits.tokens_per_day:
            waits["day"] = (day + 1) * DAY_SECONDS - now
        waits = {name: seconds for name, seconds in waits.items() if seconds > TOLERANCE_SECONDS}
        limit = max(waits, key=lambda name: waits[name], default=None)

        if limit is None:
            requests = None if requests is None else requests - 1.0
            tokens = None if tokens is None else tokens - reserved
            day_tokens += day_reserved
            self.at = max(self.at, now)
            self.requests, self.tokens = requests, tokens
            self.day, self.day_tokens = day, day_tokens
            self.num_running += 1
        return Decision(
            wait_seconds=max(waits.values(), default=0.0),
            limit=limit,
            requests=requests,
            tokens=tokens,
            day_tokens=day_tokens,
            reservation=Reservation(reserved, day_reserved, day),
        )

    def settle(self, limits: CallerLimits, now: float, reservation: Reservation, num_tokens: int) -> None:
        """The arithmetic of `redis_limits._SETTLE`."""
        assert self.num_running > 0, "settled twice"
        self.num_running -= 1
        tokens = self._level(self.tokens, limits.tokens_per_minute, now)
        self.requests = self._level(self.requests, limits.requests_per_minute, now)
        if tokens is not None and limits.tokens_per_minute is not None:
            tokens = min(limits.tokens_per_minute, tokens + reservation.tokens - num_tokens)
        self.at = max(self.at, now)
        self.tokens = tokens
        if self.day == reservation.day:
            self.day_tokens = max(0.0, self.day_tokens + num_tokens - reservation.day_tokens)

    def levels(self, limits: CallerLimits, now: float) -> tuple[float | None, float | None]:
        """(requests, tokens) as they are now."""
        return (
            self._level(self.requests, limits.requests_per_minute, now),
            self._level(self.tokens, limits.tokens_per_minute, now),
        )

    def is_fresh(self, limits: CallerLimits, now: float) -> bool:
        """Whether a new state would say the same."""
        requests, tokens = self.levels(limits, now)
        return (
            self.num_running == 0
            and (requests is None or requests == limits.requests_per_minute)
            and (tokens is None or tokens == limits.tokens_per_minute)
            and (limits.tokens_per_day is None or self.day != math.floor(now / DAY_SECONDS))
        )

    def _level(self, saved: float | None, per_minute: int | None, now: float) -> float | None:
        if per_minute is None:
            return None
        if saved is None:
            return float(per_minute)
        return min(float(per_minute), saved + max(0.0, now - self.at) * per_minute / 60)


@dataclass(slots=True)
class InProcessLimiter:
    """The limits of one gateway process. clock: Unix time."""

    watcher: LimitWatcher | None = None
    clock: Callable[[], float] = time.time
    _states: dict[str, tuple[_State, CallerLimits]] = field(default_factory=dict)
    _sweep_at: int = _MIN_STATES_TO_SWEEP

    async def admit(self, caller: Caller, *, max_tokens: int) -> Lease:
        """Raises `CallerLimitError`."""
        if caller.limits.is_unlimited:
            return UNLIMITED
        now = self.clock()
        state = self._state(caller, now)
        decision = state.admit(caller.limits, now, max_tokens)
        if decision.limit is not None:
            if self.watcher is not None:
                self.watcher.rate_limited(decision.limit)
            raise refusal(caller, decision)
        return _InProcessLease(state, caller.limits, decision.reservation, self.clock)

    def status(self, caller: Caller) -> RateLimitStatus:
        now = self.clock()
        state, _ = self._states.get(caller.id, (_State(now), caller.limits))
        requests, tokens = state.levels(caller.limits, now)
        return RateLimitStatus(caller.limits, requests, tokens)

    async def close(self) -> None:
        self._states.clear()

    def _state(self, caller: Caller, now: float) -> _State:
        known = self._states.get(caller.id)
        state = known[0] if known is not None else _State(now)
        if known is None and len(self._states) >= self._sweep_at:
            self._states = {key: kept for key, kept in self._states.items() if not kept[0].is_fresh(kept[1], now)}
            self._sweep_at = max(_MIN_STATES_TO_SWEEP, 2 * len(self._states))
        self._states[caller.id] = (state, caller.limits)  # limits change with the file of keys
        return state


@dataclass(slots=True)
class _InProcessLease:
    _state: _State
    _limits: CallerLimits
    _reservation: Reservation
    _clock: Callable[[], float]

    async def release(self, num_tokens: int) -> None:
        self._state.settle(self._limits, self._clock(), self._reservation, num_tokens)


class _UnlimitedLease:
    __slots__ = ()

    async def release(self, num_tokens: int) -> None:
        pass


UNLIMITED: Final[Lease] = _UnlimitedLease()


def refusal(caller: Caller, decision: Decision) -> CallerLimitError:
    """What a caller is told who was not let in."""
    limits = caller.limits
    seconds = decision.wait_seconds
    match decision.limit:
        case "concurrent":
            message = f"{limits.max_concurrent} generations run already, your most at a time: wait for one to end"
        case "requests":
            message = f"your {limits.requests_per_minute} requests a minute are used up: try again in {seconds:.3g} s"
        case "tokens":
            message = (
                f"this request may need {decision.reservation.tokens:.0f} tokens, and of your "
                f"{limits.tokens_per_minute} a minute {max(0.0, decision.tokens or 0.0):.0f} are left: "
                f"try again in {seconds:.3g} s, or lower max_tokens"
            )
        case _:
            left = max(0.0, (limits.tokens_per_day or 0) - decision.day_tokens)
            message = (
                f"this request may need {decision.reservation.day_tokens:.0f} tokens, and of your "
                f"{limits.tokens_per_day} a day {left:.0f} are left: lower max_tokens, or wait until midnight UTC"
            )
    status = RateLimitStatus(limits, decision.requests, decision.tokens)
    assert decision.limit is not None
    return CallerLimitError(message, retry_after_seconds=seconds, limit=decision.limit, status=status)


def _duration(seconds: float) -> str:
    """As OpenAI writes durations: `1h2m3s`, `6m0s`, `1.5s`, `120ms`."""
    milliseconds = max(0, math.ceil(seconds * 1000 - _ROUNDING))
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds / 1000, 60)
    hours, minutes = divmod(int(minutes), 60)
    text = f"{rest:.3f}".rstrip("0").rstrip(".") + "s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text
