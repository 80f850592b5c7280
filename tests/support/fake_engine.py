"""An engine without a model: the real protocol, a deterministic answer, and faults on command.

    PYTHONPATH=tests python -m support.fake_engine --port 8101 --step-seconds 0.02

In a test, on a thread of its own:

    with FakeEngine(step_seconds=0.01) as engine:
        ... engine.url ...
        engine.faults = Faults(drop_after=3, times=1)

From another process: `POST /_fault` with the fields of `Faults` as JSON.
"""

import argparse
import asyncio
import contextlib
import hmac
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, Self

import uvloop
from aiohttp import web

from gorgon_protocol.errors import AuthenticationError, GorgonError, QueueFullError, TooLargeError, UnavailableError
from gorgon_protocol.messages import EngineInfo, HeadsInfo, PlainSpeed
from gorgon_protocol.requests import EngineRequest
from support import fake_routes
from support.fake_answer import VOCAB_SIZE, FakeAnswer
from support.fake_routes import encode, error_response, parse

_MESSAGES_A_WRITE = 8  # where nothing paces the stream
_HANG_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong, and when: `*_after` counts the messages that are still sent, 0 = none of them.

    `times` bounds how many generations are hit; None = every one.
    """

    first_delay_seconds: float = 0.0  # before the response begins
    delay_seconds: float = 0.0  # before each message, on top of the engine's pace
    drop_after: int | None = None  # the connection is aborted
    end_after: int | None = None  # the response ends properly, without a terminal message
    hang_after: int | None = None  # nothing more is said, the connection stays
    garbage_after: int | None = None  # a line that is not JSON
    error_after: int | None = None  # an error message of code `internal`
    die_after: int | None = None  # the whole engine: all connections aborted, the port closed, the process gone
    refuse: str | None = None  # "queue_full" or "unavailable", before the stream
    loading: bool = False  # not ready: generations are refused with `unavailable`
    times: int | None = None


class FakeEngine:
    """One engine. As a context manager it serves on a thread; `run()` serves on the calling one."""

    def __init__(
        self,
        *,
        name: str = "fake-0",
        model: str = "fake",
        port: int = 0,
        step_seconds: float = 0.0,
        num_slots: int = 8,
        max_waiting: int = 64,
        context: int = 8192,
        secret: str | None = None,
        stamp: bool = False,
        faults: Faults | None = None,
    ) -> None:
        """`stamp`: a message's text is the time at which it was sent, in nanoseconds of the monotonic clock."""
        self.name = name
        self.model = model
        self.faults = faults or Faults()
        self.requests: list[EngineRequest] = []  # all that ever came, in order
        self.num_running = 0
        self.num_cancelled = 0  # clients that went away before the end
        self.num_messages = 0  # token messages made, and the tokens in them
        self.num_tokens = 0
        self._step_seconds = step_seconds
        self._num_slots = num_slots
        self._max_waiting = max_waiting
        self._context = context
        self._secret = secret
        self._stamp = stamp
        self._socket = socket.create_server(("127.0.0.1", port), backlog=4096)
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._connections: set[asyncio.Transport] = set()
        self._stopped: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._exits = False  # a process of its own: `die_after` ends it

    def __enter__(self) -> Self:
        started = threading.Event()
        self._thread = threading.Thread(target=self._serve_on_thread, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(10.0), "the fake engine did not start"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the thread, aborting what still runs. Harmless when it has ended."""
        assert self._thread is not None
        assert self._loop is not None
        assert self._stopped is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: it died
            self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(10.0)
        assert not self._thread.is_alive()

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        self._exits = True
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve(threading.Event(), signals=(signal.SIGTERM, signal.SIGINT)))

    def _serve_on_thread(self, started: threading.Event) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve(started))

    async def _serve(self, started: threading.Event, *, signals: tuple[signal.Signals, ...] = ()) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        for number in signals:
            self._loop.add_signal_handler(number, self._stopped.set)
        app = web.Application(middlewares=[self._errors_as_json], client_max_size=64 << 20)
        app.add_routes(
            [
                web.post("/generate", self._generate),
                web.post("/tokenize", fake_routes.tokenize),
                web.post("/detokenize", fake_routes.detokenize),
                web.get("/info", self._info),
                web.get("/heads", fake_routes.heads),
                web.post("/heads/reload", fake_routes.reload_heads),
                web.get("/live", fake_routes.live),
                web.get("/ready", self._ready),
                web.get("/metrics", self._metrics),
                web.post("/_fault", self._set_faults),
                web.get("/_stats", self._stats),
            ]
        )
        # Without handler_cancellation a client that goes away is noticed only by the next write.
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.SockSite(runner, self._socket).start()
        started.set()
        try:
            await self._stopped.wait()
        finally:
            self._abort_all()
            await runner.cleanup()

    def _abort_all(self) -> None:
        for transport in list(self._connections):
            transport.abort()
        self._connections.clear()

    @web.middleware
    async def _errors_as_json(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        transport = request.transport
        assert transport is not None
        self._connections.add(transport)
        try:
            self._authenticate(request)
            return await handler(request)
        except GorgonError as error:
            return error_response(error)
        except web.HTTPRequestEntityTooLarge as error:
            return error_response(TooLargeError(error.reason))
        finally:
            self._connections.discard(transport)

    def _authenticate(self, request: web.Request) -> None:
        if self._secret is None or request.path in ("/live", "/ready"):
            return
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self._secret.encode()):
            raise AuthenticationError("the engine's secret is missing or wrong")

    async def _generate(self, http: web.Request) -> web.StreamResponse:
        request = await parse(http, EngineRequest)
        self.requests.append(request)
        faults = self._take_faults()
        if faults.first_delay_seconds:
            await asyncio.sleep(faults.first_delay_seconds)
        if self.faults.loading or faults.refuse == "unavailable":
            raise UnavailableError("the engine is loading", retry_after_seconds=1.0)
        if faults.refuse == "queue_full" or self.num_running >= self._num_slots + self._max_waiting:
            raise QueueFullError(f"{self._max_waiting} requests wait already", retry_after_seconds=1.0)
        answer = FakeAnswer(request, engine=self.name, context=self._context)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        self.num_running += 1
        try:
            await response.prepare(http)
            await self._stream(answer, response, faults, http)
        except (ConnectionError, asyncio.CancelledError):
            self.num_cancelled += 1
            raise
        finally:
            self.num_running -= 1
        return response

    async def _stream(
        self, answer: FakeAnswer, response: web.StreamResponse, faults: Faults, http: web.Request
    ) -> None:
        pace = self._step_seconds + faults.delay_seconds
        batch = 1 if pace or faults != Faults(times=faults.times) else _MESSAGES_A_WRITE
        num_sent = 0
        while True:
            if not await self._go_on(faults, num_sent, response, http):
                return
            lines: list[bytes] = []
            while answer.end is None and len(lines) < batch:
                lines.append(self._line(answer))
            num_sent += len(lines)
            if answer.end is not None:
                # The fault may be due between the last token and the end: two writes, then.
                if lines and batch == 1:
                    await response.write(b"".join(lines))
                    if not await self._go_on(faults, num_sent, response, http):
                        return
                    lines = []
                await response.write(b"".join([*lines, encode(answer.finished())]))
                await response.write_eof()
                return
            await response.write(b"".join(lines))
            await asyncio.sleep(pace)

    def _line(self, answer: FakeAnswer) -> bytes:
        message = answer.next_step()
        self.num_messages += 1
        self.num_tokens += len(message["token_ids"])
        if self._stamp:
            message["text"] = str(time.monotonic_ns())
            message["pieces"] = [message["text"], *([""] * (len(message["pieces"]) - 1))]
        return encode(message)

    async def _go_on(self, faults: Faults, num_sent: int, response: web.StreamResponse, http: web.Request) -> bool:
        """Do what is due after so many messages; whether the stream goes on."""
        if faults.die_after is not None and num_sent >= faults.die_after:
            if self._exits:
                os.kill(os.getpid(), signal.SIGKILL)
            assert self._stopped is not None
            self._socket.close()
            self._stopped.set()
            self._abort_all()
            return False
        if faults.drop_after is not None and num_sent >= faults.drop_after:
            if http.transport is not None:
                http.transport.abort()
            return False
        if faults.end_after is not None and num_sent >= faults.end_after:
            await response.write_eof()
            return False
        if faults.garbage_after is not None and num_sent >= faults.garbage_after:
            await response.write(b'{"type": "tok\xff\n')
            return False
        if faults.error_after is not None and num_sent >= faults.error_after:
            await response.write(encode({"type": "error", "code": "internal", "message": "asked for by the test"}))
            return False
        if faults.hang_after is not None and num_sent >= faults.hang_after:
            await asyncio.sleep(_HANG_SECONDS)
        return True

    def _take_faults(self) -> Faults:
        faults = self.faults
        if faults.times is None:
            return faults
        if faults.times <= 0:
            return Faults()
        self.faults = replace(faults, times=faults.times - 1)
        return faults

    async def _info(self, http: web.Request) -> web.Response:
        info = EngineInfo(
            engine_id=self.name,
            version="0",
            model=self.model,
            backbone="fake-backbone",
            kernels="none",
            device="cpu",
            context=self._context,
            vocab_size=VOCAB_SIZE,
            num_slots=self._num_slots,
            max_nodes=32,
            max_waiting=self._max_waiting,
            heads=HeadsInfo(current=None),
            plain=[PlainSpeed(batch_size=1, tokens_per_second=50.0)],
            state="loading" if self.faults.loading else "ready",
            num_running=min(self.num_running, self._num_slots),
            num_waiting=max(0, self.num_running - self._num_slots),
            kv_cache_usage=min(1.0, self.num_running / self._num_slots),
        )
        return web.Response(body=info.model_dump_json(), content_type="application/json")

    async def _ready(self, http: web.Request) -> web.Response:
        if self.faults.loading:
            return web.json_response({"state": "loading", "stage": "weights", "progress": 0.5}, status=503)
        return web.json_response({"state": "ready"})

    async def _metrics(self, http: web.Request) -> web.Response:
        return web.Response(text=f"gorgon:num_requests_running {self.num_running}\n")

    async def _set_faults(self, http: web.Request) -> web.Response:
        self.faults = Faults(**await http.json())
        return web.json_response(asdict(self.faults))

    async def _stats(self, http: web.Request) -> web.Response:
        return web.json_response(
            {
                "num_requests": len(self.requests),
                "num_running": self.num_running,
                "num_cancelled": self.num_cancelled,
                "num_messages": self.num_messages,
                "num_tokens": self.num_tokens,
            }
        )


class ScriptedEngine(FakeEngine):
    """Every generation that comes takes the next faults of the script; without any left nothing goes wrong."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.script: list[Faults] = []

    def _take_faults(self) -> Faults:
        return self.script.pop(0) if self.script else Faults()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="fake-0")
    parser.add_argument("--model", default="fake", help="its name")
    parser.add_argument("--port", type=int, default=0, help="0: a free one, printed")
    parser.add_argument("--step-seconds", type=float, default=0.0, help="between two messages of a stream")
    parser.add_argument("--num-slots", type=int, default=8)
    parser.add_argument("--max-waiting", type=int, default=64)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--stamp", action="store_true", help="a message's text is when it was sent")
    parser.add_argument("--faults", type=json.loads, default={}, help="fields of Faults as JSON")
    arguments = vars(parser.parse_args())
    engine = FakeEngine(**arguments | {"faults": Faults(**arguments["faults"])})
    print(f"listening at {engine.url}", flush=True)
    engine.run()


if __name__ == "__main__":
    main()
