"""Who waits for a slot: bounded, fair between clients, first come first served within one."""

import time
from collections import OrderedDict, deque
from collections.abc import Iterator

from gorgon_engine.sequence import Sequence


class FairQueue:
    """Round robin over the clients that wait: one who sends a hundred requests delays another by one at a time."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, deque[Sequence]] = OrderedDict()  # the next to be served first; none is empty
        self._count = 0
        self.num_changes = 0  # as long as it stays the same, so does everybody's place

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        """In the order in which they will be served if nobody comes or goes."""
        lines = [list(line) for line in self._clients.values()]
        for place in range(max(map(len, lines), default=0)):
            yield from (line[place] for line in lines if place < len(line))

    def push(self, sequence: Sequence) -> None:
        """Behind those of its client; a client who was not waiting comes behind the others."""
        self._clients.setdefault(sequence.request.client, deque()).append(sequence)
        self._count += 1
        self.num_changes += 1

    def push_front(self, sequence: Sequence) -> None:
        """Take back one that was popped: it is the next again."""
        client = sequence.request.client
        self._clients.setdefault(client, deque()).appendleft(sequence)
        self._clients.move_to_end(client, last=False)
        self._count += 1
        self.num_changes += 1

    def pop(self) -> Sequence:
        """The next. Raises IndexError when nobody waits."""
        if not self._clients:
            raise IndexError("nobody waits")
        client, line = next(iter(self._clients.items()))
        sequence = line.popleft()
        self._count -= 1
        self.num_changes += 1
        if line:
            self._clients.move_to_end(client)
        else:
            del self._clients[client]
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Raises ValueError for one that does not wait."""
        client = sequence.request.client
        line = self._clients.get(client, deque())
        line.remove(sequence)
        self._count -= 1
        self.num_changes += 1
        if not line:
            del self._clients[client]

    def overdue(self) -> list[Sequence]:
        """Those that have waited longer than their requests allow; they stay."""
        now = time.perf_counter()
        return [
            sequence
            for line in self._clients.values()
            for sequence in line
            if (limit := sequence.request.timeout_seconds) is not None and now - sequence.arrived_at > limit
        ]
