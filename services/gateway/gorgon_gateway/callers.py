"""Who calls: API keys, kept as hashes in a file, or everybody by address.

The file has one key a line, empty lines and lines that begin with `#` aside:

    {"name": "alice", "sha256": "9f86d0…", "requests_per_minute": 60, "tokens_per_minute": 20000,
     "tokens_per_day": 1000000, "max_concurrent": 4}

Limits that a line leaves out are the gateway's defaults. Keys are 256 random bits, so that a plain hash is enough:
there is nothing to guess. `python -m gorgon_gateway keys new NAME` prints a key and its line. The file is read again
when it changes; while it is damaged the keys read before stay.
"""

import hashlib
import hmac
import ipaddress
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import structlog
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from gorgon_protocol.errors import AuthenticationError, BadRequestError

KEY_PREFIX: Final = "gorgon_"
MAX_KEYS: Final = 4096
_MAX_FILE_BYTES: Final = 4 << 20
_MAX_KEY_LENGTH: Final = 512
_RELOAD_SECONDS: Final = 1.0
_HOW: Final = "send `Authorization: Bearer KEY` or `X-API-Key: KEY`"

KeyName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Limit = Annotated[int, Field(ge=1, le=10**12)]


@dataclass(frozen=True, slots=True)
class CallerLimits:
    """What one caller may take; None = as much as there is. Tokens are those generated, prompts do not count."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    max_concurrent: int | None = None

    @property
    def is_unlimited(self) -> bool:
        return self == CallerLimits()


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request. Limits, and turns in an engine's queue, go by `id`."""

    id: str
    key_name: str | None  # None: anonymous
    limits: CallerLimits
    host: str


@dataclass(frozen=True, slots=True)
class NewKey:
    """`key` is shown once and kept nowhere; `line` belongs in the file."""

    key: str
    line: str


class _KeyLine(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    name: KeyName
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    tokens_per_day: Limit | None = None
    max_concurrent: Limit | None = None


@dataclass(frozen=True, slots=True)
class _Key:
    name: str
    digest: bytes
    limits: CallerLimits


_Fingerprint = tuple[int, int, int]


class Authenticator:
    """Tells who calls. Without a file there are no keys, and a caller is a network address."""

    def __init__(
        self,
        file: Path | None,
        *,
        defaults: CallerLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises `BadRequestError` where the file cannot be read or a line of it is wrong."""
        self._file = file
        self._defaults = defaults or CallerLimits()
        self._clock = clock
        self._keys: tuple[_Key, ...] = ()
        self._fingerprint: _Fingerprint | None = None
        self._looked_at = clock()
        if file is not None:
            try:
                self._fingerprint = _fingerprint(file)
                self._keys = read_keys(file, self._defaults)
            except OSError as error:
                raise BadRequestError(f"{file}: the API keys cannot be read: {error.strerror}") from None

    @property
    def needs_key(self) -> bool:
        return self._file is not None

    def authenticate(self, headers: Mapping[str, str], host: str) -> Caller:
        """headers: with names in lower case, or a mapping that does not mind; host: the client's address.

        Raises `AuthenticationError`.
        """
        if self._file is None:
            return Caller(id=f"host:{_network(host)}", key_name=None, limits=self._defaults, host=host)
        self._reload_if_changed()
        return self._find(_key_of(headers), host)

    def _find(self, key: str, host: str) -> Caller:
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = None
        for known in self._keys:  # all of them, whichever it is: the time tells nothing
            if hmac.compare_digest(known.digest, digest):
                found = known
        if found is None:
            raise AuthenticationError(f"the API key is not known: {_HOW}")
        return Caller(id=f"key:{found.name}", key_name=found.name, limits=found.limits, host=host)

    def _reload_if_changed(self) -> None:
        assert self._file is not None
        now = self._clock()
        if now - self._looked_at < _RELOAD_SECONDS:
            return
        self._looked_at = now
        log = structlog.get_logger("gorgon")
        try:
            fingerprint: _Fingerprint | None = _fingerprint(self._file)
        except OSError:
            fingerprint = None
        if fingerprint == self._fingerprint:
            return
        self._fingerprint = fingerprint  # a bad file is reported once, not at every look
        try:
            self._keys = read_keys(self._file, self._defaults)
        except OSError as error:
            log.error("api_keys_kept", reason=f"{self._file}: cannot be read: {error.strerror}")
        except BadRequestError as error:
            log.error("api_keys_kept", reason=str(error))
        else:
            log.info("api_keys_read", num_keys=len(self._keys))


def new_key(name: str) -> NewKey:
    """Raises `BadRequestError` for a name that the file could not hold."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    try:
        line = _KeyLine(name=name, sha256=hashlib.sha256(key.encode()).hexdigest())
    except ValidationError:
        raise BadRequestError(
            f"{name[:64]!r} is no name for a key: use 1 to 64 letters, digits, '.', '_' and '-', not a sign first"
        ) from None
    return NewKey(key=key, line=line.model_dump_json(exclude_none=True))


def read_keys(file: Path, defaults: CallerLimits) -> tuple[_Key, ...]:
    """The keys of a file. Raises `BadRequestError` that names the line, `OSError` where it cannot be read."""
    with file.open("rb") as stream:
        content = stream.read(_MAX_FILE_BYTES + 1)
    if len(content) > _MAX_FILE_BYTES:
        raise BadRequestError(f"{file}: larger than {_MAX_FILE_BYTES >> 20} MiB: that is no file of API keys")
    keys: list[_Key] = []
    names: set[str] = set()
    digests: set[str] = set()
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith(b"#"):
            continue
        entry = _parse_line(line, f"{file}:{number}")
        if entry.name in names:
            raise BadRequestError(f"{file}:{number}: {entry.name} is there twice: give each key a name of its own")
        if entry.sha256 in digests:
            raise BadRequestError(f"{file}:{number}: {entry.name} has the hash of another key")
        names.add(entry.name)
        digests.add(entry.sha256)
        keys.append(_Key(entry.name, bytes.fromhex(entry.sha256), _limits(entry, defaults)))
    if len(keys) > MAX_KEYS:
        raise BadRequestError(f"{file}: {len(keys)} keys, at most {MAX_KEYS} are possible")
    return tuple(keys)


def _parse_line(line: bytes, where: str) -> _KeyLine:
    try:
        return _KeyLine.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise BadRequestError(f"{where}: {field + ': ' if field else ''}{first['msg']}") from None


def _limits(entry: _KeyLine, defaults: CallerLimits) -> CallerLimits:
    def chosen(own: int | None, default: int | None) -> int | None:
        return default if own is None else own

    return CallerLimits(
        requests_per_minute=chosen(entry.requests_per_minute, defaults.requests_per_minute),
        tokens_per_minute=chosen(entry.tokens_per_minute, defaults.tokens_per_minute),
        tokens_per_day=chosen(entry.tokens_per_day, defaults.tokens_per_day),
        max_concurrent=chosen(entry.max_concurrent, defaults.max_concurrent),
    )


def _key_of(headers: Mapping[str, str]) -> str:
    authorization = headers.get("authorization")
    if authorization is not None:
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise AuthenticationError(f"the Authorization header has another scheme than Bearer: {_HOW}")
    else:
        key = headers.get("x-api-key", "")
    key = key.strip()
    if not key:
        raise AuthenticationError(f"no API key: {_HOW}")
    if len(key) > _MAX_KEY_LENGTH:
        raise AuthenticationError(f"the API key is not known: {_HOW}")
    return key


def _fingerprint(file: Path) -> _Fingerprint:
    stat = file.stat()
    return (stat.st_ino, stat.st_size, stat.st_mtime_ns)


def _network(host: str) -> str:
    """What one client can be told by: an IPv4 address, the /64 of an IPv6 address (any of which is one client's)."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host[:64] or "unknown"
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        if not address.is_loopback:
            return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
