"""The README's clients do what it says, as they stand there."""

import ast
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fake_engine import FakeEngine
from support.services import Service, gateway_service

README = Path(__file__).parents[2] / "README.md"
ADDRESS = "127.0.0.1:8100"  # of the default settings, which the README's examples talk to
MAX_CLIENT_LINES = 20


def blocks(language: str, word: str) -> list[str]:
    """The README's code in that language that holds the word."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [block for block in found if word in block]


@pytest.fixture(scope="module")
def gateway() -> Iterator[Service]:
    with FakeEngine(model="smollm2") as engine, gateway_service(engines=engine.url) as gateway:
        yield gateway


def run(gateway: Service, command: list[str], source: str) -> str:
    """What a block prints, its address changed to where the gateway listens."""
    assert ADDRESS in source, "the example does not talk to the default address"
    source = source.replace(ADDRESS, gateway.url.removeprefix("http://"))
    done = subprocess.run([*command, source], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_websocket_client(gateway: Service) -> None:
    clients = blocks("python", "/generate_stream")
    assert len(clients) == 1, f"README.md has {len(clients)} WebSocket clients"
    assert len(clients[0].splitlines()) <= MAX_CLIENT_LINES
    asked = re.search(r"json\.dumps\((\{.*\})\)", clients[0])
    assert asked is not None, "the client says what it asks in one line"
    payload = json.dumps(ast.literal_eval(asked[1])).encode()
    request = urllib.request.Request(f"{gateway.url}/generate", payload, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    shown = run(gateway, [sys.executable, "-c"], clients[0])
    assert answer["text"] in shown
    assert "tokens" in shown.removeprefix(answer["text"])


def test_the_openai_client(gateway: Service) -> None:
    clients = blocks("python", "from openai import")
    assert len(clients) == 1, f"README.md has {len(clients)} OpenAI clients"
    assert run(gateway, [sys.executable, "-c"], clients[0]).strip()


def test_the_curl_commands(gateway: Service) -> None:
    commands = [block for block in blocks("sh", "curl ") if ADDRESS in block]
    assert commands, "README.md has no curl commands"
    for block in commands:
        shown = run(gateway, ["bash", "-euo", "pipefail", "-c"], block)
        assert shown.strip()
        assert '"error"' not in shown, shown
