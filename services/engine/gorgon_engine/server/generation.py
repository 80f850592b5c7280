"""One request as the event loop sees it, from its submission to its terminal message."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from gorgon_engine.server.conversion import (
    LineWriter,
    Speed,
    TokenChunk,
    error_message,
    finished_message,
    terminal_line,
)
from gorgon_engine.server.stream import MessageStream, Terminal
from gorgon_protocol.errors import GorgonError
from gorgon_protocol.messages import ErrorMessage, FinishedMessage
from gorgon_protocol.requests import EngineRequest

if TYPE_CHECKING:
    from gorgon_engine.events import FinishedEvent, StatusEvent, TokenEvent

PlainSpeed = Callable[[int], float | None]  # batch size -> tokens a second of each stream, decoded plainly


class Generation:
    """Turns the engine's events into messages for one reader, and keeps count for metrics and log."""

    def __init__(
        self,
        engine_id: str,
        wire: EngineRequest,
        *,
        writer: LineWriter,
        plain_speed: PlainSpeed,
        max_messages: int,
    ) -> None:
        """engine_id: what the engine calls this request; never the caller's id, which may come twice."""
        self.engine_id = engine_id
        self.request_id = wire.request_id
        self.client = wire.client
        self.seed = wire.seed
        self.stream = MessageStream(max_messages=max_messages)
        self.arrived_at = time.perf_counter()
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self._writer = writer
        self._plain_speed = plain_speed
        self._num_decoded = 0  # tokens behind the first message
        self._plain_tokens = 0.0  # that plain decoding would have given since
        self._plain_known = True

    @property
    def has_ended(self) -> bool:
        return self.stream.terminal is not None

    def put_status(self, event: "StatusEvent") -> None:
        self.stream.put_status(event)

    def put_tokens(self, event: "TokenEvent", at: float) -> float | None:
        """at: when their step ended. Returns the seconds since the message before, None for the first."""
        if self.first_token_at is None or self.last_token_at is None:
            self.first_token_at = self.last_token_at = at
            self.stream.put_tokens(TokenChunk.of(event, Speed(None, self._plain_speed(event.batch_size), None)))
            return None
        seconds = at - self.last_token_at
        self.last_token_at = at
        self.stream.put_tokens(TokenChunk.of(event, self._speed(event, at, seconds)))
        return seconds

    def finish(self, event: "FinishedEvent", *, heads: str | None) -> bool:
        """Whether it was the end: nothing had ended the generation before."""
        return self.stream.end(finished_message(event, request_id=self.request_id, seed=self.seed, heads=heads))

    def fail(self, error: GorgonError) -> bool:
        """As `finish`."""
        return self.stream.end(error_message(error, request_id=self.request_id))

    async def take_lines(self) -> bytes:
        """Whole lines, at least one, and several where they have gathered; nothing behind the terminal one."""
        return b"".join([self._line(entry) for entry in await self.stream.take()])

    def _line(self, entry: "TokenChunk | StatusEvent | Terminal") -> bytes:
        if isinstance(entry, TokenChunk):
            return self._writer.tokens(entry)
        if isinstance(entry, FinishedMessage | ErrorMessage):
            return terminal_line(entry)
        return self._writer.status(entry, request_id=self.request_id, seed=self.seed)

    def _speed(self, event: "TokenEvent", at: float, seconds: float) -> Speed:
        plain = self._plain_speed(event.batch_size)
        self._num_decoded += len(event.token_ids)
        if plain is None:
            self._plain_known = False
        else:
            self._plain_tokens += plain * seconds
        assert self.first_token_at is not None
        elapsed = at - self.first_token_at
        return Speed(
            tokens_per_second=self._num_decoded / elapsed if elapsed > 0.0 else None,
            plain_tokens_per_second=plain,
            speedup=self._num_decoded / self._plain_tokens if self._plain_known and self._plain_tokens > 0.0 else None,
        )
