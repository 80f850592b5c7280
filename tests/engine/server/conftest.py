"""A tiny model with a tokenizer, and the service around it: in a thread with a real socket and the real event loop."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest
import torch
import uvloop

from gorgon_engine.engine import Engine
from gorgon_engine.heads.checkpoint import save_heads
from gorgon_engine.heads.medusa import MedusaHeads
from gorgon_engine.models.config import BackboneConfig
from gorgon_engine.models.identity import backbone_identity
from gorgon_engine.server.loader import load_engine
from gorgon_engine.server.serve import EngineServer, bind, make_server
from gorgon_engine.server.service import EngineService
from gorgon_engine.server.settings import EngineSettings
from gorgon_engine.server.worker import LoadProgress
from gorgon_protocol.manifest import BackboneReference, HeadsManifest
from support.models import tiny_llama
from support.vocabularies import CHATML, byte_level_bpe, save

WAIT_SECONDS = 60.0  # longer than anything takes: what hangs fails

Load = Callable[[EngineSettings, LoadProgress], Engine]


@dataclass(slots=True)
class Running:
    """A service that runs in a thread of this process."""

    url: str
    service: EngineService
    server: EngineServer
    loop: asyncio.AbstractEventLoop
    client: httpx.Client

    def on_loop(self, function: Callable[[], Any]) -> Any:
        """What a function says on the service's event loop."""

        async def call() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(WAIT_SECONDS)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert time.monotonic() < end, "never came true"
            time.sleep(0.005)

    def wait_until_ready(self) -> None:
        self.wait_for(lambda: self.service.state != "loading")
        assert self.service.state == "ready", self.service.failure

    def info(self) -> dict[str, Any]:
        return dict(self.client.get("/info").json())


class MakeHeads(Protocol):
    def __call__(self, version: str, *, seed: int = 0, name: str = "tiny", **fields: Any) -> Path: ...


class Serve(Protocol):
    def __call__(
        self, load: Load = ..., *, secret: bytes | None = None, redis_password: str | None = None, **settings: Any
    ) -> Any: ...


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a byte-level tokenizer and a chat template."""
    folder = tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama", vocab_size=340, max_positions=4096)
    return save(byte_level_bpe(), folder, bos="<|endoftext|>", eos="<|im_end|>", chat_template=CHATML)


@pytest.fixture(scope="session")
def make_heads(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeHeads:
    """A checkpoint of random medusa heads for the tiny model: `make_heads("2", seed=2)`."""
    identity = backbone_identity(tiny_model)
    config = BackboneConfig.from_folder(tiny_model)

    def make(version: str, *, seed: int = 0, name: str = "tiny", **fields: Any) -> Path:
        generator = torch.Generator().manual_seed(seed)
        heads = MedusaHeads(config.hidden_size, num_heads=3)
        torch.nn.init.normal_(heads.weight, std=0.1, generator=generator)
        values: dict[str, Any] = {
            "name": name,
            "version": version,
            "backbone": BackboneReference(identity=identity, name="org/Tiny"),
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "num_heads": 3,
            "offsets": (2, 3, 4),
            "num_blocks": 1,
            "projection": "shared",
            "dtype": "float32",
            "quantization": "none",
        }
        folder = tmp_path_factory.mktemp("heads") / f"{name}@{version}"
        save_heads(folder, heads, HeadsManifest(**(values | fields)))
        return folder

    return make


@pytest.fixture(scope="session")
def serve(tiny_model: Path) -> Serve:
    """Serve the tiny model, or what `load` gives: `with serve(num_slots=2) as running: ...`."""

    @contextmanager
    def start(
        load: Load = load_engine, *, secret: bytes | None = None, redis_password: str | None = None, **settings: Any
    ) -> Iterator[Running]:
        given = {"model": str(tiny_model), "dtype": "float32", "port": 0, "threads": 1, "context": 512, **settings}
        with _served(EngineSettings(**given), load, secret, redis_password) as running:
            yield running

    return start


@pytest.fixture(scope="module")
def running(serve: Serve) -> Iterator[Running]:
    """The tiny model in four slots, ready."""
    with serve(num_slots=4, max_waiting=8) as started:
        started.wait_until_ready()
        yield started


@contextmanager
def _served(
    settings: EngineSettings, load: Load, secret: bytes | None, redis_password: str | None
) -> Iterator[Running]:
    listener = bind(settings)
    # So little that a reader that stands still is felt after some dozen messages.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    port = listener.getsockname()[1]
    started: list[tuple[EngineService, EngineServer]] = []
    loops: list[asyncio.AbstractEventLoop] = []
    begun, stop = threading.Event(), asyncio.Event()

    async def live() -> None:
        service = EngineService(settings, load=load, redis_password=redis_password)
        server = make_server(service, secret=secret)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        service.start(port)
        started.append((service, server))
        loops.append(asyncio.get_running_loop())
        begun.set()
        await stop.wait()
        assert await service.close(join_seconds=WAIT_SECONDS), "the model's thread did not end"
        server.should_exit = True
        await serving

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(live())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert begun.wait(WAIT_SECONDS), "the service did not start"
        url = f"http://127.0.0.1:{port}"
        headers = {} if secret is None else {"Authorization": f"Bearer {secret.decode()}"}
        with httpx.Client(base_url=url, headers=headers, timeout=WAIT_SECONDS, trust_env=False) as client:
            yield Running(url, *started[0], loops[0], client)
    finally:
        if loops:
            loops[0].call_soon_threadsafe(stop.set)
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive(), "the service did not stop"
