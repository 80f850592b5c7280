"""What `gorgon up` is told, checked before anything is started: an error must not wait for a model to be loaded."""

import errno
import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from gorgon_protocol.errors import BadRequestError, UnavailableError

LOOPBACK: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class UpOptions:
    host: str
    port: int
    engine_port: int
    model: str | None
    heads: str | None
    store: str | None
    num_slots: int | None
    open_page: bool | None  # None: where there is a terminal and a display
    log_file: Path | None
    verbose: bool

    @property
    def url(self) -> str:
        """Where a browser on this machine finds the page."""
        host = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the gateway."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def engine_url(self) -> str:
        return f"http://{LOOPBACK}:{self.engine_port}"


def checked(options: UpOptions) -> UpOptions:
    """With ports chosen. Raises `GorgonError` for what would otherwise be said only after the model has been loaded."""
    for option, value in (
        ("--model", options.model),
        ("--heads", options.heads),
        ("--store", options.store),
        ("--host", options.host),
    ):
        if value == "":  # an unset shell variable must not quietly mean the default
            raise BadRequestError(f"{option} is empty: give a value, or leave it out")
    if options.heads is not None and options.store is not None:
        raise BadRequestError(
            "--heads and --store (GORGON_ENGINE_HEADS, GORGON_ENGINE_STORE) are two places for heads: leave one out"
        )
    _check_places(options)
    for package in ("torch", "aiohttp"):
        if find_spec(package) is None:
            raise UnavailableError(f"{package} is not installed here: pip install 'gorgon[engine,gateway]'")
    if options.port == options.engine_port != 0:
        raise BadRequestError(f"--port and --engine-port are both {options.port}: they must differ")
    # Both are held at once, or port 0 might give the same one twice.
    with (
        _held(options.host, options.port, "--port") as port,
        _held(LOOPBACK, options.engine_port, "--engine-port") as engine_port,
    ):
        return replace(options, port=port, engine_port=engine_port)


def _check_places(options: UpOptions) -> None:
    """Raises `GorgonError` for a folder that is not there. What may lie at a hub or URL is the engine's to look for."""
    from gorgon_engine.models.catalog import CATALOG, resolve_model

    model, heads, store = options.model, options.heads, options.store
    if model is not None and model not in CATALOG and ("/" not in model or Path(model).expanduser().is_absolute()):
        resolve_model(model)  # no hub name: nothing is downloaded here
    if heads is not None and heads != "none" and not Path(heads).is_dir():
        raise BadRequestError(f"--heads {heads}: no such folder: give a checkpoint folder, or `none`")
    if store is not None and ":" not in store and not Path(store).is_dir():
        raise BadRequestError(f"--store {store}: no such folder: publish heads into it first, or make it")


@contextmanager
def _held(host: str, port: int, option: str) -> Iterator[int]:
    """The port, listened on while inside. Raises `BadRequestError` where that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise BadRequestError(f"--host {host}: no such address") from None
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not count
        try:
            listener.bind(address)
            listener.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                message = f"port {port} is in use: end what listens there, or choose another with {option}"
            else:
                message = f"cannot listen on {host} port {port} ({error.strerror}): choose another --host or {option}"
            raise BadRequestError(message) from None
        yield int(listener.getsockname()[1])
