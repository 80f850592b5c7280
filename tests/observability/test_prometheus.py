"""A real Prometheus scrapes a gateway, an engine with the small model, and a training job for it: every panel's query
answers with data."""

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
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from gorgon_trainer.metrics import TrainerMetrics
from gorgon_trainer.metrics_server import MetricsServer
from gorgon_trainer.pipeline import run_preset
from gorgon_trainer.presets import PRESETS
from support.clients import generate
from support.metrics import RULES, dashboard_queries
from support.services import engine_service, gateway_service, redis_server

SECONDS = 60.0
OF_A_GPU = "gorgon:graph_"  # an engine on a CPU counts no graphs


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


def ask(url: str, query: str, kind: str = "query", **arguments: float) -> list[dict[str, Any]]:
    path = f"{url}/api/v1/{kind}?{urllib.parse.urlencode({'query': query, **arguments})}"
    with urllib.request.urlopen(path, timeout=10.0) as response:
        answer = json.load(response)
    assert answer["status"] == "success", answer
    return list(answer["data"]["result"])


def shown(url: str, query: str) -> list[float]:
    """What a panel of the last minutes shows: of every series, at every second."""
    now = time.time()
    series = ask(url, query, "query_range", start=now - 600.0, end=now, step=1.0)
    return [float(value) for one in series for _, value in one["values"] if value != "NaN"]


def is_up(url: str, num_targets: int) -> bool:
    try:
        return [sample["value"][1] for sample in ask(url, "up")] == ["1"] * num_targets
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


def train(folder: Path, metrics: TrainerMetrics) -> None:
    """Every stage, as small as they can be."""
    smoke = PRESETS["smoke"]
    preset = replace(
        smoke,
        limit=24,
        distill=replace(smoke.distill, max_new_tokens=24, context=128),
        train=replace(smoke.train, max_steps=24, eval_every=12, save_every=12, pack_length=64, packs_per_batch=2),
        evaluation_prompts=1,
        evaluation_tokens=4,
        evaluation_nodes=(4,),
    )
    store = str(folder / "store")
    run_preset(preset, folder / "run", store=store, device="cpu", say=lambda line: None, metrics=metrics)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("prometheus")
    with (
        redis_server() as redis,
        engine_service(model="smollm2") as engine,
        gateway_service(engine, redis_url=redis.url) as gateway,
        MetricsServer(metrics := TrainerMetrics(), "127.0.0.1", 0) as trainer,
        prometheus(folder, {"gateway": _address(gateway.url), "engine": _address(engine.url),
                            "trainer": _address(trainer.url)}) as url,
    ):  # fmt: skip
        end = time.monotonic() + SECONDS
        while not is_up(url, 3):
            assert time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.2)
        for _ in range(3):  # a rate needs samples before and behind
            asyncio.run(talk(gateway.url))
            time.sleep(1.5)
        train(folder, metrics)
        assert trainer.wait_for_scrape(SECONDS)
        yield url


def _address(url: str) -> str:
    return urllib.parse.urlsplit(url).netloc


@pytest.mark.parametrize(("panel", "query"), dashboard_queries())
def test_the_panel_shows_data(stack: str, panel: str, query: str) -> None:
    if OF_A_GPU in query:
        ask(stack, query)  # raises where Prometheus does not understand it
        return
    end = time.monotonic() + 15.0
    while not shown(stack, query):
        assert time.monotonic() < end, f"{panel}: {ask(stack, query)}"
        time.sleep(0.5)


def test_no_alert_fires_on_a_stack_that_is_well(stack: str) -> None:
    assert not ask(stack, 'ALERTS{alertstate="firing"}')
