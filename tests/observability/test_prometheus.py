"""A real Prometheus scrapes a gateway and an engine with the small model: every panel's query answers with data."""

import asyncio
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.clients import generate
from support.metrics import RULES, dashboard_queries
from support.services import Service, engine_service, gateway_service, redis_server

SECONDS = 60.0


@contextmanager
def prometheus(folder: Path, targets: dict[str, str]) -> Iterator[str]:
    """Its URL. targets: job -> address."""
    program = shutil.which("prometheus")
    assert program is not None, "prometheus is missing: scripts/test_packages.sh installs it"
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": list(map(str, RULES)),
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [address]}]} for job, address in targets.items()
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    arguments = [
        program,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("wb") as log, subprocess.Popen(arguments, stdout=log, stderr=log) as process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def ask(url: str, query: str) -> list[dict[str, Any]]:
    path = f"{url}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    with urllib.request.urlopen(path, timeout=10.0) as response:
        answer = json.load(response)
    assert answer["status"] == "success", answer
    return list(answer["data"]["result"])


def numbers(url: str, query: str) -> list[float]:
    return [float(sample["value"][1]) for sample in ask(url, query) if sample["value"][1] != "NaN"]


def is_up(url: str) -> bool:
    try:
        return numbers(url, "up") == [1.0, 1.0]
    except (urllib.error.URLError, ConnectionError):
        return False


async def talk(gateway: str) -> None:
    """What every panel is about: answers long enough for a decode time, trees, plain steps, a refusal."""
    chat = {"messages": [{"role": "user", "content": "Name five fruits and five colours."}], "max_tokens": 60}
    await asyncio.gather(
        generate(gateway, chat),
        generate(gateway, {**chat, "speculation": {"enabled": False}}),
        generate(gateway, {**chat, "temperature": 0.7, "seed": 1}),
    )
    refused = await generate(gateway, {"prompt": "too long " * 10_000})
    assert refused.end["type"] == "error"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("prometheus")
    with (
        redis_server() as redis,
        engine_service(model="smollm2") as engine,
        gateway_service(engine, redis_url=redis.url) as gateway,
        prometheus(folder, {"gateway": _address(gateway), "engine": _address(engine)}) as url,
    ):
        end = time.monotonic() + SECONDS
        while not is_up(url):
            assert time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.2)
        for _ in range(3):  # a rate needs samples before and behind
            asyncio.run(talk(gateway.url))
            time.sleep(1.5)
        yield url


def _address(service: Service) -> str:
    return service.url.removeprefix("http://")


@pytest.mark.parametrize(("panel", "query"), dashboard_queries())
def test_the_panel_shows_data(stack: str, panel: str, query: str) -> None:
    end = time.monotonic() + 15.0
    while not numbers(stack, query):
        assert time.monotonic() < end, f"{panel}: {ask(stack, query)}"
        time.sleep(0.5)


def test_no_alert_fires_on_a_stack_that_is_well(stack: str) -> None:
    assert not ask(stack, 'ALERTS{alertstate="firing"}')
