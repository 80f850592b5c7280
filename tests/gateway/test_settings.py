"""Settings from the environment: defaults, and one clear line for whatever is wrong."""

from pathlib import Path

import pytest

from gorgon_gateway.settings import GatewaySettings, engine_url
from gorgon_protocol.errors import BadRequestError

PREFIX = "GORGON_GATEWAY_"


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.upper().startswith(PREFIX):
            monkeypatch.delenv(name)


def read(monkeypatch: pytest.MonkeyPatch, **values: str) -> GatewaySettings:
    for name, value in values.items():
        monkeypatch.setenv(PREFIX + name, value)
    return GatewaySettings.from_environment()


def test_defaults_suit_a_laptop() -> None:
    settings = GatewaySettings.from_environment()
    assert (settings.host, settings.port, settings.static_engines) == ("127.0.0.1", 8100, ("http://127.0.0.1:8101",))
    assert settings.is_loopback
    assert settings.is_open
    assert settings.engine_secret() is None


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read(monkeypatch, ENGINES="http://a:1, http://b:2/ ,", ALLOWED_ORIGINS="https://App.example")
    assert settings.engines == ("http://a:1", "http://b:2")
    assert settings.allowed_origins == ("https://app.example",)


def test_empty_variables_are_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, REDIS_URL="", PORT="").port == 8100


def test_with_redis_only_configured_engines_are_static(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, REDIS_URL="redis://r:6379").static_engines == ()
    assert read(monkeypatch, ENGINES="http://a:1").static_engines == ("http://a:1",)


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("PROT", "1", "did you mean GORGON_GATEWAY_PORT?"),
        ("SERVICE_PORT", "1", "enableServiceLinks"),
        ("PORT", "tcp://10.0.0.1:80", "enableServiceLinks"),
        ("PORT", "70000", "GORGON_GATEWAY_PORT"),
        ("METRICS_PORT", "8100", "must differ"),
        ("ENGINES", "ftp://a", "http://host:8101"),
        ("ENGINES", "http://", "http://host:8101"),
        ("ENGINES", "http://a:port", "not a URL"),
        ("ENGINES", "http://u:secret@a:1", "credentials"),
        ("ENGINES", "http://a:1/v1", "path"),
        ("ENGINES", "http://a:1?x=y", "path"),
        ("ENGINES", "http://169.254.169.254", "169.254.169.254"),
        ("ENGINES", "http://0.0.0.0:8101", "0.0.0.0"),
        ("ENGINES", ",", "no engine"),
        ("REDIS_URL", "http://r", "redis://"),
        ("REDIS_PASSWORD_FILE", "/x", "REDIS_URL"),
        ("ALLOWED_ORIGINS", "app.example", "scheme://host"),
        ("ALLOWED_ORIGINS", "https://app.example/path", "scheme://host"),
        ("TRUSTED_PROXIES", "proxy", "TRUSTED_PROXIES"),
        ("SILENCE_SECONDS", "0", "SILENCE_SECONDS"),
        ("SILENCE_SECONDS", "inf", "SILENCE_SECONDS"),
        ("LOG_LEVEL", "loud", "LOG_LEVEL"),
    ],
)
def test_what_is_wrong_is_one_line(monkeypatch: pytest.MonkeyPatch, name: str, value: str, named: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        read(monkeypatch, **{name: value})
    message = str(refused.value)
    assert named in message
    assert "\n" not in message
    assert ":secret@" not in message


@pytest.mark.parametrize("content", [None, "", "  \n", "two words", "two\nlines", "é" * 8, "x" * 5000])
def test_a_secret_is_one_line_of_a_file(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_text(content)
    with pytest.raises(BadRequestError, match="ENGINE_SECRET_FILE"):
        GatewaySettings(engine_secret_file=file).engine_secret()
    file.write_text("s3cret\n")
    assert GatewaySettings(engine_secret_file=file).engine_secret() == "s3cret"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_loopback_addresses_are_known(host: str) -> None:
    assert GatewaySettings(host=host).is_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com"])
def test_other_addresses_are_open(host: str) -> None:
    assert not GatewaySettings(host=host).is_loopback


@pytest.mark.parametrize("url", ["http://[::1]:8101", "https://engine-0.engines:8101", "http://10.0.0.7"])
def test_engine_urls(url: str) -> None:
    assert engine_url(url) == url
