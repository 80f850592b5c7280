"""`python -m gorgon_engine` as it is deployed: start, serve, drain, and one line for what cannot be."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from gorgon_engine.engine import Engine, EngineConfig
from gorgon_engine.events import TokenEvent
from gorgon_engine.sampling import SamplingParams
from gorgon_protocol.messages import MESSAGE, ErrorMessage, FinishedMessage, Message, TokenMessage
from support.services import Service, engine_service

BODY = {"prompt": "The capital of France is", "request_id": "mine", "seed": 3, "max_tokens": 24}
TIMEOUT = 60.0


@pytest.fixture(scope="module")
def small(smollm2: Path) -> Iterator[Service]:
    """The real small model with its bundled heads."""
    with engine_service(num_slots=2, context=2048) as service:
        yield service


@pytest.fixture(scope="module")
def library(smollm2: Path) -> Engine:
    return Engine.load(EngineConfig(model=str(smollm2), context=2048, adaptive=False))


@contextmanager
def tiny(tiny_model: Path, **settings: Any) -> Iterator[Service]:
    with engine_service(model=tiny_model, dtype="float32", threads=1, **settings) as service:
        yield service


class Reader:
    """A stream read on a thread of its own."""

    def __init__(self, url: str, **fields: Any) -> None:
        self.messages: list[Message] = []
        self.has_begun = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(url, BODY | fields))
        self._thread.start()

    def _read(self, url: str, body: dict[str, Any]) -> None:
        with httpx.stream("POST", f"{url}/generate", json=body, timeout=TIMEOUT, trust_env=False) as response:
            for line in response.iter_lines():
                self.messages.append(MESSAGE.validate_json(line))
                if isinstance(self.messages[-1], TokenMessage):
                    self.has_begun.set()

    def end(self) -> Message:
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()
        assert [m.type in ("finished", "error") for m in self.messages].count(True) == 1
        return self.messages[-1]

    @property
    def token_ids(self) -> list[int]:
        return [token for m in self.messages if isinstance(m, TokenMessage) for token in m.token_ids]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_small_model_says_what_the_library_says(small: Service, library: Engine, temperature: float) -> None:
    response = httpx.post(
        f"{small.url}/generate", json=BODY | {"temperature": temperature, "tree_debug": True}, timeout=TIMEOUT,
        trust_env=False,
    )  # fmt: skip
    messages = [MESSAGE.validate_json(line) for line in response.text.splitlines()]
    request = library.request(str(BODY["prompt"]), SamplingParams(max_tokens=24, temperature=temperature, seed=3))
    expected = [token for e in library.generate(request) if isinstance(e, TokenEvent) for token in e.token_ids]
    assert [token for m in messages if isinstance(m, TokenMessage) for token in m.token_ids] == expected
    end = messages[-1]
    assert isinstance(end, FinishedMessage)
    assert end.metrics.heads is not None
    assert end.metrics.speedup is not None
    trees = [m.tree_debug for m in messages if isinstance(m, TokenMessage)]
    assert any(tree is not None and "head" in tree.sources for tree in trees)


def test_what_the_small_engine_is(small: Service) -> None:
    info = small.get("/info")
    assert (info["model"], info["state"]) == ("smollm2", "ready")
    assert info["heads"]["family"] == "eagle"
    assert [speed["batch_size"] for speed in info["plain"]] == [1, 2]
    lines = [json.loads(line) for line in small.log.splitlines()]
    assert [line["event"] for line in lines[:2]] == ["listening", "loading"]
    stages = [line["progress"] for line in lines if line["event"] == "loading"]
    assert stages == sorted(stages)


def test_it_listens_before_it_has_loaded(tiny_model: Path) -> None:
    with tiny(tiny_model, ready=False) as service:
        end = time.monotonic() + TIMEOUT
        while True:
            try:
                live = service.status("/live")
                break
            except OSError:
                assert service.process.poll() is None, service.log
                assert time.monotonic() < end, service.log
                time.sleep(0.001)
        assert live == 200
        service.wait_until_ready()
        assert service.terminate() == 0


def test_told_to_stop_it_finishes_what_it_has_and_takes_nothing_new(tiny_model: Path) -> None:
    with tiny(tiny_model, num_slots=2, context=2000) as service:
        alone = Reader(service.url, max_tokens=1200, ignore_eos=True)
        alone.end()
        readers = [Reader(service.url, max_tokens=1200, ignore_eos=True) for _ in range(4)]
        while service.get("/info")["num_waiting"] < 2:
            assert service.process.poll() is None
        service.process.send_signal(signal.SIGTERM)
        while service.get("/ready")["state"] != "draining":
            assert service.process.poll() is None
        assert service.status("/ready") == 503
        refused = httpx.post(f"{service.url}/generate", json=BODY, trust_env=False)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "unavailable"
        assert int(refused.headers["retry-after"]) >= 1
        for reader in readers:
            assert isinstance(reader.end(), FinishedMessage)
            assert reader.token_ids == alone.token_ids
        assert service.process.wait(TIMEOUT) == 0


def test_what_does_not_finish_in_time_is_ended_with_an_error(tiny_model: Path) -> None:
    with tiny(tiny_model, num_slots=1, context=4000, drain_seconds=0) as service:
        reader = Reader(service.url, max_tokens=3900, ignore_eos=True, speculation={"enabled": False})
        assert reader.has_begun.wait(TIMEOUT)
        assert service.terminate() == 0
        end = reader.end()
        assert isinstance(end, ErrorMessage)
        assert end.code == "unavailable"


def test_a_second_signal_ends_it_at_once(tiny_model: Path) -> None:
    with tiny(tiny_model, num_slots=1, context=4000, drain_seconds=600) as service:
        reader = Reader(service.url, max_tokens=3900, ignore_eos=True, speculation={"enabled": False})
        assert reader.has_begun.wait(TIMEOUT)
        service.process.send_signal(signal.SIGINT)
        while service.get("/ready")["state"] != "draining":
            assert service.process.poll() is None
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(TIMEOUT) == 0
        assert isinstance(reader.end(), ErrorMessage)


def test_it_can_be_stopped_while_it_loads(smollm2: Path) -> None:
    with engine_service(ready=False) as service:
        while '"loading"' not in service.log:
            assert service.process.poll() is None, service.log
        assert service.terminate() == 0


def start(**settings: str) -> subprocess.CompletedProcess[str]:
    """A process that is expected to end by itself."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GORGON_ENGINE_")}
    environment |= {f"GORGON_ENGINE_{name.upper()}": value for name, value in settings.items()}
    return subprocess.run(
        [sys.executable, "-m", "gorgon_engine"], env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )


def test_a_port_in_use_is_said_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = start(port=str(port))
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr == (
        f"gorgon engine: port {port} of 127.0.0.1 is in use: end what listens there, or choose another with "
        "GORGON_ENGINE_PORT\n"
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ports": "1"}, ["GORGON_ENGINE_PORTS", "GORGON_ENGINE_PORT?"]),
        ({"host": "no.such.host.invalid"}, ["GORGON_ENGINE_HOST", "no.such.host.invalid"]),
        ({"host": "203.0.113.7"}, ["203.0.113.7"]),
        ({"secret_file": "/nonexistent"}, ["GORGON_ENGINE_SECRET_FILE", "/nonexistent"]),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, str], words: list[str]) -> None:
    ended = start(**{"port": "0", **settings})
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert all(word in ended.stderr for word in words), ended.stderr


def test_a_model_that_cannot_be_loaded_ends_it_with_one_clear_line() -> None:
    ended = start(port="0", model="/nonexistent/model")
    assert ended.returncode == 1
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    (failed,) = [line for line in lines if line["event"] == "failed"]
    assert failed["level"] == "error"
    assert "/nonexistent/model" in failed["reason"]
    assert "exception" not in failed, "what a person did is no bug"
