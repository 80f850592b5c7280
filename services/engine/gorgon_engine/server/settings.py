"""What the service reads from its environment: `GORGON_ENGINE_*`, all of it with a default that suits a laptop."""

import os
import re
import secrets
import socket
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, StringConstraints, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from gorgon_protocol.environment import one_line, read_secret, refuse_unknown
from gorgon_protocol.errors import BadRequestError

PREFIX = "GORGON_ENGINE_"
_ANY_ADDRESS = ("0.0.0.0", "::", "")

Seconds = Annotated[float, Field(gt=0.0, le=86_400.0, allow_inf_nan=False)]
Identifier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]


class EngineSettings(BaseSettings):
    """One engine process. Empty variables count as unset, unknown ones are refused."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True, hide_input_in_errors=True
    )

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8101, ge=0, le=65_535, description="0: any free one, named in the log")
    secret_file: Path | None = Field(default=None, description="file with the secret that callers must send")

    model: str = Field(default="smollm2", description="model folder, catalogue name or hub name")
    served_name: Identifier | None = Field(default=None, description="what callers call the model; its own name if not")
    quantization: Literal["none", "nf4", "int8"] | None = Field(default=None, description="int8 on a CPU, NF4 on a GPU")
    dtype: Literal["float32", "bfloat16"] | None = Field(default=None, description="of unquantised weights")
    device: str | None = Field(default=None, description="cpu, cuda or cuda:N; a GPU where there is one")
    kernels: Literal["auto", "native", "triton", "torch"] = Field(
        default="auto", description="native: the project's own for CPUs, triton: for GPUs; auto: its own where they run"
    )
    graphs: bool = Field(default=True, description="on a GPU: record each size of step, launch it as one CUDA graph")
    run_ahead: bool = Field(default=True, description="with graphs: launch a step before the one before it is read")
    threads: int | None = Field(default=None, ge=1, le=1024, description="CPU threads; one a physical core")
    context: int | None = Field(default=None, ge=2, description="positions a sequence; the model's, at most 8192")

    heads: str | None = Field(default=None, description="folder of draft heads, or none; those of the program if unset")
    store: str | None = Field(default=None, description="store of heads (folder or URL) whose `latest` is followed")
    store_backbone: str | None = Field(default=None, description="the backbone's folder in the store; found if unset")
    heads_poll_seconds: Seconds = Field(default=2.0, description="between two looks at `latest`")
    drafter: Literal["heads", "ngram", "both", "none"] | None = Field(default=None, description="all there are")
    max_nodes: int = Field(default=32, ge=1, le=128, description="rows of a verification pass, root included")

    num_slots: int = Field(default=8, ge=1, le=4096, description="sequences that run at once")
    max_waiting: int = Field(default=64, ge=0, le=1_000_000, description="requests that may wait for a slot")
    max_body_bytes: int = Field(default=8 << 20, ge=1024, le=1 << 30)
    body_seconds: Seconds = Field(default=30.0, description="for a request's body to arrive")
    header_seconds: Seconds = Field(default=15.0, description="for a request's headers to arrive, from the connection")
    keep_alive_seconds: Annotated[int, Field(ge=1, le=3600)] = Field(
        default=75, description="an idle connection stays open; longer than its callers keep theirs"
    )
    max_buffered_messages: int = Field(
        default=256, ge=2, le=65_536, description="a stream; beyond it a slow reader's token messages are merged"
    )
    slow_reader_seconds: Seconds = Field(default=30.0, description="a reader may stand still")
    drain_seconds: float = Field(
        default=60.0, ge=0.0, le=86_400.0, allow_inf_nan=False, description="running requests get when told to stop"
    )

    redis_url: str | None = Field(default=None, description="redis:// URL of the engine directory; none: no directory")
    redis_password_file: Path | None = Field(default=None, description="file with the password of Redis")
    advertise_url: str | None = Field(default=None, description="where the gateway finds this engine")
    engine_id: Identifier = Field(default_factory=lambda: f"{_host_name()}-{secrets.token_hex(4)}")
    heartbeat_seconds: Seconds = Field(default=2.0, description="a missed third one takes the engine out")

    log_format: Literal["json", "text"] = "json"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @classmethod
    def from_environment(cls) -> Self:
        """Raises `BadRequestError` in one line that names the variable."""
        refuse_unknown(os.environ, prefix=PREFIX, fields=cls.model_fields, service="engine")
        try:
            return cls()
        except ValidationError as error:
            raise BadRequestError(one_line(error, prefix=PREFIX)) from None

    @property
    def is_loopback(self) -> bool:
        return self.host in ("127.0.0.1", "::1", "localhost")

    def url(self, port: int) -> str:
        """Where others find this engine, which listens on `port`."""
        return self.advertise_url.rstrip("/") if self.advertise_url is not None else self.local_url(port)

    def local_url(self, port: int) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{port}"

    def read_secret(self) -> bytes | None:
        """The secret of the file, without white space around it. Raises `BadRequestError`."""
        secret = read_secret(f"{PREFIX}SECRET_FILE", self.secret_file)
        return None if secret is None else secret.encode("ascii")

    def read_redis_password(self) -> str | None:
        """As `read_secret`."""
        return read_secret(f"{PREFIX}REDIS_PASSWORD_FILE", self.redis_password_file)

    @field_validator("advertise_url", "redis_url")
    @classmethod
    def _urls(cls, value: str | None, info: Any) -> str | None:
        schemes = ("http", "https") if info.field_name == "advertise_url" else ("redis", "rediss", "unix")
        if value is not None:
            parts = urlsplit(value)
            is_complete = parts.path if parts.scheme == "unix" else parts.hostname and parts.port != 0
            if parts.scheme not in schemes or not is_complete:
                raise ValueError(f"must be a URL like {schemes[0]}://host:port")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.heads is not None and self.store is not None:
            raise ValueError(
                f"{PREFIX}HEADS is one folder for good, {PREFIX}STORE is followed: set one of the two, not both"
            )
        if self.store_backbone is not None and self.store is None:
            raise ValueError(f"{PREFIX}STORE_BACKBONE names a folder in a store: set {PREFIX}STORE as well")
        if self.store is not None and self.drafter in ("ngram", "none"):
            raise ValueError(
                f"{PREFIX}DRAFTER {self.drafter} leaves the heads of {PREFIX}STORE unused: unset one of the two"
            )
        if self.redis_password_file is not None and self.redis_url is None:
            raise ValueError(f"{PREFIX}REDIS_PASSWORD_FILE needs {PREFIX}REDIS_URL")
        if self.redis_url is not None and self.advertise_url is None and self.host in _ANY_ADDRESS:
            raise ValueError(
                f"{PREFIX}HOST {self.host} is every address: set {PREFIX}ADVERTISE_URL to where the gateway finds it"
            )
        return self


def _host_name() -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).strip("._-")[:64] or "engine"
