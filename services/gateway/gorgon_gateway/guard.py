"""What every request has to pass before a route sees it, and what every response is sent with.

- `Origin`: a page of another site must not use this gateway through a visitor's browser.
- a key, where keys are configured, for everything but the page and the health routes;
- a body that is not too large and arrives in time.

Pure ASGI, as nothing may come between a stream and its client.
"""

import asyncio
import base64
import binascii
import ipaddress
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import urlsplit

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gorgon_gateway.callers import Authenticator
from gorgon_gateway.observability.middleware import record_of
from gorgon_gateway.page import ASSETS
from gorgon_gateway.responses import error_headers
from gorgon_gateway.settings import GatewaySettings
from gorgon_protocol.errors import (
    AuthenticationError,
    BadRequestError,
    DeadlineError,
    GorgonError,
    NotAllowedError,
    TooLargeError,
)

SUBPROTOCOL: Final = "gorgon"
_KEY_SUBPROTOCOL: Final = "key."
_PUBLIC: Final = frozenset({"/", "/favicon.ico", "/health/live", "/health/ready"})
_PUBLIC_FOLDER: Final = f"{ASSETS}/"
_LOCAL_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_HEADERS: Final = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=(), payment=(), usb=()"),
    (
        b"content-security-policy",
        # blob: for the picture that a tree is saved as.
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; font-src 'self'; "
        b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
]


class BodyTimeoutError(DeadlineError):
    http_status = 408


class Guard:
    """Belongs inside `RequestMiddleware`."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: GatewaySettings,
        authenticator: Authenticator,
        shape: Callable[[GorgonError, str], object],
    ) -> None:
        """shape: (error, path) -> the JSON that says so there."""
        self._app = app
        self._settings = settings
        self._authenticator = authenticator
        self._shape = shape
        # Where this machine alone is served, a name that is made to point here must not lead in.
        self._local_only = settings.is_loopback and settings.is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check_origin(headers)
            self._authenticate(scope, headers)
            if scope["type"] == "websocket":
                await self._app(scope, receive, send)
                return
            self._check_length(headers)
        except GorgonError as error:
            record_of(scope).error_code = error.code
            await self._refuse(error, scope, receive, send)
            return
        exchange = _Exchange(self, scope, receive, send)
        await self._app(scope, exchange.receive, exchange.send)

    async def respond(self, error: GorgonError, scope: Scope, send: Send, *, kind: str = "http") -> None:
        body = orjson.dumps(self._shape(error, scope["path"]))
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error_headers(error)}
        if isinstance(error, BodyTimeoutError):
            headers["connection"] = "close"  # the rest of the body would be read as the next request
        await send(
            {
                "type": f"{kind}.response.start",
                "status": error.http_status,
                "headers": [(k.lower().encode(), v.encode("latin-1", "replace")) for k, v in headers.items()]
                + _HEADERS,
            }
        )
        await send({"type": f"{kind}.response.body", "body": body})

    async def _refuse(self, error: GorgonError, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self.respond(error, scope, send)
            return
        await receive()  # websocket.connect
        if "websocket.http.response" in scope.get("extensions", {}):
            await self.respond(error, scope, send, kind="websocket.http")
        else:
            await send({"type": "websocket.close", "code": 1008, "reason": str(error)[:100]})

    def _check_origin(self, headers: Mapping[str, str]) -> None:
        """Browsers name the page's origin where it matters: with WebSockets, and with whatever is not a plain GET.
        Raises `NotAllowedError`."""
        origin = headers.get("origin", "").lower()
        if not origin:
            return
        allowed = self._settings.allowed_origins
        if "*" in allowed or origin in allowed:
            return
        host = headers.get("host", "").lower()
        if origin == "null" or urlsplit(origin).netloc != host or (self._local_only and not _is_local(host)):
            raise NotAllowedError(
                f"the origin {origin[:200]} may not use this gateway: add it to GORGON_GATEWAY_ALLOWED_ORIGINS"
            )

    def _authenticate(self, scope: Scope, headers: dict[str, str]) -> None:
        path = scope["path"]
        if path in _PUBLIC or path.startswith(_PUBLIC_FOLDER):
            return
        if scope["type"] == "websocket":
            headers = _with_subprotocol_key(headers, scope["subprotocols"])
        client = scope.get("client")
        caller = self._authenticator.authenticate(headers, client[0] if client else "")
        scope["state"]["caller"] = caller
        record_of(scope).caller_id = caller.id

    def _check_length(self, headers: Mapping[str, str]) -> None:
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) > self._settings.max_body_bytes:
            raise self.too_large()

    def too_large(self) -> TooLargeError:
        return TooLargeError(f"the body is larger than {self._settings.max_body_bytes} bytes")

    @property
    def body_seconds(self) -> float:
        return self._settings.body_seconds

    @property
    def max_body_bytes(self) -> int:
        return self._settings.max_body_bytes


class _Exchange:
    """One HTTP request: counts its body, and says what was wrong with it whatever the route makes of that."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self._guard = guard
        self._scope = scope
        self._receive = receive
        self._send = send
        self._size = 0
        self._has_body = False
        self._deadline = asyncio.get_running_loop().time() + guard.body_seconds
        self._error: GorgonError | None = None
        self._has_started = False

    async def receive(self) -> Message:
        if self._has_body:
            return await self._receive()
        if self._error is not None:
            raise self._error
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            self._error = BodyTimeoutError(f"the body did not arrive within {self._guard.body_seconds:g} s")
            raise self._error from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            if self._size > self._guard.max_body_bytes:
                self._error = self._guard.too_large()
                raise self._error
            self._has_body = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if self._error is not None and not self._has_started:
            self._has_started = True
            await self._guard.respond(self._error, self._scope, self._send)
        if self._error is not None:
            return  # the route's own words
        if message["type"] == "http.response.start":
            self._has_started = True
            headers = list(message.get("headers", []))
            names = {name.lower() for name, _ in headers}
            message["headers"] = headers + [header for header in _HEADERS if header[0] not in names]
        await self._send(message)


def _is_local(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name in _LOCAL_NAMES or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _with_subprotocol_key(headers: dict[str, str], subprotocols: list[str]) -> dict[str, str]:
    """A browser cannot set headers on a WebSocket, but it can name subprotocols: `gorgon, key.<base64url of the key>`.
    Raises `BadRequestError`, `AuthenticationError`."""
    keys = [name for name in subprotocols if name.startswith(_KEY_SUBPROTOCOL)]
    if not keys:
        return headers
    if SUBPROTOCOL not in subprotocols:
        raise BadRequestError(
            f"a key among the subprotocols needs {SUBPROTOCOL!r} beside it: it cannot be accepted itself"
        )
    encoded = keys[0].removeprefix(_KEY_SUBPROTOCOL)
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        raise AuthenticationError("the key among the subprotocols is not base64url") from None
    return {**headers, "authorization": f"Bearer {key}"}
