"""The model's own thread: it alone drives the engine, and the event loop never waits for it.

Commands go in by a queue that is emptied between two steps; what a step gave comes back to the loop in one call. With
nothing to do the thread sleeps.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from gorgon_protocol.errors import UnavailableError

if TYPE_CHECKING:
    from gorgon_engine.engine import Engine
    from gorgon_engine.events import Event

T = TypeVar("T")

_ENDED = "the engine has stopped: ask another one"

LoadProgress = Callable[[str, float], None]  # stage, share done


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step gave, and how the engine stood behind it."""

    events: "list[Event]"
    at: float  # time.perf_counter() when the step had ended
    num_running: int
    num_waiting: int
    kv_cache_usage: float


class WorkerListener(Protocol):
    """Called on the event loop."""

    def loading(self, stage: str, progress: float) -> None: ...

    def loaded(self, engine: "Engine") -> None: ...

    def load_failed(self, error: Exception) -> None: ...

    def stepped(self, report: StepReport) -> None: ...

    def broken(self, error: BaseException) -> None:
        """The engine cannot be driven any further: no event will come for what is still open."""
        ...


class EngineWorker:
    """Loads the engine on its thread, then steps it for as long as there is work. Methods are for the event loop."""

    def __init__(self, load: "Callable[[LoadProgress], Engine]", listener: WorkerListener) -> None:
        self._load = load
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[Callable[[Engine], None] | None] = queue.SimpleQueue()
        self._calls: set[asyncio.Future[Any]] = set()
        self._has_ended = False  # as the loop knows it
        # A daemon: a thread inside of a native call cannot be ended, and must not keep the process.
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def send(self, command: "Callable[[Engine], None]") -> None:
        """Have the model's thread run a command between two steps. It must not raise."""
        self._commands.put(command)

    async def call(self, function: "Callable[[Engine], T]") -> T:
        """As `send`, and wait for what it returns or raises. Raises `UnavailableError` where the thread ends first."""
        if self._has_ended:
            raise UnavailableError(_ENDED)
        done: asyncio.Future[T] = self._loop.create_future()
        self._calls.add(done)
        done.add_done_callback(self._calls.discard)

        def command(engine: "Engine") -> None:
            try:
                result = function(engine)
            except Exception as error:
                self._post(_set_exception, done, error)
            else:
                self._post(_set_result, done, result)

        self._commands.put(command)
        return await done

    def stop(self) -> None:
        """End the thread between two steps, or behind the loading. Nothing that is open is ended by it."""
        self._commands.put(None)

    def join(self, seconds: float) -> bool:
        """Blocks. Whether the thread has ended."""
        if self._thread.ident is not None:
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            engine = self._load(lambda stage, progress: self._post(self._listener.loading, stage, progress))
        except Exception as error:
            self._post(self._listener.load_failed, error)
            return
        self._post(self._listener.loaded, engine)
        try:
            while self._run_commands(engine):
                self._report(engine, engine.step())
        except BaseException as error:  # a thread must not end unheard, whatever ended it
            self._post(self._listener.broken, error)
        finally:
            self._post(self._ended)

    def _ended(self) -> None:
        """On the loop: what was called will not be answered."""
        self._has_ended = True
        for call in list(self._calls):
            _set_exception(call, UnavailableError(_ENDED))

    def _run_commands(self, engine: "Engine") -> bool:
        """All that have come; waits for one where there is no work. False once told to stop."""
        while True:
            try:
                command = self._commands.get(block=not engine.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            command(engine)

    def _report(self, engine: "Engine", events: "list[Event]") -> None:
        report = StepReport(
            events=events,
            at=time.perf_counter(),
            num_running=engine.num_running,
            num_waiting=engine.num_waiting,
            kv_cache_usage=engine.kv_cache_usage,
        )
        self._post(self._listener.stepped, report)

    def _post(self, callback: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            # The loop is closed: the process is ending and nobody listens any more.
            if not self._loop.is_closed():
                raise


def _set_result(future: "asyncio.Future[T]", result: T) -> None:
    if not future.done():
        future.set_result(result)


def _set_exception(future: "asyncio.Future[T]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
