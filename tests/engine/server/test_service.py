"""The service's states where they meet: told to stop while the model's thread still loads."""

import asyncio
import threading
from pathlib import Path

from gorgon_engine.engine import Engine
from gorgon_engine.server.loader import load_engine
from gorgon_engine.server.service import EngineService
from gorgon_engine.server.settings import EngineSettings
from gorgon_engine.server.worker import LoadProgress


def test_a_model_that_is_loaded_behind_the_end_changes_nothing(tiny_model: Path) -> None:
    goes_on = threading.Event()

    def load(settings: EngineSettings, progress: LoadProgress) -> Engine:
        assert goes_on.wait(60.0)
        return load_engine(settings, progress)

    async def run() -> None:
        settings = EngineSettings(model=str(tiny_model), dtype="float32", threads=1, context=64)
        service = EngineService(settings, load=load)
        service.start(1)
        await service.drain()
        assert not await service.close(join_seconds=60.0), "loading is not waited for"
        goes_on.set()
        assert await asyncio.to_thread(service._worker.join, 60.0)
        for _ in range(10):  # whatever the thread has said is heard, and what that began has ended
            await asyncio.sleep(0.01)
        assert (service.state, service.failure) == ("draining", None)
        assert not service.has_failed.is_set()

    asyncio.run(run())
