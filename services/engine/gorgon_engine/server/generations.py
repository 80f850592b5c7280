"""The open generations of an engine: submitted, fed with its events, ended exactly once."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gorgon_engine.server.conversion import LineWriter, TokenTexts
from gorgon_engine.server.generation import Generation
from gorgon_engine.server.logs import logger
from gorgon_engine.server.metrics import EngineMetrics, StepTally
from gorgon_protocol.errors import GorgonError, QueueFullError
from gorgon_protocol.messages import FinishedMessage
from gorgon_protocol.requests import EngineRequest

if TYPE_CHECKING:
    from gorgon_engine.engine import Engine
    from gorgon_engine.events import Event, FinishedEvent, TokenEvent
    from gorgon_engine.sequence import Request
    from gorgon_engine.server.worker import EngineWorker, StepReport


class Generations:
    """Belongs to the event loop. `is_idle` is set while nothing is open and nobody reads what has ended."""

    def __init__(
        self,
        engine: "Engine",
        worker: "EngineWorker",
        *,
        metrics: EngineMetrics,
        max_messages: int,
        heads: Callable[[], str | None],
    ) -> None:
        """max_messages: that a stream may hold. heads: name@version of those in use."""
        self.is_idle = asyncio.Event()
        self.is_idle.set()
        self._worker = worker
        self._metrics = metrics
        self._max_messages = max_messages
        self._heads = heads
        self._writer = LineWriter(TokenTexts(engine.tokenizer.token_bytes))
        self._engine = engine
        self._plain_speeds: dict[int, float | None] = {}
        self._open: dict[str, Generation] = {}
        self._read: set[Generation] = set()  # whose reader has not left
        self._max_open = engine.config.num_slots + engine.config.max_waiting
        self._num_prepared = 0

    @property
    def num_open(self) -> int:
        return len(self._open)

    @contextmanager
    def place(self) -> Iterator[None]:
        """Around making a request ready, which is work: where the queue is full it is not begun.

        What is made ready counts with what is open. Raises `QueueFullError`.
        """
        if len(self._open) + self._num_prepared >= self._max_open:
            raise QueueFullError(f"{self._max_open} requests run or wait already, which is the most: try again later")
        self._num_prepared += 1
        try:
            yield
        finally:
            self._num_prepared -= 1

    async def submit(self, wire: EngineRequest, request: "Request") -> Generation:
        """A generation, which is open until it has ended, and read until `reader_left`.

        Raises `QueueFullError`, and whatever else the engine refuses a request with.
        """
        generation = Generation(
            request.id,
            wire,
            writer=self._writer,
            plain_speed=self._plain_speed,
            max_messages=self._max_messages,
        )
        # Before the engine has it: its first event may be here before the answer to this call.
        self._open[request.id] = generation
        self._read.add(generation)
        self.is_idle.clear()
        try:
            await self._worker.call(lambda engine: engine.submit(request))
        except GorgonError:
            if generation.has_ended:  # cut meanwhile, which is counted: its reader is told by its one message
                return generation
            self._read.discard(generation)
            self._close(generation)
            raise
        except BaseException:  # given up while the engine may have it already
            self._read.discard(generation)
            self.cut(generation, GorgonError("the request was given up"))
            self._tell_idle()
            raise
        return generation

    def stepped(self, report: "StepReport") -> None:
        """Hand a step's events to their generations."""
        tally = StepTally()
        for event in report.events:
            generation = self._open.get(event.request_id)
            try:
                self._hand_over(event, generation, report.at, tally)
            except Exception as error:
                # One request's trouble must not keep the others from their events.
                logger().error("event_not_handled", engine_request=event.request_id, exc_info=error)
                if generation is not None:
                    self.cut(generation, GorgonError("the engine failed to report on this request: see its log"))
        self._metrics.add(tally)

    def reader_left(self, generation: Generation) -> None:
        """All is read, or nobody reads any more: then the slot is free by the next step."""
        self._read.discard(generation)
        self._tell_idle()
        if not generation.has_ended:
            self._cancel(generation)

    def cut(self, generation: Generation, error: GorgonError) -> None:
        """End a generation for a reason of the service's own; nothing where it has ended."""
        if generation.fail(error):
            self._cancel(generation)
            self._ended(generation)

    def cut_all(self, error: GorgonError) -> None:
        for generation in list(self._open.values()):
            self.cut(generation, error)

    def _hand_over(self, event: "Event", generation: Generation | None, at: float, tally: StepTally) -> None:
        from gorgon_engine.events import FailedEvent, FinishedEvent, TokenEvent

        if isinstance(event, TokenEvent):
            self._metrics.tally(tally, event)
        if generation is None:  # ended by the service; the engine has not heard yet
            return
        if isinstance(event, TokenEvent):
            self._take_tokens(event, generation, at)
        elif isinstance(event, FinishedEvent):
            if generation.finish(event, heads=self._heads()):
                self._ended(generation, event)
        elif isinstance(event, FailedEvent):
            if generation.fail(event.error):
                self._ended(generation)
        else:
            generation.put_status(event)

    def _take_tokens(self, event: "TokenEvent", generation: Generation, at: float) -> None:
        seconds = generation.put_tokens(event, at)
        if seconds is None:
            self._metrics.first_token(at - generation.arrived_at)
        else:
            self._metrics.between_messages(seconds, len(event.token_ids))

    def _plain_speed(self, batch_size: int) -> float | None:
        """As calibrated; asked for with every message, so remembered."""
        if batch_size not in self._plain_speeds:
            self._plain_speeds[batch_size] = self._engine.plain_tokens_per_second(batch_size)
        return self._plain_speeds[batch_size]

    def _cancel(self, generation: Generation) -> None:
        engine_id = generation.engine_id
        self._worker.send(lambda engine: engine.cancel(engine_id))

    def _ended(self, generation: Generation, event: "FinishedEvent | None" = None) -> None:
        """Count and log it. event: where the engine itself ended it."""
        self._close(generation)
        terminal = generation.stream.terminal
        assert terminal is not None
        seconds = time.perf_counter() - generation.arrived_at
        self._metrics.merged(generation.stream.num_merged)
        fields: dict[str, Any] = {"request_id": generation.request_id, "client": generation.client or None}
        if isinstance(terminal, FinishedMessage):
            assert event is not None
            metrics = terminal.metrics
            self._metrics.finished(event, e2e_seconds=seconds, speedup=metrics.speedup)
            fields |= {
                "outcome": terminal.finish_reason,
                "prompt_tokens": terminal.usage.prompt_tokens,
                "completion_tokens": terminal.usage.completion_tokens,
                "queue_seconds": _rounded(metrics.queue_seconds),
                "ttft_seconds": _rounded(metrics.ttft_seconds),
                "tokens_per_second": _rounded(metrics.tokens_per_second),
                "speedup": _rounded(metrics.speedup),
                "acceptance_length": _rounded(metrics.speculative_decoding.mean_acceptance_length),
            }
        else:
            self._metrics.refused(terminal.code)
            fields |= {"outcome": terminal.code, "reason": terminal.message}
        logger().info("request", **fields, seconds=_rounded(seconds), merged_messages=generation.stream.num_merged)

    def _close(self, generation: Generation) -> None:
        self._open.pop(generation.engine_id, None)
        self._tell_idle()

    def _tell_idle(self) -> None:
        if not self._open and not self._read:
            self.is_idle.set()


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
