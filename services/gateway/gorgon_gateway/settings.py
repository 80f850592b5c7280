"""What the gateway reads from its environment: `GORGON_GATEWAY_*`, all of it with a default that suits a laptop."""

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from gorgon_protocol.environment import one_line, read_secret, refuse_unknown
from gorgon_protocol.errors import BadRequestError

PREFIX: Final = "GORGON_GATEWAY_"

Seconds = Annotated[float, Field(gt=0.0, le=86_400.0, allow_inf_nan=False)]


def _split(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]


class GatewaySettings(BaseSettings):
    """One gateway process. Empty variables count as unset, unknown ones are refused; lists are separated by commas."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True, hide_input_in_errors=True
    )

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8100, ge=0, le=65_535, description="0: any free one, named in the log")
    metrics_host: str = Field(default="127.0.0.1", description="address of the metrics port")
    metrics_port: int | None = Field(
        default=None, ge=0, le=65_535, description="`/metrics` there alone; unset: on the main port, for this machine"
    )

    web_root: Path | None = Field(default=None, description="folder with the built page; unset: the gateway's own")

    engines: Words = Field(default=("http://127.0.0.1:8101",), description="engine URLs; with Redis only those given")
    redis_url: str | None = Field(default=None, description="redis:// URL: engine directory and rate limits")
    redis_password_file: Path | None = Field(default=None, description="file with the password of Redis")
    engine_secret_file: Path | None = Field(default=None, description="file with the secret that engines ask for")
    poll_seconds: Seconds = Field(default=1.0, description="between two looks at an engine")
    poll_timeout_seconds: Seconds = Field(default=2.0, description="for an engine to answer a look")
    connect_seconds: Seconds = Field(default=1.0, description="for an engine to accept a connection")
    penalty_seconds: Seconds = Field(default=2.0, description="an engine that failed is asked last")
    silence_seconds: Seconds = Field(default=30.0, description="an engine may say nothing while it generates")
    queue_seconds: Seconds = Field(default=120.0, description="a request may wait for a slot of an engine")
    loading_seconds: Seconds = Field(default=300.0, description="a WebSocket's request may wait for engines to load")
    request_seconds: Seconds = Field(default=1800.0, description="a generation may take in all")
    resume_queue_seconds: Seconds = Field(
        default=10.0, description="an interrupted generation may wait while every other engine's queue is full"
    )
    max_resumptions: int = Field(default=3, ge=0, le=100, description="times that a generation goes on elsewhere")

    api_keys_file: Path | None = Field(default=None, description="hashed API keys; unset: everybody is let in")
    allowed_origins: Words = Field(default=(), description="web origins besides the gateway's own, or *")
    trusted_proxies: Words = Field(default=(), description="addresses whose X-Forwarded-For is believed")
    max_body_bytes: int = Field(default=4 << 20, ge=1024, le=1 << 30, description="of a request or WebSocket message")
    max_tokens: int | None = Field(default=None, ge=1, description="cap and default of a request's max_tokens")
    max_choices: int = Field(default=8, ge=1, le=128, description="cap of n in the OpenAI API")
    default_max_tokens: int = Field(
        default=1024, ge=1, description="that rate limits reserve for a request that names no max_tokens"
    )

    requests_per_minute: int | None = Field(default=None, ge=1, description="of a caller whose key sets none")
    tokens_per_minute: int | None = Field(default=None, ge=1, description="as above; prompt tokens are not counted")
    tokens_per_day: int | None = Field(default=None, ge=1, description="as above")
    max_concurrent: int | None = Field(default=None, ge=1, description="generations at a time, as above")

    max_connections: int = Field(default=10_000, ge=1, le=1_000_000, description="at a time; then 503")
    header_seconds: Seconds = Field(default=10.0, description="for a request's headers to arrive")
    body_seconds: Seconds = Field(default=30.0, description="for a request's body to arrive")
    keep_alive_seconds: Annotated[int, Field(ge=1, le=3600)] = Field(
        default=75, description="an idle HTTP connection stays open"
    )
    first_message_seconds: Seconds = Field(default=60.0, description="a new WebSocket may be silent")
    idle_seconds: Seconds = Field(default=900.0, description="a WebSocket may be silent between generations")
    max_buffered_messages: int = Field(
        default=256, ge=2, le=65_536, description="of a slow reader; beyond it token messages are merged"
    )
    max_buffered_bytes: int = Field(default=1 << 20, ge=4096, le=1 << 30, description="as above")
    slow_reader_seconds: Seconds = Field(default=30.0, description="a reader may stand still")
    drain_seconds: float = Field(
        default=60.0, ge=0.0, le=86_400.0, allow_inf_nan=False, description="running requests get when told to stop"
    )

    log_format: Literal["json", "text"] = "json"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_prompts: bool = Field(default=False, description="write prompts into the log, for debugging only")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self:
        """Raises `BadRequestError` in one line that names the variable. environment: `os.environ`, for its names."""
        names = environment or os.environ
        refuse_unknown(names, prefix=PREFIX, fields=cls.model_fields, service="gateway")
        try:
            return cls()
        except ValidationError as error:
            raise BadRequestError(one_line(error, prefix=PREFIX)) from None

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the gateway."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def static_engines(self) -> tuple[str, ...]:
        """Those that are there whatever Redis says."""
        return () if self.redis_url is not None and "engines" not in self.model_fields_set else self.engines

    @property
    def is_open(self) -> bool:
        """Whether callers need no key."""
        return self.api_keys_file is None

    def engine_secret(self) -> str | None:
        """Raises `BadRequestError` where the file cannot be read or holds no secret."""
        return read_secret(f"{PREFIX}ENGINE_SECRET_FILE", self.engine_secret_file)

    def redis_password(self) -> str | None:
        """As `engine_secret`."""
        return read_secret(f"{PREFIX}REDIS_PASSWORD_FILE", self.redis_password_file)

    @field_validator("engines")
    @classmethod
    def _engine_urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(engine_url(url) for url in value))

    @field_validator("redis_url")
    @classmethod
    def _redis(cls, value: str | None) -> str | None:
        if value is not None:
            parts = urlsplit(value)
            is_complete = bool(parts.path) if parts.scheme == "unix" else bool(parts.hostname)
            if parts.scheme not in ("redis", "rediss", "unix") or not is_complete:
                raise ValueError("must be a URL like redis://host:6379")
        return value

    @field_validator("allowed_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            parts = urlsplit(origin)
            if origin != "*" and (parts.scheme not in ("http", "https") or not parts.hostname or parts.path):
                raise ValueError(f"{origin[:100]!r} is no origin: write scheme://host[:port] without a path")
        return tuple(origin.lower() for origin in value)

    @field_validator("trusted_proxies")
    @classmethod
    def _addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for address in value:
            ipaddress.ip_network(address, strict=False)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.engines and self.redis_url is None:
            raise ValueError(f"no engine can be found: set {PREFIX}ENGINES or {PREFIX}REDIS_URL")
        if self.redis_password_file is not None and self.redis_url is None:
            raise ValueError(f"{PREFIX}REDIS_PASSWORD_FILE needs {PREFIX}REDIS_URL")
        if self.metrics_port is not None and self.metrics_port == self.port != 0:
            raise ValueError(f"{PREFIX}PORT and {PREFIX}METRICS_PORT are both {self.port}: they must differ")
        return self


def engine_url(url: str) -> str:
    """The URL of an engine without a slash at its end. Raises `ValueError` for one that may lead elsewhere: the gateway
    sends it prompts and the shared secret."""
    shown = re.sub(r"//[^@/]*@", "//***@", url)[:200]  # never a password in a log
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError(f"{shown!r} is not a URL") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError(f"{shown!r} is not a URL like http://host:8101")
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"{shown!r} holds credentials: put the secret into a file, {PREFIX}ENGINE_SECRET_FILE")
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError(f"{shown!r} has a path: an engine is reached at scheme://host:port alone")
    try:
        address = ipaddress.ip_address(parts.hostname)
    except ValueError:
        pass  # a name
    else:
        # Link-local holds the metadata services of clouds.
        if address.is_link_local or address.is_multicast or address.is_unspecified:
            raise ValueError(f"{shown!r} is not the address of a machine that can be an engine")
    return url.rstrip("/")
