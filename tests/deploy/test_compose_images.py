"""The Dockerfiles: linted, not root, checked for health; and what goes into the images."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILES = {name: ROOT / "services" / name / "Dockerfile" for name in ("engine", "gateway", "trainer")}


def requirements(*extras: str) -> set[str]:
    script = ROOT / "scripts" / "requirements.py"
    done = subprocess.run([sys.executable, script, *extras], capture_output=True, text=True, check=True)
    return {re.split(r"[\[<>=]", line)[0] for line in done.stdout.splitlines()}


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_has_nothing_to_say(name: str) -> None:
    program = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([program, "--failure-threshold", "style", DOCKERFILES[name]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_image_is_pinned_small_and_nobody_s(name: str) -> None:
    text = DOCKERFILES[name].read_text()
    assert re.search(r"^ARG BASE_IMAGE=\S+:\d+\.\d+\.\d+-slim-\w+$", text, re.MULTILINE)
    last = text.rpartition("\nFROM ")[2]
    assert last.startswith("${BASE_IMAGE}\n")
    assert re.findall(r"^USER (.*)$", last, re.MULTILINE) == ["10001:10001"]
    assert len(re.findall(r"^HEALTHCHECK ", last, re.MULTILINE)) == 1
    assert "org.opencontainers.image.version" in last
    assert "pip install" not in last


def test_bases_and_users_are_the_same_in_all() -> None:
    texts = [path.read_text() for path in DOCKERFILES.values()]
    assert len({re.search(r"^ARG BASE_IMAGE=(.*)$", text, re.MULTILINE)[1] for text in texts}) == 1  # type: ignore[index]


def test_the_gateway_is_without_torch() -> None:
    assert "torch" not in DOCKERFILES["gateway"].read_text().partition("\n")[2]
    names = requirements("gateway")
    assert {"fastapi", "websockets", "uvicorn", "pydantic"} <= names
    assert not {"torch", "transformers", "numpy", "safetensors"} & names


def test_the_trainer_has_what_the_engine_has() -> None:
    assert requirements("engine") < requirements("trainer")
    assert {"accelerate", "transformers"} <= requirements("trainer")
    assert "torch" not in requirements("trainer")  # the Dockerfile chooses its build


def test_nothing_private_comes_near_an_image() -> None:
    """The context is a list of what goes in."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert allowed == {
        "LICENSE", "README.md", "constraints.txt", "pyproject.toml", "libs", "services", "web",
        "scripts/requirements.py", "scripts/web.sh",
    }  # fmt: skip
    assert all((ROOT / path).exists() for path in allowed)
