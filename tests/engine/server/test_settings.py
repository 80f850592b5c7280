"""The environment of an engine process: defaults, refusals in one line."""

from pathlib import Path
from typing import get_args

import pytest

from gorgon_engine.backbone.select import Kernels
from gorgon_engine.server.loader import engine_config
from gorgon_engine.server.settings import EngineSettings
from gorgon_protocol.errors import BadRequestError


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [n for n in os.environ if n.startswith("GORGON_ENGINE_")]:
        monkeypatch.delenv(name)


def test_the_defaults_suit_a_laptop() -> None:
    settings = EngineSettings.from_environment()
    assert (settings.host, settings.port, settings.model) == ("127.0.0.1", 8101, "smollm2")
    assert (settings.num_slots, settings.max_waiting) == (8, 64)
    assert (settings.kernels, settings.graphs, settings.run_ahead) == ("auto", True, True)
    assert settings.is_loopback
    assert settings.url(8101) == "http://127.0.0.1:8101"
    assert settings.read_secret() is None


def test_values_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "HOST": "::1",
        "PORT": "9000",
        "NUM_SLOTS": "16",
        "QUANTIZATION": "nf4",
        "KERNELS": "triton",
        "GRAPHS": "false",
        "RUN_AHEAD": "0",
        "DRAIN_SECONDS": "0",
        "STORE": "/heads",
        "REDIS_URL": "rediss://user:pass@redis:6380/1",
        "REDIS_PASSWORD_FILE": "/run/secrets/redis",
        "LOG_FORMAT": "",  # as an unset variable of a compose file arrives
    }.items():
        monkeypatch.setenv(f"GORGON_ENGINE_{name}", value)
    settings = EngineSettings.from_environment()
    assert (settings.port, settings.num_slots, settings.quantization) == (9000, 16, "nf4")
    assert (settings.kernels, settings.graphs, settings.run_ahead) == ("triton", False, False)
    assert settings.drain_seconds == 0.0
    assert settings.store == "/heads"
    assert settings.log_format == "json"
    assert settings.redis_password_file == Path("/run/secrets/redis")
    assert settings.url(9000) == "http://[::1]:9000"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"PORTS": "1"}, ["GORGON_ENGINE_PORTS", "did you mean GORGON_ENGINE_PORT?"]),
        ({"COLOUR": "red"}, ["GORGON_ENGINE_COLOUR", "not a setting"]),
        ({"PORT": "many"}, ["GORGON_ENGINE_PORT", "integer"]),
        ({"PORT": "70000"}, ["GORGON_ENGINE_PORT", "65535"]),
        ({"PORT": "tcp://10.0.0.1:8101"}, ["GORGON_ENGINE_PORT", "enableServiceLinks"]),
        ({"SERVICE_HOST": "10.0.0.1"}, ["GORGON_ENGINE_SERVICE_HOST", "enableServiceLinks"]),
        ({"QUANTIZATION": "int2"}, ["GORGON_ENGINE_QUANTIZATION", "'nf4'"]),
        ({"KERNELS": "cuda"}, ["GORGON_ENGINE_KERNELS", "'triton'"]),
        ({"GRAPHS": "some"}, ["GORGON_ENGINE_GRAPHS", "boolean"]),
        ({"RUN_AHEAD": "2"}, ["GORGON_ENGINE_RUN_AHEAD", "boolean"]),
        ({"SLOW_READER_SECONDS": "nan"}, ["GORGON_ENGINE_SLOW_READER_SECONDS"]),
        ({"SLOW_READER_SECONDS": "0"}, ["GORGON_ENGINE_SLOW_READER_SECONDS", "greater than 0"]),
        ({"HEADS": "/a", "STORE": "/b"}, ["GORGON_ENGINE_HEADS", "GORGON_ENGINE_STORE", "not both"]),
        ({"STORE_BACKBONE": "a"}, ["GORGON_ENGINE_STORE_BACKBONE", "set GORGON_ENGINE_STORE"]),
        ({"STORE": "/b", "DRAFTER": "ngram"}, ["GORGON_ENGINE_DRAFTER", "GORGON_ENGINE_STORE"]),
        ({"REDIS_URL": "http://redis"}, ["GORGON_ENGINE_REDIS_URL", "redis://"]),
        ({"REDIS_URL": "redis://redis:port"}, ["GORGON_ENGINE_REDIS_URL", "'port'"]),
        ({"REDIS_URL": "unix://"}, ["GORGON_ENGINE_REDIS_URL", "redis://"]),
        ({"ADVERTISE_URL": "engine:8101"}, ["GORGON_ENGINE_ADVERTISE_URL", "http://"]),
        ({"REDIS_URL": "redis://redis", "HOST": "0.0.0.0"}, ["GORGON_ENGINE_ADVERTISE_URL", "0.0.0.0"]),
        ({"REDIS_PASSWORD_FILE": "/x"}, ["GORGON_ENGINE_REDIS_PASSWORD_FILE", "GORGON_ENGINE_REDIS_URL"]),
        ({"ENGINE_ID": "a b"}, ["GORGON_ENGINE_ENGINE_ID"]),
    ],
)
def test_what_cannot_be_is_one_line_that_names_it(
    variables: dict[str, str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"GORGON_ENGINE_{name}", value)
    with pytest.raises(BadRequestError) as raised:
        EngineSettings.from_environment()
    message = str(raised.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_choices_are_the_engines_own() -> None:
    assert get_args(EngineSettings.model_fields["kernels"].annotation) == tuple(Kernels)


@pytest.mark.parametrize("kernels", list(Kernels))
@pytest.mark.parametrize("value", [True, False])
def test_kernels_and_graphs_reach_the_engine(kernels: Kernels, value: bool) -> None:
    config = engine_config(EngineSettings(kernels=kernels.value, graphs=value, run_ahead=not value))
    assert (config.backbone.kernels, config.graphs, config.run_ahead) == (kernels, value, not value)


def test_a_secret_is_read_without_its_newline(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(b"s3cret-of-the-house\n")
    settings = EngineSettings(secret_file=file, redis_url="redis://redis", redis_password_file=file)
    assert settings.read_secret() == b"s3cret-of-the-house"
    assert settings.read_redis_password() == "s3cret-of-the-house"


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", b"two\nlines", b"\xc3\xa9", b"x" * 5000, None])
def test_a_bad_secret_is_refused(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)
    settings = EngineSettings(secret_file=file, redis_url="redis://redis", redis_password_file=file)
    for read, name in [(settings.read_secret, "SECRET_FILE"), (settings.read_redis_password, "REDIS_PASSWORD_FILE")]:
        with pytest.raises(BadRequestError, match=f"GORGON_ENGINE_{name}") as raised:
            read()
        assert "\n" not in str(raised.value)
