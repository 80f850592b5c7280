"""The engines that the gateway knows: which there are, how they are, and which one is asked next.

Where they are is configured, or said by the heartbeats that they write into Redis (`discovery.py`). How they are, the
gateway asks each of them once a second; in between it counts its own generations.
"""

import asyncio
import random
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import structlog

from gorgon_gateway.engine_client import EngineClient, EngineLost
from gorgon_protocol.errors import GorgonError, ModelNotFoundError, UnavailableError

State = Literal["unknown", "loading", "ready", "draining", "failed", "unreachable"]
_STATES: Final = ("loading", "ready", "draining", "failed")
_SILENT_POLLS: Final = 3  # unanswered ones in a row, and the engine counts as gone


class LoadingError(UnavailableError):
    """No engine can take a request yet, but one is loading."""

    def __init__(self, message: str, *, stage: str | None = None, progress: float | None = None) -> None:
        super().__init__(message, retry_after_seconds=2.0)
        self.stage = stage
        self.progress = progress  # 0 to 1


@dataclass(slots=True, eq=False)
class Engine:
    """One engine as the gateway sees it. Only `Engines` changes it."""

    url: str
    state: State = "unknown"
    info: dict[str, Any] = field(default_factory=dict)  # the last `EngineInfo`, as JSON
    stage: str | None = None  # of loading
    progress: float | None = None  # of loading, 0 to 1
    num_own: int = 0  # generations of this gateway there
    num_own_then: int = 0  # when the load was last said
    num_unanswered: int = 0  # polls in a row
    answered_at: float = 0.0  # the last poll; 0: never
    avoid_until: float = 0.0
    problem: str | None = None  # the last one that was logged

    @property
    def id(self) -> str:
        return self._text("engine_id") or self.url

    @property
    def model(self) -> str:
        return self._text("model")

    @property
    def backbone(self) -> str:
        return self._text("backbone")

    @property
    def heads(self) -> str | None:
        heads = self.info.get("heads")
        current = heads.get("current") if isinstance(heads, dict) else None
        return current if isinstance(current, str) else None

    @property
    def load(self) -> float:
        """Requests a slot: what the engine said last, and what this gateway has sent and seen end since."""
        said = self._number("num_running") + self._number("num_waiting")
        return max(0.0, said + self.num_own - self.num_own_then) / max(1.0, self._number("num_slots"))

    @property
    def kv_cache_usage(self) -> float:
        return self._number("kv_cache_usage")

    def serves(self, model: str) -> bool:
        return model in (self.model, self.model.rstrip("/").rsplit("/", 1)[-1])

    def _text(self, name: str) -> str:
        value = self.info.get(name)
        return value if isinstance(value, str) else ""

    def _number(self, name: str) -> float:
        value = self.info.get(name)
        return float(value) if isinstance(value, int | float) else 0.0


class Engines:
    """The directory. Belongs to one event loop."""

    def __init__(
        self,
        client: EngineClient,
        urls: Iterable[str],
        *,
        poll_seconds: float,
        poll_timeout_seconds: float,
        penalty_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.client = client
        self._poll_seconds = poll_seconds
        self._poll_timeout_seconds = poll_timeout_seconds
        self._penalty_seconds = penalty_seconds
        self._clock = clock
        self._engines: dict[str, Engine] = {}
        self._pollers: dict[str, asyncio.Task[None]] = {}
        self._urls = tuple(urls)
        self._log = structlog.get_logger("gorgon")

    def start(self) -> None:
        """Begin to ask them."""
        self.set_urls(self._urls)

    def set_urls(self, urls: Iterable[str]) -> None:
        """Know these and no others. Generations on an engine that is left out go on."""
        wanted = set(urls)
        for url in wanted - self._engines.keys():
            engine = self._engines[url] = Engine(url)
            self._pollers[url] = asyncio.get_running_loop().create_task(self._poll_for_ever(engine))
        for url in self._engines.keys() - wanted:
            del self._engines[url]
            self._pollers.pop(url).cancel()

    async def close(self) -> None:
        """Stop asking."""
        pollers = list(self._pollers.values())
        self.set_urls(())
        await asyncio.gather(*pollers, return_exceptions=True)

    @property
    def all(self) -> list[Engine]:
        """By URL, that lists do not jump about."""
        return [self._engines[url] for url in sorted(self._engines)]

    @property
    def ready(self) -> list[Engine]:
        return [engine for engine in self.all if engine.state == "ready"]

    @property
    def models(self) -> list[str]:
        """Names that a request may ask for: what some engine serves."""
        return sorted({engine.model for engine in self.ready if engine.model})

    def choose(self, *, model: str | None = None, backbone: str | None = None, exclude: Collection[str] = ()) -> Engine:
        """The least loaded engine that is ready; those that failed lately last.

        model: None takes whichever model comes first. backbone: only engines of this identity, which alone can go on
        with another one's tokens. exclude: URLs. Raises `ModelNotFoundError`, `LoadingError`, `UnavailableError`.
        """
        known = self.all
        fitting = [e for e in known if (model is None or e.serves(model)) and (not backbone or e.backbone == backbone)]
        ready = [e for e in fitting if e.state == "ready" and e.url not in exclude]
        if model is None and not backbone and ready:
            first = min(e.model for e in ready)
            ready = [e for e in ready if e.model == first]
        if not ready:
            raise self._none(known, fitting, model)
        now = self._clock()
        return min(ready, key=lambda e: (e.avoid_until > now, e.load, e.kv_cache_usage, random.random()))

    def entered(self, engine: Engine) -> None:
        """A generation of this gateway begins there."""
        engine.num_own += 1

    def left(self, engine: Engine) -> None:
        """It has ended there."""
        engine.num_own -= 1

    def refused(self, engine: Engine) -> None:
        """It is not ready, whatever it said a moment ago: not to be asked before its next answer to a poll."""
        if engine.state == "ready":
            engine.state = "unknown"

    def failed(self, engine: Engine, error: EngineLost) -> None:
        """A generation was lost there: ask it last for a while, and not at all where nothing listens."""
        engine.avoid_until = self._clock() + self._penalty_seconds
        if error.is_refused:
            engine.state = "unreachable"
        self._problem(engine, str(error))

    def is_responsive(self, engine: Engine) -> bool:
        """Whether its server has answered lately, whatever its model does."""
        return self._clock() - engine.answered_at < self._poll_seconds + 2 * self._poll_timeout_seconds

    def _none(self, known: list[Engine], fitting: list[Engine], model: str | None) -> GorgonError:
        loading = [e for e in fitting or known if e.state in ("loading", "unknown")]
        if model is not None and not fitting and not any(e.state in ("loading", "unknown") for e in known):
            names = self.models
            if names:
                served = "this gateway serves " + ", ".join(names)
                return ModelNotFoundError(f"model {model[:200]!r} is not served here: {served}")
        if loading:
            first = max(loading, key=lambda e: e.progress or 0.0)
            what = "the model is loading" if first.state == "loading" else "no engine can take the request yet"
            return LoadingError(f"{what}: try again soon", stage=first.stage, progress=first.progress)
        if not known:
            return UnavailableError("no engine is known: start one, or see the gateway's engine settings")
        return UnavailableError("no engine can take the request now: try again soon", retry_after_seconds=2.0)

    async def _poll_for_ever(self, engine: Engine) -> None:
        while True:
            try:
                await self._poll(engine)
            except EngineLost as error:
                self._unanswered(engine, error)
            await asyncio.sleep(self._poll_seconds * random.uniform(0.9, 1.1))

    async def _poll(self, engine: Engine) -> None:
        num_own = engine.num_own
        status, info = await self.client.ask("GET", f"{engine.url}/info", seconds=self._poll_timeout_seconds)
        if status in (401, 403):
            raise EngineLost("it refuses this gateway: give both the same secret file", is_refused=True)
        if status != 200 or info.get("state") not in _STATES:
            raise EngineLost(f"GET /info answered {status} with what is no description of an engine", is_refused=True)
        ready: dict[str, Any] = {}
        if info["state"] == "loading":
            _, ready = await self.client.ask("GET", f"{engine.url}/ready", seconds=self._poll_timeout_seconds)
        stage, share = ready.get("stage"), ready.get("progress")
        if engine.state != info["state"]:
            self._log.info("engine", url=engine.url, state=info["state"], model=info.get("model"))
        engine.info, engine.num_own_then = info, num_own
        engine.stage = stage if isinstance(stage, str) else None
        engine.progress = float(share) if isinstance(share, int | float) else None
        engine.state = info["state"]
        engine.answered_at = self._clock()
        engine.num_unanswered = 0
        engine.problem = None

    def _unanswered(self, engine: Engine, error: EngineLost) -> None:
        engine.num_unanswered += 1
        # One late answer may be a busy machine: asked last. Several, or a closed port: not at all.
        engine.avoid_until = self._clock() + self._penalty_seconds
        if error.is_refused or engine.num_unanswered >= _SILENT_POLLS:
            engine.state = "unreachable"
        self._problem(engine, str(error))

    def _problem(self, engine: Engine, problem: str) -> None:
        """Each once, not every second."""
        if problem != engine.problem:
            engine.problem = problem
            self._log.warning("engine_problem", url=engine.url, problem=problem)
