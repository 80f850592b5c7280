"""A generation's stay at one engine, and which engines it may still try."""

import asyncio
from collections.abc import Mapping
from typing import Final

from gorgon_gateway.engine_client import EngineLost, EngineStream, RelayedMessage
from gorgon_gateway.engines import Engine, Engines
from gorgon_protocol.errors import GorgonError, QueueFullError, UnavailableError

_TRIES_PER_ENGINE: Final = 2  # that broke off; one that hangs is not tried again


class Visit:
    """From the request to the last message, or until `leave`, which cancels at the engine and wakes whoever waits."""

    def __init__(self, engines: Engines, engine: Engine) -> None:
        self.engine = engine
        self.has_tokens = False  # came from here
        self.hangs = False
        self._engines = engines
        self._loop = asyncio.get_running_loop()
        self._opening: asyncio.Task[EngineStream] | None = None
        self._stream: EngineStream | None = None
        self._waiting_since: float | None = None
        self._failure: EngineLost | None = None
        self._has_left = False
        engines.entered(engine)

    @property
    def silent_since(self) -> float | None:
        """Of the loop's clock; None while nobody waits for the engine."""
        if self._waiting_since is None or self._stream is None:
            return self._waiting_since
        return max(self._waiting_since, self._stream.last_byte_at)

    async def open(self, body: bytes, headers: Mapping[str, str]) -> None:
        """Start the generation. Raises `EngineLost`, or the engine's refusal as the `GorgonError` that it is."""
        # In a task of its own, which `leave` can break off.
        opening = self._loop.create_task(self._engines.client.generate(self.engine.url, body, dict(headers)))
        self._opening = opening
        self._waiting_since = self._loop.time()
        try:
            await asyncio.wait((opening,))
        except asyncio.CancelledError:
            opening.cancel()
            opening.add_done_callback(_close_unused)
            raise
        finally:
            self._opening = self._waiting_since = None
        if opening.cancelled():
            raise EngineLost("the engine did not answer")
        self._stream = opening.result()

    async def read(self) -> list[RelayedMessage]:
        """What has come, at least one message. Raises `EngineLost`."""
        if self._failure is not None:
            raise self._failure
        if self._stream is None:
            raise EngineLost("the engine was left")
        self._waiting_since = self._loop.time()
        try:
            return await self._stream.read()
        finally:
            self._waiting_since = None

    def fail(self, failure: EngineLost) -> None:
        """The next `read` raises this."""
        self._failure = failure

    def hang(self) -> None:
        """The engine does: `read` or `open` raises now."""
        self.hangs = True
        self.leave()

    def leave(self) -> None:
        """Harmless when it was left."""
        if self._has_left:
            return
        self._has_left = True
        if self._opening is not None:
            self._opening.cancel()
        if self._stream is not None:
            self._stream.close()
        self._engines.left(self.engine)


class Attempts:
    """What a generation has tried."""

    def __init__(self, engines: Engines, model: str | None) -> None:
        self.num_retries = 0  # another engine was asked, and nothing had come from the one before
        self._engines = engines
        self._model = model
        self._backbone: str | None = None  # whose tokens there are
        self._lost: dict[str, int] = {}  # URL -> times
        self._refusals: dict[str, GorgonError] = {}

    @property
    def refusal(self) -> GorgonError | None:
        """The first one."""
        return next(iter(self._refusals.values()), None)

    @property
    def met_full_queue(self) -> bool:
        return any(isinstance(refusal, QueueFullError) for refusal in self._refusals.values())

    def choose(self) -> Engine:
        """One that nothing went wrong with before one that broke off; never one that refused or hangs. As
        `Engines.choose` it raises `ModelNotFoundError`, `LoadingError`, `UnavailableError`."""
        refused = self._refusals.keys()
        try:
            return self._engines.choose(model=self._model, backbone=self._backbone, exclude=refused | self._lost.keys())
        except UnavailableError:
            hopeless = {url for url, times in self._lost.items() if times >= _TRIES_PER_ENGINE}
            return self._engines.choose(model=self._model, backbone=self._backbone, exclude=refused | hopeless)

    def begun(self, engine: Engine) -> None:
        """From now on only its like can go on."""
        self._backbone = self._backbone or engine.backbone

    def refused(self, engine: Engine, error: GorgonError) -> None:
        self.num_retries += 1
        self._refusals[engine.url] = error
        if isinstance(error, UnavailableError):
            self._engines.refused(engine)

    def lost(self, visit: Visit, error: EngineLost) -> None:
        self.num_retries += not visit.has_tokens
        url = visit.engine.url
        self._lost[url] = _TRIES_PER_ENGINE if visit.hangs else self._lost.get(url, 0) + 1
        self._engines.failed(visit.engine, error)

    def forget_refusals(self) -> None:
        """Who refused may be asked again."""
        self._refusals.clear()


def _close_unused(opening: asyncio.Task[EngineStream]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
