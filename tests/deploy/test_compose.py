"""docker-compose.yml: valid for both generations of Compose, confined, gated by health, true to the services' settings.

scripts/compose_test.sh starts it for real, which takes a Docker engine.
"""

import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from gorgon_cli.train import distill
from gorgon_cli.train_metrics import PREFIX
from gorgon_engine.server.settings import EngineSettings
from gorgon_gateway.settings import GatewaySettings

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
TEXT = COMPOSE.read_text()
STACK: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = STACK["services"]
EXAMPLE = (ROOT / ".env.example").read_text()
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
JOBS = {"trainer", "load"}


def compose(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Debian's docker-compose 1.29, which asks no Docker engine for this."""
    program = shutil.which("docker-compose")
    assert program is not None, "docker-compose is missing: scripts/test_packages.sh installs it"
    return subprocess.run(
        [program, "--file", str(COMPOSE), *arguments],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
    )


def test_the_old_docker_compose_reads_it_with_the_example_settings() -> None:
    done = compose("--env-file", str(ROOT / ".env.example"), "config")
    assert done.returncode == 0, done.stderr
    assert set(yaml.safe_load(done.stdout)["services"]) == set(SERVICES)


def test_it_follows_the_compose_specification() -> None:
    program = Path(sys.executable).with_name("check-jsonschema")
    done = subprocess.run([program, "--builtin-schema", "vendor.compose-spec", COMPOSE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    done = compose("--env-file", str(tmp_path / "empty"), "config")
    assert done.returncode != 0
    assert "GORGON_SECRETS" in done.stderr
    assert "deploy/secrets.sh" in done.stderr


def test_the_example_lists_every_variable_and_no_other() -> None:
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", TEXT))
    listed = set(re.findall(r"^#?(\w+)=", EXAMPLE, re.MULTILINE)) - {"COMPOSE_PROJECT_NAME"}
    assert used == listed


@pytest.mark.parametrize(
    ("prefix", "settings", "service"),
    [
        ("GORGON_ENGINE_", EngineSettings, "engine"),
        ("GORGON_ENGINE_", EngineSettings, "engine-gpu"),
        ("GORGON_GATEWAY_", GatewaySettings, "gateway"),
    ],
)
def test_services_get_settings_that_they_have(prefix: str, settings: Any, service: str) -> None:
    given = {name.removeprefix(prefix).lower() for name in SERVICES[service]["environment"]}
    assert given <= set(settings.model_fields)


@pytest.mark.parametrize("name", SERVICES)
def test_services_are_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices"} & set(service)
    assert service["logging"]["options"]["max-size"]
    if "build" not in service and name != "load":  # our images, and Locust's, are another user's by themselves
        user = str(service["user"]).split(":")[0]
        assert user.isdigit()
        assert user != "0"


@pytest.mark.parametrize("name", SERVICES)
def test_only_loopback_addresses_are_published(name: str) -> None:
    ports = SERVICES[name].get("ports", [])
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert bool(ports) == (name in {"gateway", "prometheus", "grafana"})


def test_redis_and_the_engines_are_on_a_network_that_leads_nowhere() -> None:
    assert STACK["networks"]["backend"] == {"internal": True}
    for name in ("redis", "engine", "engine-gpu"):
        assert list(SERVICES[name]["networks"]) == ["backend"]


@pytest.mark.parametrize("name", SERVICES)
def test_secrets_are_files(name: str) -> None:
    service = SERVICES[name]
    files = re.findall(r"/run/secrets/(\w+)", str(service) + EXAMPLE * (name == "gateway"))
    if name == "redis":
        files += re.findall(r"/run/secrets/(\w+)", (ROOT / "deploy" / "redis" / "start.sh").read_text())
    if name == "prometheus":
        files += re.findall(
            r"/run/secrets/(\w+)", (ROOT / "observability" / "prometheus" / "prometheus.yml").read_text()
        )
    assert set(files) == set(service.get("secrets", []))
    for variable in service.get("environment", {}):
        assert not re.search(r"(PASSWORD|SECRET|TOKEN|KEY)$", variable), variable


def test_jobs_end_and_services_come_back() -> None:
    for name, service in SERVICES.items():
        assert service["restart"] == ("no" if name in JOBS else "unless-stopped")
        assert ("profiles" in service) == (name in JOBS | {"engine-gpu"})


def test_each_waits_for_the_health_of_what_it_needs() -> None:
    for service in SERVICES.values():
        for needed, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            dockerfile = SERVICES[needed].get("build", {}).get("dockerfile")
            checks = "healthcheck" in SERVICES[needed] or "\nHEALTHCHECK --" in (ROOT / dockerfile).read_text()
            assert checks, needed
    assert set(SERVICES["engine"]["depends_on"]) == set(SERVICES["gateway"]["depends_on"]) == {"redis"}


def test_the_grace_is_longer_than_the_drain() -> None:
    for name, settings in (("engine", EngineSettings), ("engine-gpu", EngineSettings), ("gateway", GatewaySettings)):
        grace = float(SERVICES[name]["stop_grace_period"].removesuffix("s"))
        assert grace > settings.model_fields["drain_seconds"].default


def test_images_are_pinned_and_our_own_are_of_this_version() -> None:
    for name, service in SERVICES.items():
        repository, _, tag = service["image"].partition(":")
        assert re.search(r"\d+\.\d+\.\d+", tag), service["image"]
        if repository.startswith("gorgon-"):
            assert tag.removesuffix("-cuda") == VERSION, name


def test_the_gpu_is_reserved_and_memory_is_shared() -> None:
    service = SERVICES["engine-gpu"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert service["shm_size"] == "1gb"


def test_the_trainer_publishes_where_the_engines_look() -> None:
    (store,) = (volume for volume in SERVICES["trainer"]["volumes"] if volume.startswith("heads:"))
    place = store.removeprefix("heads:")
    assert f"--store={place}" in SERVICES["trainer"]["command"]
    for name in ("engine", "engine-gpu"):
        assert SERVICES[name]["environment"]["GORGON_ENGINE_STORE"] == place
        assert f"heads:{place}:ro" in SERVICES[name]["volumes"]


def test_prometheus_finds_the_trainer() -> None:
    environment = SERVICES["trainer"]["environment"]
    assert environment.keys() == {option.envvar for option in distill.params if str(option.envvar).startswith(PREFIX)}
    jobs = yaml.safe_load((ROOT / "observability" / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    (discovery,) = next(job for job in jobs if job["job_name"] == "trainer")["dns_sd_configs"]
    assert discovery["names"] == ["trainer"]
    assert str(discovery["port"]) == environment[f"{PREFIX}METRICS_PORT"]
    assert environment[f"{PREFIX}METRICS_HOST"] == "0.0.0.0"
    assert set(SERVICES["trainer"]["networks"]) & set(SERVICES["prometheus"]["networks"])
    # A container of `run` has the service's name on its networks only if that is asked for.
    assert "run --rm --use-aliases trainer" in TEXT


def test_secrets_are_made_once_and_for_nobody_else(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    script = ROOT / "deploy" / "secrets.sh"
    subprocess.run([script, folder], check=True, capture_output=True)
    first = {path.name: path.read_text() for path in folder.iterdir()}
    assert set(STACK["secrets"]) == set(first) - {".gitignore"}
    assert all(re.fullmatch(r"[0-9a-f]{64}", first[name]) for name in set(STACK["secrets"]) - {"api_keys"})
    assert len({first[name] for name in STACK["secrets"]}) == len(STACK["secrets"])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert first[".gitignore"] == "*\n"
    subprocess.run([script, folder], check=True, capture_output=True)
    assert {path.name: path.read_text() for path in folder.iterdir()} == first
