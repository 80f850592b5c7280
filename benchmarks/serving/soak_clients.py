"""Clients of every kind and temper, for the soak.

Each behaviour is one conversation with the gateway from its beginning to its end, and says what became of every request
that it made.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from websockets.asyncio.client import ClientConnection, connect

_TIMEOUT_SECONDS = 120.0


class BrokenPromiseError(Exception):
    """The service did what it must not do."""


@dataclass(slots=True)
class Tally:
    """What became of all requests."""

    ends: Counter[str] = field(default_factory=Counter)  # "websocket: stop", "vanished", ...
    broken: list[str] = field(default_factory=list)

    def end(self, how: str) -> None:
        self.ends[how] += 1


@dataclass(frozen=True, slots=True)
class Client:
    url: str  # of the gateway
    questions: list[str]
    max_tokens: int
    session: aiohttp.ClientSession
    tally: Tally
    random: random.Random

    def payload(self, **fields: Any) -> dict[str, Any]:
        """A question drawn at random; two in three greedy, some with penalties, stops and trees."""
        question = self.random.choice(self.questions)
        payload: dict[str, Any] = {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": self.random.randint(4, self.max_tokens),
            "temperature": self.random.choice([0.0, 0.0, 0.8]),
        }
        if self.random.random() < 0.2:
            payload["repetition_penalty"] = 1.1
        if self.random.random() < 0.2:
            payload["stop"] = ["\n\n", "3."]
        if self.random.random() < 0.1:
            payload["tree_debug"] = True
        return payload | fields

    def websocket(self) -> connect:
        return connect(self.url.replace("http", "ws", 1) + "/generate_stream", compression=None, proxy=None)


async def receive(socket: ClientConnection, *, at_most: int | None = None) -> list[dict[str, Any]]:
    """The messages of one generation, up to its end or so many token messages."""
    messages: list[dict[str, Any]] = []
    num_token_messages = 0
    while True:
        message = json.loads(await asyncio.wait_for(socket.recv(), _TIMEOUT_SECONDS))
        messages.append(message)
        if message["type"] in ("finished", "error"):
            return messages
        num_token_messages += message["type"] == "token"
        if num_token_messages == at_most:
            return messages


def token_ids(messages: list[dict[str, Any]]) -> list[int]:
    return [token for message in messages if message["type"] == "token" for token in message["token_ids"]]


async def answers(client: Client) -> None:
    """Several generations on one socket."""
    async with client.websocket() as socket:
        for _ in range(3):
            await socket.send(json.dumps(client.payload()))
            end = (await receive(socket))[-1]
            client.tally.end(f"websocket: {end.get('finish_reason') or end['code']}")
        await nothing_more(socket)


async def cancels(client: Client) -> None:
    async with client.websocket() as socket:
        await socket.send(json.dumps(client.payload(max_tokens=1000, ignore_eos=True)))
        await receive(socket, at_most=client.random.randint(1, 5))
        await socket.send('{"type": "cancel"}')
        end = (await receive(socket))[-1]
        if end.get("finish_reason") != "cancelled":
            raise BrokenPromiseError(f"a cancelled generation ended with {end}")
        client.tally.end("websocket: cancelled")
        await nothing_more(socket)


async def vanishes(client: Client) -> None:
    socket = await client.websocket()
    await socket.send(json.dumps(client.payload(max_tokens=1000, ignore_eos=True)))
    await receive(socket, at_most=client.random.randint(1, 5))
    socket.transport.abort()
    await socket.wait_closed()
    client.tally.end("vanished: websocket")


async def resumes(client: Client) -> None:
    """Goes away in the middle, comes back with what it has, and must have the answer of an undisturbed run."""
    payload = client.payload(seed=client.random.randrange(2**31))
    async with client.websocket() as socket:
        await socket.send(json.dumps(payload))
        undisturbed = await receive(socket)
    if undisturbed[-1]["type"] != "finished":
        raise BrokenPromiseError(f"an answer ended with {undisturbed[-1]}")
    client.tally.end(f"websocket: {undisturbed[-1]['finish_reason']}")
    async with client.websocket() as socket:
        await socket.send(json.dumps(payload))
        begun = await receive(socket, at_most=2)
    if begun[-1]["type"] == "token":
        client.tally.end("vanished: websocket")
        async with client.websocket() as socket:
            await socket.send(json.dumps(payload | {"generated_token_ids": token_ids(begun)}))
            begun += await receive(socket)
    client.tally.end(f"websocket: {begun[-1].get('finish_reason') or begun[-1]['code']}")
    if token_ids(begun) != token_ids(undisturbed):
        raise BrokenPromiseError(f"resumed: {token_ids(begun)}, undisturbed: {token_ids(undisturbed)}: {payload}")


async def asks(client: Client) -> None:
    async with client.session.post(f"{client.url}/generate", json=client.payload()) as response:
        answer = await response.json()
        if response.status != 200:
            raise BrokenPromiseError(f"REST: {response.status} {answer}")
        client.tally.end(f"rest: {answer['finish_reason']}")


async def hangs_up(client: Client) -> None:
    payload = client.payload(max_tokens=1000, ignore_eos=True)
    try:
        async with asyncio.timeout(client.random.uniform(0.05, 0.5)):
            async with client.session.post(f"{client.url}/generate", json=payload) as response:
                await response.read()
    except TimeoutError:
        client.tally.end("vanished: rest")


async def chats(client: Client) -> None:
    """OpenAI's streamed chat, n = 2."""
    payload = client.payload()
    payload = {name: payload[name] for name in ("messages", "max_tokens", "temperature")}
    async with client.session.get(f"{client.url}/v1/models") as response:
        model = (await response.json())["data"][0]["id"]
    reasons: list[str] = []
    async with client.session.post(
        f"{client.url}/v1/chat/completions", json={**payload, "model": model, "n": 2, "stream": True}
    ) as response:
        if response.status != 200:
            raise BrokenPromiseError(f"OpenAI: {response.status} {await response.text()}")
        lines = [line.strip() async for line in response.content if line.startswith(b"data: ")]
    for line in lines[:-1]:
        chunk = json.loads(line.removeprefix(b"data: "))
        reasons += [choice["finish_reason"] for choice in chunk.get("choices", ()) if choice["finish_reason"]]
    if lines[-1] != b"data: [DONE]" or len(reasons) != 2:
        raise BrokenPromiseError(f"OpenAI: {len(reasons)} ends of 2 choices, last line {lines[-1]!r}")
    for reason in reasons:
        client.tally.end(f"openai: {reason}")


async def stammers(client: Client) -> None:
    """Says what cannot be understood, then what can, on the same socket."""
    async with client.websocket() as socket:
        await socket.send('{"prompt": 3}')
        error = (await receive(socket))[-1]
        if error["type"] != "error":
            raise BrokenPromiseError(f"nonsense was answered by {error}")
        client.tally.end(f"websocket: {error['code']}")
        await socket.send(json.dumps(client.payload(max_tokens=4)))
        end = (await receive(socket))[-1]
        client.tally.end(f"websocket: {end.get('finish_reason') or end['code']}")


async def nothing_more(socket: ClientConnection) -> None:
    """After its terminal message a generation is silent."""
    try:
        extra = await asyncio.wait_for(socket.recv(), 0.05)
    except TimeoutError:
        return
    raise BrokenPromiseError(f"a message after the end: {extra!r}")


Behaviour = Callable[[Client], Awaitable[None]]
BEHAVIOURS: tuple[Behaviour, ...] = (
    answers, answers, cancels, vanishes, resumes, asks, asks, hangs_up, chats, stammers,
)  # fmt: skip


async def live(client: Client, until: asyncio.Event) -> None:
    """One behaviour after another."""
    while not until.is_set():
        behaviour = client.random.choice(BEHAVIOURS)
        try:
            await behaviour(client)
        except (BrokenPromiseError, TimeoutError, OSError, aiohttp.ClientError, ValueError, KeyError) as error:
            client.tally.broken.append(f"{behaviour.__name__}: {type(error).__name__}: {error}")
