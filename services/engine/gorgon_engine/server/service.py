"""The service behind the routes: what state the engine is in, and what may be asked of it.

loading -> ready -> draining        told to stop: running requests finish, new ones are refused
       \\-> failed                   could not be loaded, or broke
"""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from gorgon_engine.server.conversion import to_engine_request
from gorgon_engine.server.directory import EngineDirectory, listen_for_heads
from gorgon_engine.server.generation import Generation
from gorgon_engine.server.generations import Generations
from gorgon_engine.server.heads_watch import FixedHeads, HeadsKeeper, HeadsSource, StoreHeads
from gorgon_engine.server.loader import load_engine, model_name
from gorgon_engine.server.logs import logger
from gorgon_engine.server.metrics import EngineMetrics
from gorgon_engine.server.settings import EngineSettings
from gorgon_engine.server.worker import EngineWorker, LoadProgress, StepReport
from gorgon_protocol.errors import GorgonError, NotFoundError, QueueFullError, UnavailableError
from gorgon_protocol.messages import EngineInfo, HeadsInfo, PlainSpeed
from gorgon_protocol.requests import EngineRequest

if TYPE_CHECKING:
    from gorgon_engine.engine import Engine

T = TypeVar("T")

State = Literal["loading", "ready", "draining", "failed"]

_FIRST_LOOK_SECONDS = 30.0  # at a store; then the engine is ready before it ends
_RETRY_LOADING_SECONDS = 2.0
_MIN_PROMPTS = 16  # that may wait to be tokenised, however few requests may wait


@dataclass(frozen=True, slots=True)
class Loading:
    """How far the loading is."""

    stage: str
    progress: float  # 0 to 1


class EngineService:
    """One engine as the routes see it. Belongs to one event loop."""

    def __init__(
        self,
        settings: EngineSettings,
        *,
        load: "Callable[[EngineSettings, LoadProgress], Engine]" = load_engine,
        redis_password: str | None = None,
    ) -> None:
        """load: makes the engine, on the model's thread. Nothing happens before `start`."""
        self.settings = settings
        self.state: State = "loading"
        self.stage = Loading("starting", 0.0)
        self.failure: str | None = None
        self.has_failed = asyncio.Event()
        self.model = model_name(settings)
        self.metrics = EngineMetrics(
            num_running=lambda: self._num_running,
            num_waiting=lambda: self._num_waiting,
            kv_cache_usage=lambda: self._kv_cache_usage,
            is_ready=lambda: float(self.state == "ready"),
            graph_stats=lambda: None if self._engine is None else self._engine.graph_stats,
        )
        self._worker = EngineWorker(partial(load, settings), self)
        self._engine: Engine | None = None
        self._generations: Generations | None = None
        self._keeper: HeadsKeeper | None = None
        self._directory: EngineDirectory | None = None
        self._redis_password = redis_password
        self._url = ""
        self._backbone = ""
        self._num_running = self._num_waiting = 0
        self._kv_cache_usage = 0.0
        # Tokenising a long prompt and checking heads take longer than the loop may stand still.
        self._prompts = ThreadPoolExecutor(max_workers=2, thread_name_prefix="prompts")
        self._num_prompts = 0  # there and waiting for it
        self._max_prompts = max(settings.num_slots + settings.max_waiting, _MIN_PROMPTS)
        self._files = ThreadPoolExecutor(max_workers=1, thread_name_prefix="heads")
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, port: int) -> None:
        """Begin to load. port: that the service listens on."""
        settings = self.settings
        self._url = settings.url(port)
        self._worker.start()
        if settings.redis_url is not None:
            self._directory = EngineDirectory(
                settings.redis_url,
                settings.engine_id,
                password=self._redis_password,
                heartbeat_seconds=settings.heartbeat_seconds,
                describe=self._entry,
            )
            self._spawn(self._directory.run())

    async def drain(self) -> None:
        """Refuse new requests and let the running ones finish and be read, for as long as the settings allow."""
        if self.state == "failed":
            return
        self._set_state("draining")
        if self._generations is None:
            return
        limit = self.settings.drain_seconds
        logger().info("draining", num_open=self._generations.num_open, limit_seconds=limit)
        try:
            async with asyncio.timeout(limit):
                await self._generations.is_idle.wait()
        except TimeoutError:
            self._generations.cut_all(UnavailableError("the engine is stopping and could not wait: ask another one"))

    async def close(self, *, join_seconds: float) -> bool:
        """End what is left, and the model's thread. False where that could not be ended in the time given."""
        if self._generations is not None:
            self._generations.cut_all(UnavailableError("the engine is stopping: ask another one"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._directory is not None:
            await self._directory.remove()
        self._prompts.shutdown(wait=False, cancel_futures=True)
        self._files.shutdown(wait=False, cancel_futures=True)
        self._worker.stop()
        # Loading cannot be ended on the way: not waited for.
        return await asyncio.to_thread(self._worker.join, join_seconds if self._engine is not None else 0.0)

    # What the routes ask

    @property
    def engine(self) -> "Engine":
        """Raises `UnavailableError` while there is none."""
        if self._engine is None or self.state in ("loading", "failed"):
            raise self._unavailable()
        return self._engine

    @property
    def heads(self) -> HeadsInfo:
        return self._keeper.info if self._keeper is not None else HeadsInfo(current=None)

    async def generate(self, wire: EngineRequest) -> Generation:
        """Submit a request. Raises `GorgonError` subclasses; afterwards everything is told by messages."""
        try:
            self._check_open()
            if wire.model not in (None, self.model, self.settings.model):
                raise NotFoundError(f"model {wire.model!r} is not served here: this engine serves {self.model}")
            engine, generations = self.engine, self._generations
            assert generations is not None, "it is ready"
            with generations.place():
                request = await self.in_thread(lambda: to_engine_request(engine, wire))
            self._check_open()  # told to stop meanwhile
            return await generations.submit(wire, request)
        except GorgonError as error:
            self.metrics.refused(error.code)
            logger().info("refused", request_id=wire.request_id, outcome=error.code, reason=str(error))
            raise

    def reader_left(self, generation: Generation) -> None:
        """Nobody reads any more, or all is read."""
        assert self._generations is not None
        self._generations.reader_left(generation)

    def cut(self, generation: Generation, error: GorgonError) -> None:
        """End a generation for a reason of the service's own."""
        assert self._generations is not None
        self._generations.cut(generation, error)

    async def reload_heads(self, version: str | None) -> HeadsInfo:
        """Raises `HeadsError`, `BadRequestError`, `UnavailableError`."""
        self._check_open()
        assert self._keeper is not None
        return await self._keeper.reload(version)

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Run what takes its time beside the loop. Raises `QueueFullError` where too much waits for that already."""
        if self._num_prompts >= self._max_prompts:
            raise QueueFullError(f"{self._num_prompts} texts wait to be tokenised, which is the most: try again later")
        self._num_prompts += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._prompts, function)
        finally:
            self._num_prompts -= 1

    def info(self) -> EngineInfo:
        engine, settings = self._engine, self.settings
        backbone = engine.backbone if engine is not None else None
        return EngineInfo(
            engine_id=settings.engine_id,
            version=version("gorgon"),
            model=self.model,
            backbone=self._backbone,
            kernels=_kernels(engine) if engine is not None else "",
            device=str(backbone.device) if backbone is not None else "",
            context=engine.context if engine is not None else 0,
            vocab_size=backbone.config.vocab_size if backbone is not None else 0,
            num_slots=settings.num_slots,
            max_nodes=settings.max_nodes,
            max_waiting=settings.max_waiting,
            heads=self.heads,
            plain=self._plain_speeds(),
            state=self.state,
            num_running=self._num_running,
            num_waiting=self._num_waiting,
            kv_cache_usage=self._kv_cache_usage,
            notices=list(engine.notices) if engine is not None else [],
        )

    # What the worker says

    def loading(self, stage: str, progress: float) -> None:
        self.stage = Loading(stage, progress)
        logger().info("loading", stage=stage, progress=progress)

    def loaded(self, engine: "Engine") -> None:
        self._engine = engine
        if self.state == "loading":  # else told to stop meanwhile
            self._spawn(self._become_ready(engine))

    def load_failed(self, error: Exception) -> None:
        if isinstance(error, GorgonError):
            self._fail(str(error), None)
        else:
            self._fail(f"the model {self.settings.model} cannot be loaded: {error!r}", error)

    def stepped(self, report: StepReport) -> None:
        self._num_running, self._num_waiting = report.num_running, report.num_waiting
        self._kv_cache_usage = report.kv_cache_usage
        assert self._generations is not None
        self._generations.stepped(report)

    def broken(self, error: BaseException) -> None:
        self._fail(f"the engine broke: {error!r}", error)

    # Inside

    async def _become_ready(self, engine: "Engine") -> None:
        try:
            identity = await self._beside(partial(_identity, self.settings.model))
            self._backbone = identity
            self._keeper = HeadsKeeper(
                engine,
                self._worker,
                self._heads_source(identity),
                metrics=self.metrics,
                run_blocking=self._beside,
            )
            self._generations = Generations(
                engine,
                self._worker,
                metrics=self.metrics,
                max_messages=self.settings.max_buffered_messages,
                heads=lambda: self.heads.current,
            )
            await self._look_for_heads(self._keeper)
        except Exception as error:
            self.load_failed(error)
            return
        if self.state != "loading":  # told to stop meanwhile
            return
        for notice in engine.notices:
            logger().warning("notice", text=notice)
        self._describe(engine)
        self._set_state("ready")
        self._spawn(self._keeper.watch(self.settings.heads_poll_seconds))
        if self.settings.redis_url is not None:
            self._spawn(listen_for_heads(self.settings.redis_url, self._keeper.notify, password=self._redis_password))

    async def _look_for_heads(self, keeper: HeadsKeeper) -> None:
        self.loading("looking for heads", 0.9)
        look = self._spawn(keeper.check())
        await asyncio.wait((look,), timeout=_FIRST_LOOK_SECONDS)
        if not look.done():  # it goes on, and what it finds is taken up while requests run
            logger().warning("store_slow", waited_seconds=_FIRST_LOOK_SECONDS)

    def _heads_source(self, identity: str) -> HeadsSource:
        settings = self.settings
        if settings.store is not None:
            return StoreHeads(settings.store, name=settings.store_backbone, identity=identity)
        return FixedHeads(None if settings.heads == "none" else settings.heads)

    def _describe(self, engine: "Engine") -> None:
        self.metrics.describe(
            model=self.model,
            backbone=self._backbone,
            kernels=engine.backbone.kernels,
            graphs=engine.graph_stats is not None,
            device=str(engine.backbone.device),
            version=version("gorgon"),
        )
        for speed in self._plain_speeds():
            self.metrics.set_plain_speed(speed.batch_size, speed.tokens_per_second)

    def _plain_speeds(self) -> list[PlainSpeed]:
        """At powers of two up to the number of slots, and there."""
        if self._engine is None:
            return []
        most = self.settings.num_slots
        speeds = []
        for size in sorted({min(2**i, most) for i in range(most.bit_length() + 1)}):
            speed = self._engine.plain_tokens_per_second(size)
            if speed is not None:
                speeds.append(PlainSpeed(batch_size=size, tokens_per_second=speed))
        return speeds

    def _entry(self) -> dict[str, Any]:
        """This engine in the directory."""
        return {
            "url": self._url,
            "model": self.model,
            "backbone": self._backbone,
            "num_slots": self.settings.num_slots,
            "num_running": self._num_running,
            "num_waiting": self._num_waiting,
            "kv_cache_usage": self._kv_cache_usage,
            "heads": self.heads.current,
            "state": self.state,
        }

    def _check_open(self) -> None:
        if self.state != "ready":
            raise self._unavailable()

    def _unavailable(self) -> UnavailableError:
        if self.state == "loading":
            text = f"the engine is loading ({self.stage.stage}, {self.stage.progress:.0%}): try again"
        elif self.state == "draining":
            text = "the engine is stopping: ask another one"
        else:
            text = f"the engine has failed: {self.failure}"
        return UnavailableError(text, retry_after_seconds=_RETRY_LOADING_SECONDS)

    def _fail(self, message: str, error: BaseException | None) -> None:
        """Nothing more can be done: the process ends."""
        self.failure = message
        self._set_state("failed")
        logger().error("failed", reason=message, exc_info=error)
        if self._generations is not None:
            self._generations.cut_all(UnavailableError("the engine broke: ask another one, or again in a while"))
        self.has_failed.set()

    def _set_state(self, state: State) -> None:
        self.state = state
        logger().info("state", state=state, url=self._url)
        if self._directory is not None:
            self._directory.changed()

    async def _beside(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._files, function)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger().error("task_failed", task=task.get_name(), exc_info=error)


def _kernels(engine: "Engine") -> str:
    """As people read it: which of them, and how they are launched."""
    kernels = engine.backbone.kernels
    return kernels if engine.graph_stats is None else f"{kernels} in graphs"


def _identity(model: str) -> str:
    from gorgon_engine.models.catalog import resolve_model
    from gorgon_engine.models.identity import backbone_identity

    return backbone_identity(Path(resolve_model(model)))
