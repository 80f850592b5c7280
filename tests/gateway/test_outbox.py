"""Merging for slow readers: nothing but trees is lost, whatever the order of writes and reads."""

import asyncio
from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from gorgon_gateway.engine_client import RelayedMessage
from gorgon_gateway.outbox import Outbox
from gorgon_protocol.messages import MESSAGE


def token_message(number: int, *, size: int = 1, tree: bool = False, logprobs: bool = False) -> RelayedMessage:
    ids = [100 * number + i for i in range(size)]
    pieces = [f" w{token}é" for token in ids]
    fields: dict[str, Any] = {
        "type": "token",
        "text": "".join(pieces),
        "token_ids": ids,
        "pieces": pieces,
        "num_accepted": size - 1,
        "num_nodes": 16,
    }
    if tree:
        fields["tree_debug"] = {"step": number}
    if logprobs:
        fields["logprobs"] = [{"token_id": token, "token": "", "logprob": -1.0, "top": []} for token in ids]
    return RelayedMessage.of(fields)


STATUS = RelayedMessage.of({"type": "status", "state": "resuming"})
FINISHED = RelayedMessage.of({"type": "finished", "text": ""})


@given(
    sizes=st.lists(st.integers(1, 4), max_size=60),
    reads=st.lists(st.booleans(), max_size=60),
    max_messages=st.integers(2, 10),
    tree=st.booleans(),
    logprobs=st.booleans(),
)
def test_every_token_and_text_comes_in_order(
    sizes: list[int], reads: list[bool], max_messages: int, tree: bool, logprobs: bool
) -> None:
    async def run() -> list[dict[str, Any]]:
        outbox = Outbox(max_messages=max_messages, max_bytes=10_000)
        got: list[bytes | None] = []
        for number, size in enumerate(sizes):
            outbox.put(token_message(number, size=size, tree=tree, logprobs=logprobs))
            assert len(outbox) <= max_messages
            if number < len(reads) and reads[number]:
                got.append(await outbox.get())
        outbox.put(FINISHED)
        outbox.close()
        while (raw := await outbox.get()) is not None:
            got.append(raw)
        return [orjson.loads(raw) for raw in got if raw is not None]

    messages = asyncio.run(run())
    assert [m["type"] for m in messages].count("finished") == 1
    assert messages[-1]["type"] == "finished"
    given_messages = [token_message(n, size=s, tree=tree, logprobs=logprobs).fields for n, s in enumerate(sizes)]
    tokens = [m for m in messages if m["type"] == "token"]
    for name in ("token_ids", "pieces", *(["logprobs"] if logprobs else [])):
        assert [one for m in tokens for one in m[name]] == [one for m in given_messages for one in m[name]]
    assert "".join(m["text"] for m in tokens) == "".join(m["text"] for m in given_messages)
    for name in ("num_accepted", "num_nodes"):
        assert sum(m[name] for m in tokens) == sum(m[name] for m in given_messages)
    for message in tokens:
        assert "".join(message["pieces"]) == message["text"]
        if tree:
            assert message["tree_debug"]["step"] == message["token_ids"][-1] // 100
        else:
            MESSAGE.validate_python(message)


def test_what_is_not_full_is_passed_on_as_it_is() -> None:
    async def run() -> None:
        outbox = Outbox(max_messages=4, max_bytes=10_000)
        messages = [token_message(0), STATUS, token_message(1), FINISHED]
        for message in messages:
            outbox.put(message)
        assert [await outbox.get() for _ in messages] == [message.raw for message in messages]
        assert outbox.num_merged == 0

    asyncio.run(run())


def test_only_tokens_behind_one_another_are_merged() -> None:
    async def run() -> None:
        outbox = Outbox(max_messages=2, max_bytes=10_000)
        for message in (token_message(0), STATUS, token_message(1), token_message(2), FINISHED):
            outbox.put(message)
        kinds = [orjson.loads(await outbox.get() or b"")["type"] for _ in range(len(outbox))]
        assert kinds == ["token", "status", "token", "finished"]

    asyncio.run(run())


def test_many_bytes_are_as_full_as_many_messages() -> None:
    outbox = Outbox(max_messages=1000, max_bytes=2000)
    for number in range(500):
        outbox.put(token_message(number))
    assert len(outbox) < 30


def test_no_message_grows_beyond_what_clients_take() -> None:
    async def run() -> list[int]:
        outbox = Outbox(max_messages=2, max_bytes=10_000)
        for number in range(40_000):
            outbox.put(token_message(number, logprobs=True))
        return [len(await outbox.get() or b"") for _ in range(len(outbox))]

    sizes = asyncio.run(run())
    assert max(sizes) < 1 << 20
    assert len(sizes) > 3


def test_a_reader_waits_and_is_woken() -> None:
    async def run() -> None:
        outbox = Outbox(max_messages=2, max_bytes=10_000)
        reader = asyncio.ensure_future(outbox.get())
        await asyncio.sleep(0)
        assert not reader.done()
        outbox.put(STATUS)
        assert await reader == STATUS.raw
        reader = asyncio.ensure_future(outbox.get())
        await asyncio.sleep(0)
        outbox.close()
        assert await reader is None

    asyncio.run(run())
