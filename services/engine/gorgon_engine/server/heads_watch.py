"""Which draft heads serve: the store's `latest` is followed while streams run.

What is new is read, verified and packed beside the model's thread, and taken up by it between two steps. What does not
fit is refused and reported; the heads in use stay, and the same `latest` is not tried again.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from gorgon_engine.server.logs import logger
from gorgon_protocol.errors import BadRequestError, GorgonError, HeadsError
from gorgon_protocol.messages import HeadsInfo

if TYPE_CHECKING:
    from gorgon_engine.engine import Engine
    from gorgon_engine.heads.store import Location
    from gorgon_engine.server.metrics import EngineMetrics
    from gorgon_engine.server.worker import EngineWorker

T = TypeVar("T")
RunBlocking = Callable[[Callable[[], T]], Awaitable[T]]  # beside the event loop


@dataclass(frozen=True, slots=True)
class Sight:
    """What a source named at one moment."""

    version: str | None  # name@version; None: nothing yet
    stamp: Hashable  # another one where `latest` was written again, even with the same words


class HeadsSource(Protocol):
    """Where heads come from. Its methods block, and raise `HeadsError`."""

    @property
    def is_followed(self) -> bool:
        """Whether it can come to name another version."""
        ...

    def look(self) -> Sight: ...

    def folder(self, version: str | None) -> Path:
        """The checkpoint of a version; None: of the one that is named now. Raises `BadRequestError` as well."""
        ...


@dataclass(frozen=True, slots=True)
class FixedHeads:
    """A checkpoint that somebody chose, or those that come with the program (`place` None)."""

    place: str | None
    is_followed: bool = False

    def look(self) -> Sight:
        return Sight(None, None)

    def folder(self, version: str | None) -> Path:
        if self.place is None or version is not None:
            raise BadRequestError(
                "this engine follows no store of heads: start it with GORGON_ENGINE_STORE to take up other versions"
            )
        from gorgon_engine.heads.store import local_heads

        return local_heads(self.place)


class StoreHeads:
    """The folder of one backbone in a store: the one of that name, else the one whose heads are for the backbone."""

    is_followed = True

    def __init__(self, store: str, *, name: str | None, identity: str) -> None:
        """name: of the backbone's folder; None: found by `identity`, the backbone's."""
        self._store = store
        self._name = name
        self._identity = identity
        self._found: Location | None = None
        self._had_latest = False

    def look(self) -> Sight:
        from gorgon_engine.heads.checkpoint import LATEST_FILE
        from gorgon_engine.heads.store import read_latest, store_errors

        backbone = self._backbone()
        if backbone is None:
            return Sight(None, None)
        latest = backbone.child(LATEST_FILE)
        version = read_latest(backbone)
        if version is None:
            if self._had_latest:
                raise HeadsError(f"{latest.shown}: is gone: publish again")
            return Sight(None, None)
        self._had_latest = True
        if latest.local is None:
            return Sight(version, version)
        with store_errors(latest, "cannot be read"):
            status = latest.local.stat()
        return Sight(version, (version, status.st_ino, status.st_mtime_ns))

    def folder(self, version: str | None) -> Path:
        from gorgon_engine.heads.store import open_location, version_folder

        backbone = self._backbone()
        wanted = version or self.look().version
        if backbone is None or wanted is None:
            raise HeadsError(f"{open_location(self._store).shown}: holds no heads for this backbone yet: publish some")
        return version_folder(backbone, wanted)

    def _backbone(self) -> "Location | None":
        from gorgon_engine.heads.store import check_backbone_folder, open_location

        if self._found is None:
            root = open_location(self._store)
            if root.local is not None and not root.local.is_dir():
                raise HeadsError(f"{root.shown}: no such store")
            if self._name is not None:
                self._found = root.child(check_backbone_folder(self._name))
            else:
                self._found = self._search(root)
        return self._found

    def _search(self, root: "Location") -> "Location | None":
        from gorgon_engine.heads.checkpoint import LATEST_FILE
        from gorgon_engine.heads.store import backbone_folder, read_latest
        from gorgon_protocol.manifest import MANIFEST_FILE, HeadsManifest

        names = root.names()
        if LATEST_FILE in names:
            return root
        fault: HeadsError | None = None
        for name in names:
            if name != backbone_folder(name):
                continue
            try:
                folder = root.child(name)
                version = read_latest(folder)
                place = None if version is None else folder.child(version).child(MANIFEST_FILE)
                content = None if place is None else place.read()
                if place is None or content is None:
                    continue
                if HeadsManifest.from_json(content, source=place.shown).backbone.identity == self._identity:
                    return folder
            except HeadsError as error:  # of another backbone, as like as not
                fault = fault or error
        if fault is not None:
            raise HeadsError(f"{root.shown}: no heads for this backbone in it, and not all can be read: {fault}")
        return None


@dataclass(frozen=True, slots=True)
class _Refusal:
    version: str  # name@version
    reason: str


class HeadsKeeper:
    """The heads of one running engine. Belongs to the event loop."""

    def __init__(
        self,
        engine: "Engine",
        worker: "EngineWorker",
        source: HeadsSource,
        *,
        metrics: "EngineMetrics",
        run_blocking: RunBlocking[Any],
    ) -> None:
        self._engine = engine
        self._worker = worker
        self._source = source
        self._metrics = metrics
        self._run_blocking = run_blocking
        self._lock = asyncio.Lock()  # one change at a time
        self._wake = asyncio.Event()
        self._seen: Hashable = None
        self._taken: str | None = None  # of the source; heads that came otherwise may bear the same name
        self._source_error: str | None = None  # why the source cannot be looked at now
        self._refusal: _Refusal | None = None
        self._info = HeadsInfo(current=None)
        self._describe(swapped=False)

    @property
    def info(self) -> HeadsInfo:
        """`last_error`: of the source, while it cannot be looked at; else why `refused` was refused."""
        refusal = self._refusal
        reason = None if refusal is None else refusal.reason
        return self._info.model_copy(
            update={
                "last_error": self._source_error or reason,
                "refused": None if refusal is None else refusal.version,
            }
        )

    @property
    def current(self) -> str | None:
        """name@version."""
        return self._info.current

    def notify(self) -> None:
        """Somebody says that there are new heads: look now."""
        self._wake.set()

    async def watch(self, interval_seconds: float) -> None:
        """Look at the source until cancelled."""
        while self._source.is_followed:
            with suppress(TimeoutError):
                async with asyncio.timeout(interval_seconds):
                    await self._wake.wait()
            self._wake.clear()
            await self.check()

    async def check(self) -> None:
        """Take up what the source names, if that is new. Never raises: what is wrong stands in `info`."""
        async with self._lock:
            try:
                sight: Sight = await self._run_blocking(self._source.look)
            except Exception as error:
                self._refuse(None, error)
                return
            self._source_error = None
            if sight.version is None or sight.stamp == self._seen:
                return
            self._seen = sight.stamp
            if sight.version == self._taken:
                self._refusal = None
                return
            try:
                await self._take_up(sight.version)
            except Exception as error:
                self._refuse(sight.version, error)

    async def reload(self, version: str | None) -> HeadsInfo:
        """Take up a version, or what the source names now, also where it was refused before.

        Raises `HeadsError` for heads that do not fit, `BadRequestError` where no other heads can come.
        """
        async with self._lock:
            try:
                if version is None:
                    named: Sight = await self._run_blocking(self._source.look)
                    version = named.version
                await self._take_up(version)
            except BadRequestError:
                raise
            except Exception as error:
                self._refuse(version, error)
                raise error if isinstance(error, GorgonError) else HeadsError(_one_line(error)) from error
            return self.info

    async def _take_up(self, version: str | None) -> None:
        engine, source = self._engine, self._source
        prepared = await self._run_blocking(lambda: engine.prepare_heads(source.folder(version)))
        await self._worker.call(lambda driven: driven.use_heads(prepared))
        self._source_error = self._refusal = None
        self._describe(swapped=True)
        self._taken = version
        self._metrics.swap(taken=True)
        logger().info("heads_taken_up", heads=self.current, family=self._info.family, notices=list(prepared.notices))

    def _describe(self, *, swapped: bool) -> None:
        heads = self._engine.heads
        if heads is None:
            self._metrics.clear_heads()
        else:
            self._metrics.set_heads(heads.name, heads.version, heads.family)
        self._info = HeadsInfo(
            current=None if heads is None else f"{heads.name}@{heads.version}",
            family=None if heads is None else heads.family,
            num_heads=None if heads is None else heads.num_heads,
            loaded_at=None if heads is None else time.time(),
            num_swaps=self._info.num_swaps + swapped,
        )

    def _refuse(self, version: str | None, error: Exception) -> None:
        """Of heads; of the source itself where no version is known. Each reason is said once."""
        reason = _one_line(error)
        if version is None:
            is_new, self._source_error = self._source_error != reason, reason
        else:
            refusal = _Refusal(version, reason)
            is_new, self._refusal = self._refusal != refusal, refusal
        if not is_new:
            return
        self._metrics.swap(taken=False)
        unexpected = None if isinstance(error, GorgonError) else error
        logger().warning("heads_refused", heads=version, kept=self.current, reason=reason, exc_info=unexpected)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
