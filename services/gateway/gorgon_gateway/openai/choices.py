"""The generations behind one OpenAI request: one a prompt and choice, side by side.

Each is a generation of its own for limits and metrics.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from gorgon_gateway.callers import Caller
from gorgon_gateway.generation import Generation
from gorgon_gateway.observability.tracing import outgoing_headers
from gorgon_gateway.openai.errors import message_error
from gorgon_gateway.relay import Relay
from gorgon_protocol.requests import GenerateRequest

_MAX_AHEAD: Final = 64  # messages that wait for the client, of all choices together
_SEED_BITS: Final = 53


class ChoiceMessage(NamedTuple):
    """`fields` are those of a `StatusMessage`, `TokenMessage` or `FinishedMessage`."""

    choice: int
    generation: Generation
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Choices:
    """What is to be generated, by whom and for whom. Position in `requests` = index of the choice."""

    relay: Relay
    caller: Caller
    request_id: str
    requests: Sequence[GenerateRequest]
    max_concurrent: int

    def messages(self) -> AsyncGenerator[ChoiceMessage, None]:
        """Of all choices as they come; each ends with its `finished`.

        Raises `GorgonError` when any of them fails, and ends the others; before the first message where one of those
        that begin at once cannot start. Closing it cancels all.
        """
        return self._one() if len(self.requests) == 1 else self._several()

    def _generation(self, index: int) -> Generation:
        number = f"-{index}" if len(self.requests) > 1 else ""
        return self.relay.generate(
            self.requests[index], self.caller, request_id=f"{self.request_id}{number}", headers=outgoing_headers()
        )

    async def _one(self) -> AsyncGenerator[ChoiceMessage, None]:
        generation = self._generation(0)
        async with contextlib.aclosing(generation):
            async for message in generation:
                if message.fields["type"] == "error":
                    raise message_error(message.fields)
                yield ChoiceMessage(0, generation, message.fields)

    async def _several(self) -> AsyncGenerator[ChoiceMessage, None]:
        queue: asyncio.Queue[ChoiceMessage | Exception] = asyncio.Queue(_MAX_AHEAD)
        seats = asyncio.Semaphore(self.max_concurrent)

        async def run(index: int) -> None:
            async with seats:
                generation = self._generation(index)
                try:
                    async with contextlib.aclosing(generation):
                        async for message in generation:
                            if message.fields["type"] == "error":
                                raise message_error(message.fields)
                            await queue.put(ChoiceMessage(index, generation, message.fields))
                except Exception as error:  # the reader's to raise, one of ours too
                    await queue.put(error)

        tasks = [asyncio.create_task(run(index)) for index in range(len(self.requests))]
        try:
            first: list[ChoiceMessage] = []
            silent = set(range(min(len(tasks), self.max_concurrent)))
            num_running = len(tasks)
            while num_running:
                message = await queue.get()
                if isinstance(message, Exception):
                    raise message
                num_running -= message.fields["type"] == "finished"
                if silent:
                    first.append(message)
                    silent.discard(message.choice)
                    if silent:
                        continue
                    for early in first:
                        yield early
                    first.clear()
                else:
                    yield message
            for early in first:
                yield early
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def choice_seed(seed: int | None, choice: int) -> int | None:
    """Of the n-th answer to a prompt: the first has the request's own, negative ones without their sign bit."""
    if seed is None:
        return None
    if choice == 0:
        return seed & (2**63 - 1)
    digest = hashlib.blake2b(f"{seed} {choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - _SEED_BITS)
