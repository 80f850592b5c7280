"""Generations on their way from engines to clients.

    choose an engine -> start there -> pass on what it says -> (lost? go on at another) -> exactly one last message

WebSocket, REST and the OpenAI routes all generate through `Relay`, which applies limits and counts metrics. A message
costs one parse: what is passed on are the engine's own bytes.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from gorgon_gateway.callers import Caller
from gorgon_gateway.engines import Engines
from gorgon_gateway.generation import Generation
from gorgon_gateway.limits import Limiter
from gorgon_gateway.settings import GatewaySettings
from gorgon_protocol.errors import GorgonError
from gorgon_protocol.requests import GenerateRequest

_LONGEST_SWEEP_SECONDS: Final = 1.0


class Observer(Protocol):
    """Counts one generation; `generation.progress` tells what came when."""

    def between_messages(self, seconds: float, num_tokens: int) -> None:
        """For every token message but the first."""

    def ended(self, generation: Generation, *, reason: str, num_prompt_tokens: int) -> None:
        """Once. reason: `finish_reason`, the code of an error, or `abandoned` by the client."""


class Relay:
    """Runs generations. Belongs to one event loop."""

    def __init__(
        self, engines: Engines, limiter: Limiter, settings: GatewaySettings, observe: Callable[[Generation], Observer]
    ) -> None:
        """observe: called for every generation that begins."""
        self.engines = engines
        self.limiter = limiter
        self.settings = settings
        self._observe = observe
        self._running: set[Generation] = set()
        self._refusal: GorgonError | None = None

    @property
    def num_running(self) -> int:
        return len(self._running)

    def generate(
        self,
        request: GenerateRequest,
        caller: Caller,
        *,
        request_id: str,
        headers: Mapping[str, str] | None = None,
        patience_seconds: float = 0.0,
    ) -> Generation:
        """A generation, which begins when it is iterated over. headers: sent to the engine (trace context).

        patience_seconds: while engines load, `loading` statuses are given for so long instead of an error.
        """
        return Generation(
            self,
            request,
            caller,
            request_id=request_id,
            headers=headers or {},
            patience_seconds=patience_seconds,
        )

    def refuse(self, error: GorgonError) -> None:
        """From now on every new generation raises this."""
        self._refusal = error

    def end_all(self, error: GorgonError) -> None:
        """Every generation that runs ends with this."""
        for generation in list(self._running):
            generation.end(error)

    async def watch(self) -> None:
        """Notice engines that hang and generations that run for too long, until cancelled."""
        loop = asyncio.get_running_loop()
        pause = min(_LONGEST_SWEEP_SECONDS, self.settings.silence_seconds / 4)
        while True:
            await asyncio.sleep(pause)
            now = loop.time()
            for generation in list(self._running):
                generation.check(now)

    # For generations alone

    def begin(self, generation: Generation) -> Observer:
        """Raises what new generations are refused with."""
        if self._refusal is not None:
            raise self._refusal
        self._running.add(generation)
        return self._observe(generation)

    def ended(self, generation: Generation) -> None:
        self._running.discard(generation)
