"""Clients of the gateway's WebSocket, as users write them, and what they got."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect

RECEIVE_SECONDS = 60.0  # longer than anything takes: a test that hangs fails with a name
TERMINAL = ("finished", "error")


@dataclass(slots=True)
class Generation:
    """The messages of one generation, in order."""

    messages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return [token for message in self.of("token") for token in message["token_ids"]]

    @property
    def text(self) -> str:
        return "".join(message["text"] for message in self.messages if message["type"] in ("token", "finished"))

    @property
    def end(self) -> dict[str, Any]:
        assert [m["type"] in TERMINAL for m in self.messages].count(True) == 1, self.messages[-3:]
        assert self.messages[-1]["type"] in TERMINAL, self.messages[-3:]
        return self.messages[-1]

    @property
    def seed(self) -> int:
        """That the tokens are drawn with, from whichever message told it."""
        return next(int(message["seed"]) for message in self.messages if message.get("seed") is not None)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["type"] == kind]


@asynccontextmanager
async def open_socket(url: str, **arguments: Any) -> AsyncIterator[ClientConnection]:
    """`url` is the gateway's."""
    arguments = {
        "compression": None,
        "proxy": None,
        "ping_interval": None,
        "open_timeout": RECEIVE_SECONDS,
        **arguments,
    }
    async with connect(url.replace("http", "ws", 1) + "/generate_stream", **arguments) as socket:
        yield socket


@asynccontextmanager
async def open_slow_socket(url: str, **arguments: Any) -> AsyncIterator[ClientConnection]:
    """A client whose system keeps next to nothing for it: what it does not read stays with the gateway."""
    parts = urlsplit(url)
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)  # before connecting: it bounds the window
        raw.connect((parts.hostname, parts.port))
        raw.setblocking(False)
        async with open_socket(url, sock=raw, max_queue=1, **arguments) as client:
            yield client


async def receive(
    socket: ClientConnection,
    generation: Generation | None = None,
    *,
    until: Callable[[Generation], bool] = lambda generation: False,
) -> Generation:
    """Messages up to the terminal one, or until enough have come."""
    generation = Generation() if generation is None else generation
    while True:
        generation.messages.append(json.loads(await asyncio.wait_for(socket.recv(), RECEIVE_SECONDS)))
        if generation.messages[-1]["type"] in TERMINAL or until(generation):
            return generation


async def generate(url: str, payload: dict[str, Any], generation: Generation | None = None) -> Generation:
    """One generation on a socket of its own. A `generation` that is given shows how far it has come."""
    async with open_socket(url) as socket:
        await socket.send(json.dumps(payload))
        return await receive(socket, generation)


async def has_begun(generations: list[Generation], num_tokens: int = 1) -> None:
    """Wait until each has so many tokens. Raises `TimeoutError`."""
    async with asyncio.timeout(RECEIVE_SECONDS):
        while not all(len(generation.token_ids) >= num_tokens for generation in generations):
            await asyncio.sleep(0.01)
