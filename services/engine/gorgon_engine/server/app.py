"""The routes of the engine: internal HTTP, for the gateway and for whoever looks after the engine."""

import asyncio
import hmac

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gorgon_engine.server.conversion import detokenize, tokenize
from gorgon_engine.server.errors import (
    gorgon_error_response,
    json_response,
    on_exception,
    on_gorgon_error,
    on_http_exception,
    parse,
)
from gorgon_engine.server.responses import MessagesResponse
from gorgon_engine.server.service import EngineService
from gorgon_protocol.errors import AuthenticationError, GorgonError, HeadsError, TooLargeError
from gorgon_protocol.messages import Detokenized, Tokenized
from gorgon_protocol.requests import DetokenizeRequest, EngineRequest, ReloadHeadsRequest, TokenizeRequest

_OPEN_ROUTES = frozenset({"/live", "/ready"})  # for probes, which have no secret; strangers learn nothing worth one


def create_app(service: EngineService, *, secret: bytes | None) -> Starlette:
    """secret: that callers must send as `Authorization: Bearer`; None: anybody may call."""
    routes = _Routes(service)
    return Starlette(
        routes=[
            Route("/generate", routes.generate, methods=["POST"]),
            Route("/tokenize", routes.tokenize, methods=["POST"]),
            Route("/detokenize", routes.detokenize, methods=["POST"]),
            Route("/info", routes.info),
            Route("/heads", routes.heads),
            Route("/heads/reload", routes.reload_heads, methods=["POST"]),
            Route("/live", routes.live),
            Route("/ready", routes.ready),
            Route("/metrics", routes.metrics),
        ],
        middleware=[Middleware(_Authentication, secret=secret)],
        exception_handlers={
            GorgonError: on_gorgon_error,
            HTTPException: on_http_exception,
            Exception: on_exception,
        },
    )


class _Routes:
    def __init__(self, service: EngineService) -> None:
        self._service = service

    async def generate(self, request: Request) -> Response:
        service = self._service
        wire = parse(EngineRequest, await self._body(request))
        return MessagesResponse(service, await service.generate(wire))

    async def tokenize(self, request: Request) -> Response:
        engine = self._service.engine
        wire = parse(TokenizeRequest, await self._body(request))

        def work() -> bytes:
            ids = tokenize(engine, wire)
            tokens = [engine.tokenizer.token_text(token) for token in ids]
            return Tokenized(token_ids=ids, tokens=tokens, num_tokens=len(ids)).model_dump_json().encode()

        return Response(await self._service.in_thread(work), media_type="application/json")

    async def detokenize(self, request: Request) -> Response:
        engine = self._service.engine
        wire = parse(DetokenizeRequest, await self._body(request))
        text = await self._service.in_thread(lambda: detokenize(engine, wire.token_ids))
        return json_response(Detokenized(text=text))

    async def info(self, _: Request) -> Response:
        return json_response(self._service.info())

    async def heads(self, _: Request) -> Response:
        return json_response(self._service.heads)

    async def reload_heads(self, request: Request) -> Response:
        body = await self._body(request)
        wire = parse(ReloadHeadsRequest, body) if body else ReloadHeadsRequest()
        try:
            return json_response(await self._service.reload_heads(wire.version))
        except HeadsError as error:
            # Not a failure of the engine, which goes on with the heads that it has.
            return gorgon_error_response(error, status=409)

    async def live(self, _: Request) -> Response:
        return json_response({"live": True})

    async def ready(self, request: Request) -> Response:
        service = self._service
        if service.state == "ready":
            return json_response({"state": "ready", "stage": None, "progress": 1.0})
        loading = service.state == "loading"
        content = {
            "state": service.state,
            "stage": service.stage.stage if loading else None,
            "progress": service.stage.progress if loading else None,
            "message": service.failure if request.state.is_known else None,  # it may name files of this machine
        }
        return json_response(content, status=503, headers={"Retry-After": "1"})

    async def metrics(self, _: Request) -> Response:
        return Response(self._service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    async def _body(self, request: Request) -> bytes:
        """The whole body. Raises `TooLargeError` as soon as it is known to be; HTTP 408 where it does not arrive."""
        settings = self._service.settings
        limit = settings.max_body_bytes
        length = request.headers.get("content-length", "")
        error = TooLargeError(
            f"the body is longer than {limit} bytes: send less, or raise GORGON_ENGINE_MAX_BODY_BYTES"
        )
        if length.isdigit() and int(length) > limit:
            raise error
        parts, size = [], 0
        try:
            async with asyncio.timeout(settings.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > limit:
                        raise error
                    parts.append(part)
        except TimeoutError:
            raise HTTPException(
                408, f"the body did not arrive within {settings.body_seconds:g} seconds", {"Connection": "close"}
            ) from None
        except ClientDisconnect:
            raise HTTPException(400, "the body was cut off", {"Connection": "close"}) from None
        return b"".join(parts)


class _Authentication:
    """Every route but the open ones, those that do not exist included. `request.state.is_known`: the secret was sent,
    or there is none."""

    def __init__(self, app: ASGIApp, *, secret: bytes | None) -> None:
        self._app = app
        self._expected = None if secret is None else b"Bearer " + secret

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_known = scope["type"] != "http" or self._is_known(scope)
        if not is_known and scope["path"] not in _OPEN_ROUTES:
            error = AuthenticationError("this engine wants its secret: send it as `Authorization: Bearer SECRET`")
            await gorgon_error_response(error)(scope, receive, send)
            return
        scope.setdefault("state", {})["is_known"] = is_known
        await self._app(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        if self._expected is None:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given, self._expected)
