"""The rendered Deployments' commands and settings as processes, with a real Redis of the rendered configuration: what a
node would do with them, short of the containers."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gorgon_gateway.callers import NewKey, new_key
from support.manifests import Overlay

SECONDS = 120.0
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(slots=True)
class Node:
    """A folder in the place of the volumes, and free ports in the place of the pods' addresses."""

    folder: Path
    ports: dict[int, int]

    def local(self, value: str) -> str:
        """What a pod would read, for this machine."""
        for path in ("/run/gorgon", "/run/secrets", "/run/redis", "/var/lib/gorgon", "/etc/gorgon", "/data"):
            if value == path or value.startswith(f"{path}/"):
                return str(self.folder) + value
        value = (
            value.replace("0.0.0.0", "127.0.0.1").replace("$(POD_IP)", "127.0.0.1").replace("@redis:", "@127.0.0.1:")
        )
        for port, free in self.ports.items():
            if value == str(port) or f":{port}" in value:
                return value.replace(str(port), str(free))
        return value


@dataclass(slots=True)
class Running:
    """A container as a process."""

    spec: dict[str, Any]
    process: subprocess.Popen[bytes]
    log: Path
    node: Node

    def probe(self, kind: str) -> int | None:
        """The status that a probe gets; None: nobody listens."""
        get = self.spec[kind]["httpGet"]
        (port,) = (port["containerPort"] for port in self.spec["ports"] if port["name"] == get["port"])
        assert self.process.poll() is None, self.log.read_text()
        try:
            with _DIRECT.open(f"http://127.0.0.1:{self.node.ports[port]}{get['path']}", timeout=5.0) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    def wait_for(self, kind: str) -> None:
        end = time.monotonic() + SECONDS
        while self.probe(kind) != 200:
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.1)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def running(overlay: Overlay, workload: str, node: Node) -> Iterator[Running]:
    (spec,) = overlay.pod(workload).spec["containers"]
    fields = {item["name"]: item for item in spec["env"]} if "env" in spec else {}
    settings = overlay.settings(workload)
    if "GORGON_ENGINE_ENGINE_ID" in fields:
        settings |= {"GORGON_ENGINE_ENGINE_ID": "engine-5d9c7-x2x4z", "GORGON_ENGINE_THREADS": "2"}
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("GORGON_") or "CACHE" in key}
    assert spec["command"][0] == "python3"
    log = node.folder / f"{spec['name']}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *spec["command"][1:]],
            env=inherited | {name: node.local(value) for name, value in settings.items()},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield Running(spec, process, log, node)
    finally:
        process.kill()
        process.wait()


@contextmanager
def redis(overlay: Overlay, node: Node) -> Iterator[None]:
    """As the StatefulSet starts it: the script, the configuration and the users of the rendered map."""
    pod = overlay.pod("StatefulSet/redis")
    (spec,) = pod.spec["containers"]
    (name,) = (volume["configMap"]["name"] for volume in pod.spec["volumes"] if "configMap" in volume)
    for path in ("/etc/gorgon", "/run/redis", "/data"):
        (node.folder / path[1:]).mkdir(parents=True)
    for file, text in overlay.one("ConfigMap", name)["data"].items():
        for path in ("/run/secrets", "/run/redis", "/data"):
            text = text.replace(path, f"{node.folder}{path}")
        text = text.replace("port 6379", f"port {node.ports[6379]}").replace("bind * -::*", "bind 127.0.0.1")
        (node.folder / "etc" / "gorgon" / file).write_text(text)
    log = node.folder / "redis.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [node.local(word) for word in spec["command"]], stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        end = time.monotonic() + SECONDS
        while "Ready to accept connections" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        ping = ["redis-cli", "-p", str(node.ports[6379]), *spec["readinessProbe"]["exec"]["command"][1:]]
        assert subprocess.run(ping, check=False, capture_output=True).returncode == 0
        yield
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def key() -> NewKey:
    return new_key("test")


@pytest.fixture
def node(tmp_path: Path, key: NewKey) -> Node:
    for path, content in (
        ("run/gorgon/redis/redis_password", "a-password"),
        ("run/secrets/redis_password", "a-password"),
        ("run/gorgon/engine/engine_secret", "a-secret"),
        ("run/gorgon/keys/api_keys", key.line),
    ):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")
    (tmp_path / "var" / "lib" / "gorgon" / "heads").mkdir(parents=True)
    return Node(tmp_path, {port: free_port() for port in (6379, 8100, 8101, 9100)})


def test_the_rendered_stack_serves_and_drains(node: Node, key: NewKey) -> None:
    overlay = Overlay("cpu-dev")
    with contextlib.ExitStack() as stack:
        stack.enter_context(redis(overlay, node))
        gateway = stack.enter_context(running(overlay, "Deployment/gateway", node))
        gateway.wait_for("startupProbe")
        engine = stack.enter_context(running(overlay, "Deployment/engine", node))
        engine.wait_for("startupProbe")
        for kind in ("readinessProbe", "livenessProbe"):
            assert engine.probe(kind) == 200
            assert gateway.probe(kind) == 200

        status, text = asyncio.run(generate(node.ports[8100], None))
        assert status == 401, text
        status, text = asyncio.run(until_found(node.ports[8100], key.key))
        assert status == 200, text

        assert "gorgon_gateway:engines_ready 1.0" in scrape(node.ports[9100], {})
        assert "gorgon:engine_ready 1.0" in scrape(node.ports[8101], {"Authorization": "Bearer a-secret"})

        for one in (gateway, engine):
            one.process.send_signal(signal.SIGTERM)
        assert [one.process.wait(60.0) for one in (gateway, engine)] == [0, 0]


def scrape(port: int, headers: dict[str, str]) -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=headers)
    with _DIRECT.open(request, timeout=5.0) as response:
        return str(response.read(), "utf-8")


async def generate(port: int, key: str | None) -> tuple[int, str]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"http://127.0.0.1:{port}/generate", json={"prompt": "Once upon", "max_tokens": 8}) as response,
    ):
        return response.status, await response.text()


async def until_found(port: int, key: str) -> tuple[int, str]:
    """The gateway learns of the engine by Redis, within seconds."""
    end = time.monotonic() + SECONDS
    while True:
        answer = await generate(port, key)
        if answer[0] != 503 or time.monotonic() > end:
            return answer
        await asyncio.sleep(0.2)
