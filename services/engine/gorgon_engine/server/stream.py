"""The messages of one generation on their way to one reader: in order, bounded, with exactly one end.

A reader that is slower than the model finds the tokens of several steps in one message. No token, no text and no end is
ever dropped; the trees of merged steps are, except the last.
"""

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from gorgon_engine.server.conversion import TokenChunk
from gorgon_protocol.messages import ErrorMessage, FinishedMessage

if TYPE_CHECKING:
    from gorgon_engine.events import StatusEvent

Terminal = FinishedMessage | ErrorMessage


class MessageStream:
    """Belongs to one event loop: written and read there."""

    def __init__(self, *, max_messages: int) -> None:
        """max_messages: not yet taken, the terminal one not counted; at least 2."""
        assert max_messages >= 2, max_messages
        self._max_messages = max_messages
        self._entries: deque[TokenChunk | StatusEvent | Terminal] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._is_taken = False  # the terminal message was
        self.terminal: Terminal | None = None
        self.num_merged = 0

    @property
    def num_buffered(self) -> int:
        return len(self._entries)

    def put_tokens(self, chunk: TokenChunk) -> None:
        """Dropped behind the end: nobody waits for them."""
        if self.terminal is not None:
            return
        last = self._entries[-1] if self._entries else None
        if len(self._entries) >= self._max_messages and isinstance(last, TokenChunk):
            last.merge(chunk)
            self.num_merged += 1
        else:
            self._put(chunk)

    def put_status(self, event: "StatusEvent") -> None:
        """A later status replaces an earlier one that was not taken yet."""
        if self.terminal is not None:
            return
        last = self._entries[-1] if self._entries else None
        if last is not None and not isinstance(last, TokenChunk | FinishedMessage | ErrorMessage):
            self._entries[-1] = event
        elif len(self._entries) < self._max_messages:
            self._put(event)

    def end(self, terminal: Terminal) -> bool:
        """The last message. False, and nothing is changed, where there is one already."""
        if self.terminal is not None:
            return False
        self.terminal = terminal
        self._put(terminal)
        return True

    async def take(self) -> "list[TokenChunk | StatusEvent | Terminal]":
        """Everything that there is, at least one message; an empty list behind the terminal one. For one reader."""
        while not self._entries:
            if self._is_taken:
                return []
            assert self._reader is None, "one reader a stream"
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        taken = list(self._entries)
        self._entries.clear()
        self._is_taken = self.terminal is not None
        return taken

    def _put(self, entry: "TokenChunk | StatusEvent | Terminal") -> None:
        self._entries.append(entry)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
