"""The stream of one reader: bounded, in order, nothing lost, one end."""

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon_engine.events import StatusEvent, TokenEvent
from gorgon_engine.logprobs import TokenLogprobs
from gorgon_engine.outcome import StepSeconds
from gorgon_engine.server.conversion import Speed, TokenChunk
from gorgon_engine.server.stream import MessageStream
from gorgon_protocol.messages import ErrorMessage

EVENT = TokenEvent(
    request_id="request-1",
    token_ids=[7],
    pieces=["a"],
    num_accepted=0,
    step=0,
    num_nodes=1,
    logprobs=None,
    trace=None,
    seconds=StepSeconds(),
    batch_size=1,
)
END = ErrorMessage(code="unavailable", message="the end")


def chunk(first: int, count: int = 1, step: int = 1) -> TokenChunk:
    ids = list(range(first, first + count))
    event = replace(
        EVENT,
        token_ids=ids,
        pieces=[f"<{i}>" for i in ids],
        num_accepted=count - 1,
        step=step,
        num_nodes=count + 2,
        logprobs=[TokenLogprobs(i, -1.0, []) for i in ids],
    )
    return TokenChunk.of(event, Speed(1.0, 1.0, float(step)))


def status(position: int) -> StatusEvent:
    return StatusEvent(request_id="request-1", state="queued", position=position, progress=None)


def test_a_reader_gets_what_there_is_in_order() -> None:
    async def scenario() -> None:
        stream = MessageStream(max_messages=4)
        first, second = chunk(0), chunk(1)
        stream.put_tokens(first)
        stream.put_tokens(second)
        assert await stream.take() == [first, second]
        waiting = asyncio.create_task(stream.take())
        await asyncio.sleep(0)
        third = chunk(2)
        stream.put_tokens(third)
        assert stream.end(END)
        assert await waiting == [third, END]
        assert await stream.take() == []
        assert await stream.take() == []

    asyncio.run(scenario())


def test_a_slow_reader_gets_whole_steps_merged_and_the_last_tree() -> None:
    async def scenario() -> None:
        stream = MessageStream(max_messages=2)
        chunks = [chunk(3 * i, 3, step=i) for i in range(5)]
        events = [c.last for c in chunks]
        for one in chunks:
            stream.put_tokens(one)
        stream.end(END)
        assert (stream.num_buffered, stream.num_merged) == (3, 3)
        first, merged, end = await stream.take()
        assert isinstance(first, TokenChunk)
        assert isinstance(merged, TokenChunk)
        assert end is END
        assert first.token_ids == [0, 1, 2]
        assert merged.token_ids == list(range(3, 15))
        assert "".join(merged.pieces) == "".join(f"<{i}>" for i in range(3, 15))
        assert [entry.token for entry in merged.logprobs or []] == list(range(3, 15))
        assert (merged.num_accepted, merged.num_nodes) == (8, 20)
        assert merged.last is events[-1]
        assert merged.speed.speedup == 4.0
        assert all(event.token_ids == [3 * i, 3 * i + 1, 3 * i + 2] for i, event in enumerate(events)), "not its own"

    asyncio.run(scenario())


def test_only_the_last_status_waits() -> None:
    async def scenario() -> None:
        stream = MessageStream(max_messages=2)
        for position in (3, 2, 1):
            stream.put_status(status(position))
        assert await stream.take() == [status(1)]

    asyncio.run(scenario())


def test_there_is_one_end_and_nothing_behind_it() -> None:
    async def scenario() -> None:
        stream = MessageStream(max_messages=2)
        assert stream.end(END)
        assert not stream.end(ErrorMessage(code="internal", message="too late"))
        stream.put_tokens(chunk(0))
        stream.put_status(status(1))
        assert await stream.take() == [END]
        assert stream.terminal is END

    asyncio.run(scenario())


def test_a_reader_that_gives_up_waiting_can_wait_again() -> None:
    async def scenario() -> None:
        stream = MessageStream(max_messages=2)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await stream.take()
        stream.end(END)
        assert await stream.take() == [END]

    asyncio.run(scenario())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["tokens", "status", "take", "end"]), max_size=60), st.integers(2, 5))
def test_nothing_is_lost_and_little_is_kept(actions: list[str], max_messages: int) -> None:
    async def scenario() -> None:
        stream = MessageStream(max_messages=max_messages)
        sent, received, ends = 0, [], 0
        for action in [*actions, "end"]:
            if action == "tokens":
                stream.put_tokens(chunk(sent))
                sent += stream.terminal is None
            elif action == "status":
                stream.put_status(status(sent))
            elif action == "end":
                stream.end(END)
            elif stream.num_buffered:
                for entry in await stream.take():
                    received += entry.token_ids if isinstance(entry, TokenChunk) else []
                    ends += entry is END
            assert stream.num_buffered <= max_messages + 2, "a status between tokens, and the end"
        while entries := await stream.take():
            for entry in entries:
                received += entry.token_ids if isinstance(entry, TokenChunk) else []
                ends += entry is END
        assert received == list(range(sent))
        assert ends == 1

    asyncio.run(scenario())
