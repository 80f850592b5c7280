"""API keys: who is let in, what the file may hold, and what happens when it changes or breaks."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import structlog
from starlette.datastructures import Headers
from structlog.testing import capture_logs

from gorgon_gateway.callers import MAX_KEYS, Authenticator, CallerLimits, new_key, read_keys
from gorgon_protocol.errors import AuthenticationError, BadRequestError


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def key_line(name: str, key: str, **limits: int) -> str:
    return json.dumps({"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest(), **limits})


def write(file: Path, *lines: str) -> Path:
    """As an editor does it: a new file in the place of the old one."""
    beside = file.with_suffix(".new")
    beside.write_text("\n".join(lines) + "\n")
    os.replace(beside, file)
    return file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(
        tmp_path / "keys.jsonl",
        "# of the team",
        "",
        key_line("alice", "secret-a", requests_per_minute=5),
        key_line("bob", "secret-b"),
    )


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer secret-a"},
        {"authorization": "bearer   secret-a "},
        {"X-API-Key": "secret-a"},
    ],
)
def test_a_key_names_its_caller(file: Path, headers: dict[str, str]) -> None:
    caller = Authenticator(file).authenticate(Headers(headers), "10.0.0.1")
    assert (caller.id, caller.key_name, caller.host) == ("key:alice", "alice", "10.0.0.1")


def test_limits_of_a_key_come_before_the_defaults(file: Path) -> None:
    authenticator = Authenticator(file, defaults=CallerLimits(requests_per_minute=60, max_concurrent=2))
    limits = [authenticator.authenticate({"x-api-key": key}, "").limits for key in ("secret-a", "secret-b")]
    assert limits == [
        CallerLimits(requests_per_minute=5, max_concurrent=2),
        CallerLimits(requests_per_minute=60, max_concurrent=2),
    ]


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "no API key"),
        ({"authorization": "Bearer "}, "no API key"),
        ({"x-api-key": " "}, "no API key"),
        ({"authorization": "Bearer wrong"}, "not known"),
        ({"authorization": "Bearer secret-a secret-b"}, "not known"),
        ({"authorization": "Bearer " + "x" * 10_000}, "not known"),
        ({"authorization": "Bearer \udcff\xff猫"}, "not known"),
        ({"authorization": "Basic c2VjcmV0LWE="}, "another scheme"),
        # The Authorization header is the one that counts.
        ({"authorization": "Bearer wrong", "x-api-key": "secret-a"}, "not known"),
    ],
)
def test_everybody_else_is_refused(file: Path, headers: dict[str, str], message: str) -> None:
    with pytest.raises(AuthenticationError, match=message) as caught:
        Authenticator(file).authenticate(headers, "10.0.0.1")
    assert not any(key in str(caught.value) for key in ("secret", "wrong", "xxx"))


@pytest.mark.parametrize(
    ("host", "caller_id"),
    [
        ("203.0.113.9", "host:203.0.113.9"),
        ("::ffff:203.0.113.9", "host:203.0.113.9"),
        ("2001:db8:1:2:3:4:5:6", "host:2001:db8:1:2::/64"),
        ("fe80::1%eth0", "host:fe80::/64"),
        ("::1", "host:::1"),
        ("testclient", "host:testclient"),
        ("", "host:unknown"),
    ],
)
def test_without_keys_a_caller_is_an_address(host: str, caller_id: str) -> None:
    limits = CallerLimits(max_concurrent=3)
    caller = Authenticator(None, defaults=limits).authenticate({"authorization": "Bearer whatever"}, host)
    assert (caller.id, caller.key_name, caller.limits) == (caller_id, None, limits)


def test_a_new_key_and_its_line_belong_together(tmp_path: Path) -> None:
    first, second = new_key("alice"), new_key("bob")
    assert first.key != second.key
    assert first.key not in first.line
    authenticator = Authenticator(write(tmp_path / "keys", first.line, second.line))
    assert authenticator.authenticate({"x-api-key": second.key}, "").key_name == "bob"


@pytest.mark.parametrize("name", ["", " ", "a b", "-a", "ä", "a" * 65, "a\nb"])
def test_a_key_needs_a_plain_name(name: str) -> None:
    with pytest.raises(BadRequestError, match="is no name for a key"):
        new_key(name)


GOOD: dict[str, Any] = {"name": "carol", "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "keys:1: Invalid JSON"),
        (["[]"], "keys:1: Input should be an object"),
        (["", json.dumps({"name": "carol"})], "keys:2: sha256: Field required"),
        ([json.dumps(GOOD | {"sha256": "secret"})], "keys:1: sha256: String should match"),
        ([json.dumps(GOOD | {"key": "secret"})], "keys:1: key: Extra inputs"),
        ([json.dumps(GOOD | {"requests_per_minute": 0})], "keys:1: requests_per_minute"),
        ([json.dumps(GOOD | {"requests_per_minute": "5"})], "keys:1: requests_per_minute"),
        ([json.dumps(GOOD), json.dumps(GOOD | {"sha256": "1" * 64})], "keys:2: carol is there twice"),
        ([json.dumps(GOOD), json.dumps(GOOD | {"name": "dave"})], "keys:2: dave has the hash of another key"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(BadRequestError, match=message) as caught:
        Authenticator(write(tmp_path / "keys", *lines))
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_file_has_a_most_of_keys(tmp_path: Path) -> None:
    lines = (json.dumps({"name": f"k{i}", "sha256": f"{i:064x}"}) for i in range(MAX_KEYS + 1))
    with pytest.raises(BadRequestError, match=f"{MAX_KEYS + 1} keys"):
        read_keys(write(tmp_path / "keys", *lines), CallerLimits())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match="nowhere: the API keys cannot be read: No such file"):
        Authenticator(tmp_path / "nowhere")


def test_a_changed_file_is_read_again(file: Path) -> None:
    clock = Clock()
    authenticator = Authenticator(file, clock=clock)
    write(file, key_line("carol", "secret-c"))
    with pytest.raises(AuthenticationError):  # not looked at yet
        authenticator.authenticate({"x-api-key": "secret-c"}, "")
    clock.now += 1.0
    assert authenticator.authenticate({"x-api-key": "secret-c"}, "").key_name == "carol"
    with pytest.raises(AuthenticationError):
        authenticator.authenticate({"x-api-key": "secret-a"}, "")


def test_while_the_file_is_bad_the_old_keys_stay_and_one_line_says_so(file: Path) -> None:
    structlog.reset_defaults()
    clock = Clock()
    authenticator = Authenticator(file, clock=clock)

    def look() -> str | None:
        clock.now += 1.0
        return authenticator.authenticate({"x-api-key": "secret-a"}, "").key_name

    with capture_logs() as logs:
        write(file, "{")
        assert [look(), look()] == ["alice", "alice"]
        file.unlink()
        assert [look(), look()] == ["alice", "alice"]
        write(file, key_line("alice", "secret-a"))
        assert look() == "alice"
    assert [entry["event"] for entry in logs] == ["api_keys_kept", "api_keys_kept", "api_keys_read"]
    assert "keys.jsonl:1: Invalid JSON" in logs[0]["reason"]
    assert "cannot be read: " in logs[1]["reason"]
    assert not any("secret" in str(entry) for entry in logs)
