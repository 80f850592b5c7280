"""Messages on their way to one WebSocket: in order, bounded, merged where the reader is slow."""

import asyncio
from collections import deque
from typing import Any, Final

import orjson

from gorgon_gateway.engine_client import RelayedMessage

_MAX_MERGED_BYTES: Final = 1 << 18  # clients refuse messages of a megabyte by default
_BYTES_A_TOKEN: Final = 16
_LISTS: Final = ("token_ids", "pieces", "logprobs")


class Outbox:
    """Belongs to one event loop, with one reader.

    Beyond its bounds token messages are merged into the last one: every token, text and log-probability stays, of the
    trees the last. So what a slow reader makes the gateway keep is bounded by its answer's length.
    """

    def __init__(self, *, max_messages: int, max_bytes: int) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._entries: deque[RelayedMessage | _Merged] = deque()
        self._num_bytes = 0
        self._reader: asyncio.Future[None] | None = None
        self._is_closed = False
        self.num_merged = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, message: RelayedMessage) -> None:
        entries = self._entries
        is_full = len(entries) >= self._max_messages or self._num_bytes >= self._max_bytes
        if is_full and message.fields["type"] == "token" and entries and entries[-1].fields["type"] == "token":
            last = entries[-1]
            if isinstance(last, RelayedMessage):
                last = entries[-1] = _Merged(last)
            if last.size < _MAX_MERGED_BYTES:
                last.add(message)
                self.num_merged += 1
                return
        entries.append(message)
        self._num_bytes += len(message.raw)
        self._wake()

    def close(self) -> None:
        """Nothing comes any more."""
        self._is_closed = True
        self._wake()

    async def get(self) -> bytes | None:
        """The next message as JSON; waits for one. None behind the last of a closed one."""
        while not self._entries:
            if self._is_closed:
                return None
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        entry = self._entries.popleft()
        # A merged one counts as it did before, or it would make room that it fills itself.
        self._num_bytes -= len(entry.raw) if isinstance(entry, RelayedMessage) else entry.num_first_bytes
        return entry.raw

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class _Merged:
    """Several token messages as one."""

    def __init__(self, first: RelayedMessage) -> None:
        self.fields: dict[str, Any] = dict(first.fields)
        for name in _LISTS:
            if isinstance(self.fields.get(name), list):
                self.fields[name] = list(self.fields[name])
        self.num_first_bytes = len(first.raw)
        self.size = _size(first)
        self._texts = [first.fields["text"]]

    def add(self, message: RelayedMessage) -> None:
        fields, later = self.fields, message.fields
        self.size += _size(message)
        self._texts.append(later["text"])
        for name in _LISTS:
            if (more := later.get(name)) is None:
                continue
            if fields.get(name) is None:
                fields[name] = list(more)
            else:
                fields[name] += more  # a list of its own
        for name in ("num_accepted", "num_nodes"):
            fields[name] += later[name]
        if later.get("tree_debug") is not None:
            fields["tree_debug"] = later["tree_debug"]

    @property
    def raw(self) -> bytes:
        return orjson.dumps({**self.fields, "text": "".join(self._texts)})


def _size(message: RelayedMessage) -> int:
    """About what the message adds to a merged one, in bytes: of trees only one stays."""
    if message.fields.get("tree_debug") is None or message.fields.get("logprobs") is not None:
        return len(message.raw)
    return _BYTES_A_TOKEN * len(message.fields["token_ids"]) + 2 * len(message.fields["text"])
