"""Readers that leave, stand still or come in crowds: the slot is freed, nothing is lost, each stream has one end."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from gorgon_engine.engine import Engine
from gorgon_engine.events import Event
from gorgon_engine.server.loader import load_engine
from gorgon_engine.server.settings import EngineSettings
from gorgon_engine.server.worker import LoadProgress
from gorgon_protocol.messages import MESSAGE, ErrorMessage, FinishedMessage, Message, TokenMessage

# Never ends by itself within a test that paces the engine.
ENDLESS = {"prompt": "the cat", "request_id": "mine", "seed": 3, "ignore_eos": True, "temperature": 0.8}


class Pace:
    """Lets the engine make one step after another, when told to."""

    def __init__(self) -> None:
        self._steps = threading.Semaphore(0)
        self._free = threading.Event()
        self._waits = threading.Event()  # the engine is about to make a step that it may not make yet
        self._num_allowed = 0
        self._num_made = 0

    def load(self, settings: EngineSettings, progress: LoadProgress) -> Engine:
        engine = load_engine(settings, progress)
        step = engine.step

        def paced() -> list[Event]:
            self._waits.set()
            while not self._free.is_set():
                if self._steps.acquire(timeout=0.05):
                    break
            self._waits.clear()
            self._num_made += 1
            return step()

        engine.step = paced  # type: ignore[method-assign]
        return engine

    def allow(self, count: int) -> None:
        self._num_allowed += count
        self._steps.release(count)

    @property
    def has_settled(self) -> bool:
        """All steps that were allowed are made, and the commands that came up to then are heard."""
        return self._num_made == self._num_allowed and self._waits.is_set()

    def free(self) -> None:
        self._free.set()


@contextmanager
def paced(serve: Any, **settings: Any) -> Iterator[tuple[Any, Pace]]:
    """A service whose engine steps when told to, until the block ends."""
    pace = Pace()
    with serve(pace.load, **settings) as running:
        try:
            running.wait_until_ready()
            yield running, pace
        finally:
            pace.free()


def post(running: Any, body: dict[str, Any], *, receive_bytes: int | None = None) -> socket.socket:
    """A request on a connection of its own, not read yet."""
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(60.0)
    connection.connect(("127.0.0.1", int(running.url.rpartition(":")[2])))
    content = json.dumps(body).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


def read(connection: socket.socket) -> tuple[list[Message], bool]:
    """The messages of a response up to the connection's end, and whether the response was complete."""
    raw = b""
    try:
        while part := connection.recv(1 << 20):
            raw += part
    except ConnectionResetError:
        pass
    head, _, rest = raw.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), head
    body, whole = b"", False
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        if int(size, 16) == 0:
            whole = True
            break
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    lines = body.splitlines()
    if not whole and not body.endswith(b"\n"):
        lines = lines[:-1]
    return [MESSAGE.validate_json(line) for line in lines], whole


def ids(messages: list[Message]) -> list[int]:
    return [token for message in messages if isinstance(message, TokenMessage) for token in message.token_ids]


def test_a_reader_that_leaves_frees_its_slot_by_the_next_step(serve: Any) -> None:
    with paced(serve, num_slots=1) as (running, pace):
        commands = running.service._worker._commands
        with post(running, ENDLESS):
            pace.allow(5)
            running.wait_for(lambda: pace.has_settled)
            assert running.info()["num_running"] == 1
        running.wait_for(lambda: commands.qsize() == 1)  # the cancellation is there, while a step is in flight;
        pace.allow(2)  # before the next one it is heard
        running.wait_for(lambda: running.info()["num_running"] == 0)
        assert running.service._generations.num_open == 0
        pace.free()
        answer = running.client.post("/generate", json=ENDLESS | {"max_tokens": 3})
        assert len(ids([MESSAGE.validate_json(line) for line in answer.text.splitlines()])) == 3
        assert 'request_success_total{finished_reason="cancelled"} 1.0' in running.client.get("/metrics").text


def test_a_reader_that_leaves_the_queue_is_forgotten(serve: Any) -> None:
    with paced(serve, num_slots=1) as (running, pace):
        generations, commands = running.service._generations, running.service._worker._commands
        with post(running, ENDLESS):
            pace.allow(3)
            running.wait_for(lambda: pace.has_settled)
            with post(running, ENDLESS):
                running.wait_for(lambda: commands.qsize() == 1)
                pace.allow(1)
                running.wait_for(lambda: pace.has_settled)
            running.wait_for(lambda: commands.qsize() == 1)
            pace.allow(2)
            running.wait_for(lambda: pace.has_settled and generations.num_open == 1)
            assert running.info()["num_running"] == 1
        pace.free()
        running.wait_for(lambda: generations.num_open == 0)


def test_a_slow_reader_loses_nothing(serve: Any) -> None:
    body = ENDLESS | {"max_tokens": 400, "tree_debug": True, "logprobs": 20}
    with serve(max_buffered_messages=4) as running:
        running.wait_until_ready()
        with post(running, body) as connection:
            quick, whole = read(connection)
        assert whole
        with post(running, body, receive_bytes=4096) as connection:
            running.wait_for(lambda: has_finished(running, times=2))  # the model has not waited for the reader
            slow, whole = read(connection)
        assert whole
        assert ids(slow) == ids(quick)
        end = slow[-1]
        assert isinstance(end, FinishedMessage)
        num_steps = 1 + end.metrics.speculative_decoding.num_spec_steps
        assert sum(isinstance(m, TokenMessage) for m in slow) < num_steps, "some were merged"
        text = ["".join(m.text for m in ms if isinstance(m, TokenMessage | FinishedMessage)) for ms in (slow, quick)]
        assert text[0] == text[1]
        logprobs = [
            [entry.token_id for m in ms if isinstance(m, TokenMessage) for entry in m.logprobs or ()]
            for ms in (slow, quick)
        ]
        assert logprobs[0] == logprobs[1] == ids(quick)
        merged = running.client.get("/metrics").text.rpartition("gorgon:merged_messages_total ")[2].split()[0]
        assert float(merged) > 0


def has_finished(running: Any, *, times: int = 1) -> bool:
    return f'request_success_total{{finished_reason="length"}} {times}.0' in running.client.get("/metrics").text


def has_stood_still(running: Any) -> bool:
    return 'request_failure_total{code="slow_reader"} 1.0' in running.client.get("/metrics").text


def test_a_reader_that_stands_still_is_ended_and_told(serve: Any) -> None:
    body = ENDLESS | {"tree_debug": True, "logprobs": 20}
    with paced(serve, max_buffered_messages=4, slow_reader_seconds=2.0, num_slots=1) as (running, pace):
        with post(running, body, receive_bytes=4096) as connection:
            pace.allow(300)
            running.wait_for(lambda: has_stood_still(running))
            messages, whole = read(connection)  # within the second deadline
        pace.free()
        running.wait_for(lambda: running.info()["num_running"] == 0)
        assert whole
        assert len(ids(messages)) >= 299, "all that there was"
        assert isinstance(messages[-1], ErrorMessage)
        assert messages[-1].code == "slow_reader"
        assert messages[-1].request_id == "mine"
        assert not any(isinstance(m, FinishedMessage) for m in messages)


@pytest.mark.parametrize("ends", [True, False])
def test_a_reader_that_never_reads_again_is_cut_off(ends: bool, serve: Any) -> None:
    """Whether the generation has ended meanwhile or not."""
    body = ENDLESS | {"tree_debug": True, "logprobs": 20, "max_tokens": 250 if ends else 4000}
    limit = 6.0 if ends else 0.2  # it ends before it is too slow, or is too slow first
    with paced(serve, max_buffered_messages=4, slow_reader_seconds=limit, num_slots=1) as (running, pace):
        with post(running, body, receive_bytes=4096) as connection:
            pace.allow(300)
            running.wait_for(lambda: has_finished(running) if ends else has_stood_still(running))
            server = running.server
            running.wait_for(lambda: len(server.server_state.tasks) == 0)  # of the response; ours is done at once
            messages, whole = read(connection)
        assert not whole, "the connection was dropped in the middle"
        assert not any(isinstance(m, FinishedMessage | ErrorMessage) for m in messages)


def test_a_crowd_is_served_up_to_the_queue_and_the_rest_is_sent_away(serve: Any) -> None:
    with serve(num_slots=2, max_waiting=5, context=4000) as running:
        running.wait_until_ready()

        def ask(number: int) -> httpx.Response:
            return httpx.post(
                f"{running.url}/generate",
                json=ENDLESS | {"max_tokens": 5, "request_id": f"r{number}"},
                timeout=60.0,
                trust_env=False,
            )

        with ThreadPoolExecutor(20) as pool:
            with post(running, ENDLESS), post(running, ENDLESS):
                running.wait_for(lambda: running.info()["num_running"] == 2)  # both slots are taken for long
                answers = [pool.submit(ask, number) for number in range(20)]
                running.wait_for(lambda: sum(answer.done() for answer in answers) == 15)
            responses = [answer.result() for answer in answers]
        refused = [r for r in responses if r.status_code == 429]
        served = [r for r in responses if r.status_code == 200]
        assert (len(refused), len(served)) == (15, 5)
        for response in refused:
            assert response.json()["error"]["code"] == "queue_full"
            assert int(response.headers["retry-after"]) >= 1
        for response in served:
            messages = [MESSAGE.validate_json(line) for line in response.text.splitlines()]
            assert len(ids(messages)) == 5
            assert isinstance(messages[-1], FinishedMessage)


def test_prompts_beyond_the_queue_are_sent_away_before_they_cost_anything(serve: Any) -> None:
    """Those that are still made ready count as well."""
    goes_on, asked = threading.Event(), []

    def load(settings: EngineSettings, progress: LoadProgress) -> Engine:
        engine = load_engine(settings, progress)
        request = engine.request

        def slowly(*arguments: Any, **options: Any) -> Any:
            asked.append(options)
            assert goes_on.wait(60.0)
            return request(*arguments, **options)

        engine.request = slowly  # type: ignore[method-assign]
        return engine

    with serve(load, num_slots=1, max_waiting=2) as running, ThreadPoolExecutor(3) as pool:
        running.wait_until_ready()
        body = ENDLESS | {"max_tokens": 3}

        def ask() -> httpx.Response:
            return httpx.post(f"{running.url}/generate", json=body, timeout=60.0, trust_env=False)

        try:
            served = [pool.submit(ask) for _ in range(3)]
            running.wait_for(lambda: running.on_loop(lambda: running.service._generations._num_prepared) == 3)
            refused = [running.client.post("/generate", json=body) for _ in range(5)]
        finally:
            goes_on.set()
        for response in refused:
            assert response.status_code == 429
            assert response.json()["error"]["code"] == "queue_full"
        assert all(answer.result().status_code == 200 for answer in served)
        assert len(asked) == 3
        assert running.client.post("/generate", json=body).status_code == 200, "their places are free again"


def test_texts_to_tokenise_are_bounded_as_well(serve: Any) -> None:
    goes_on = threading.Event()
    with serve(num_slots=1, max_waiting=1) as running, ThreadPoolExecutor(16) as pool:
        running.wait_until_ready()
        service = running.service
        try:
            for _ in range(2):  # both threads are busy
                running.loop.call_soon_threadsafe(service._prompts.submit, goes_on.wait, 60.0)
            answers = [
                pool.submit(httpx.post, f"{running.url}/tokenize", json={"text": "a"}, timeout=60.0, trust_env=False)
                for _ in range(16)
            ]
            running.wait_for(lambda: running.on_loop(lambda: service._num_prompts) == 16)
            response = running.client.post("/tokenize", json={"text": "a"})
            assert response.status_code == 429
            assert response.json()["error"]["code"] == "queue_full"
        finally:
            goes_on.set()
        assert all(answer.result().status_code == 200 for answer in answers)
        assert running.client.post("/tokenize", json={"text": "a"}).status_code == 200


def test_draining_waits_for_those_who_read(serve: Any) -> None:
    """What has finished is not all read: a process that ended now would take the last lines along."""
    with serve() as running:
        running.wait_until_ready()
        body = ENDLESS | {"max_tokens": 400, "tree_debug": True, "logprobs": 20}
        with post(running, body, receive_bytes=4096) as connection:
            running.wait_for(lambda: has_finished(running))
            draining = asyncio.run_coroutine_threadsafe(running.service.drain(), running.loop)
            running.wait_for(lambda: running.client.get("/ready").json()["state"] == "draining")
            for _ in range(10):
                running.on_loop(lambda: None)
            assert not draining.done()
            messages, whole = read(connection)
        draining.result(60.0)
        assert whole
        assert len(ids(messages)) == 400
        assert isinstance(messages[-1], FinishedMessage)


def test_what_is_read_when_draining_ends_is_with_the_system(serve: Any) -> None:
    """Which delivers it, also when the process has ended. The answer is so short that no write of it has to wait."""
    with serve() as running:
        running.wait_until_ready()
        with post(running, ENDLESS | {"max_tokens": 40, "logprobs": 20}, receive_bytes=4096) as connection:
            running.wait_for(lambda: has_finished(running))
            draining = asyncio.run_coroutine_threadsafe(running.service.drain(), running.loop)

            def buffered() -> int:
                """Bytes that this process still holds for any reader, where it has stopped to wait for them."""
                held = [c.transport.get_write_buffer_size() for c in running.server.server_state.connections]
                return max(held, default=0) if draining.done() else -1

            while (left := running.on_loop(buffered)) < 0:
                assert connection.recv(1024)
            assert left <= len(b"0\r\n\r\n"), "the end of the response alone"


def test_draining_waits_for_no_reader_longer_than_it_may(serve: Any) -> None:
    with serve(drain_seconds=0.2) as running:
        running.wait_until_ready()
        body = ENDLESS | {"max_tokens": 400, "tree_debug": True, "logprobs": 20}
        with post(running, body, receive_bytes=4096):
            running.wait_for(lambda: has_finished(running))
            asyncio.run_coroutine_threadsafe(running.service.drain(), running.loop).result(60.0)


def test_waiting_has_a_deadline(serve: Any) -> None:
    with paced(serve, num_slots=1) as (running, pace):
        commands = running.service._worker._commands
        with post(running, ENDLESS):
            pace.allow(3)
            running.wait_for(lambda: pace.has_settled)
            with post(running, ENDLESS | {"timeout_seconds": 0.01}) as connection:
                running.wait_for(lambda: commands.qsize() == 1)
                pace.allow(1)
                running.wait_for(lambda: pace.has_settled)  # now it waits
                time.sleep(0.02)
                pace.allow(1)
                messages, whole = read(connection)
        assert whole
        assert isinstance(messages[-1], ErrorMessage)
        assert messages[-1].code == "timeout"


def test_a_reader_that_stands_still_behind_its_last_lines_is_cut_off(serve: Any) -> None:
    """All lines leave in one write, which waits for no room; the end of the response does."""
    body = ENDLESS | {"logprobs": 20, "max_tokens": 300}
    with paced(serve, slow_reader_seconds=0.2, num_slots=1) as (running, pace):
        with post(running, body, receive_bytes=4096) as connection:
            engine = running.service.engine
            running.wait_for(lambda: running.service._generations.num_open == 1 and engine.has_work)
            goes_on = threading.Event()
            running.loop.call_soon_threadsafe(goes_on.wait, 60.0)  # no line is written meanwhile
            pace.free()
            running.wait_for(lambda: not engine.has_work)
            goes_on.set()
            running.wait_for(lambda: len(running.server.server_state.tasks) == 0)
            _, whole = read(connection)
        assert not whole, "the connection was dropped in the middle"
