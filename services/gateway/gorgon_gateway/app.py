"""The gateway's routes as one ASGI application."""

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from gorgon_gateway import openai, rest
from gorgon_gateway.gateway import Gateway
from gorgon_gateway.guard import Guard
from gorgon_gateway.observability.middleware import RequestMiddleware, record_of
from gorgon_gateway.page import page_routes
from gorgon_gateway.responses import CLIENT_GONE, error_fields, error_headers, json_response
from gorgon_gateway.settings import GatewaySettings
from gorgon_protocol.errors import BadRequestError, GorgonError, NotFoundError
from gorgon_protocol.requests import DetokenizeRequest, GenerateRequest, TokenizeRequest

_STREAM: Final = "/generate_stream"
_DESCRIPTION: Final = """Lossless tree-speculative inference.

Streams with the tree of every step: WebSocket `/generate_stream`, one `GenerateRequest` a generation."""


class MethodNotAllowedError(BadRequestError):
    code = "method_not_allowed"
    http_status = 405


def create_app(settings: GatewaySettings, environment: Mapping[str, str] | None = None) -> FastAPI:
    """environment: `os.environ`, for OpenTelemetry. Raises `BadRequestError` where a file of the settings is unusable.

    The parts are at `app.state.gateway`.
    """
    gateway = Gateway(settings, os.environ if environment is None else environment)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await gateway.start()
        try:
            yield
        finally:
            await gateway.close()

    app = FastAPI(
        title="Gorgon",
        version=rest.gateway_version(),
        description=_DESCRIPTION,
        docs_url=None,  # both load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.gateway = gateway
    gateway.metrics.describe(version=app.version)
    _add_routes(app, gateway)
    _add_middleware(app, gateway)
    _add_error_handlers(app)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _add_routes(app: FastAPI, gateway: Gateway) -> None:
    app.include_router(rest.make_router(gateway))
    app.include_router(openai.make_router(gateway.relay, gateway.engines, gateway.settings))
    app.router.routes.append(WebSocketRoute(_STREAM, gateway.stream))
    app.router.routes.extend(page_routes(gateway.settings.web_root))
    app.router.default = _no_route(app.router.default)


def _no_route(of_http: ASGIApp) -> ASGIApp:
    """What answers where no route does. Starlette's own refusal of a WebSocket is a 403 without a word."""

    async def no_route(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            raise NotFoundError(f"{scope['path'][:200]}: no such WebSocket: use {_STREAM}")
        await of_http(scope, receive, send)

    return no_route


def _add_middleware(app: FastAPI, gateway: Gateway) -> None:
    """The last one added is the outermost."""
    settings = gateway.settings
    app.add_middleware(Guard, settings=settings, authenticator=gateway.authenticator, shape=error_body)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-api-key", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(RequestMiddleware, metrics=gateway.metrics, telemetry=gateway.telemetry)


def error_body(error: GorgonError, path: str) -> dict[str, Any]:
    """The JSON that says so: on the OpenAI routes in OpenAI's shape."""
    return openai.error_body(error) if path.startswith(f"{openai.PREFIX}/") else {"error": error_fields(error)}


def _add_error_handlers(app: FastAPI) -> None:
    def respond(request: Request, error: GorgonError, headers: Mapping[str, str] | None = None) -> Response:
        record_of(request.scope).error_code = error.code
        body = error_body(error, request.scope["path"])
        return json_response(body, status=error.http_status, headers={**(headers or {}), **error_headers(error)})

    async def gorgon_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, GorgonError)
        return respond(request, error)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return respond(request, BadRequestError(f"{where}: {first['msg']}"))

    async def http_error(request: Request, error: Exception) -> Response:
        """Routing's own: no such path, no such method."""
        assert isinstance(error, HTTPException)
        path = request.scope["path"][:200]
        if error.status_code == HTTPStatus.NOT_FOUND:
            return respond(request, NotFoundError(f"{path}: no such route"))
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = (error.headers or {}).get("Allow", "another one")
            known = MethodNotAllowedError(f"{path} does not take {request.method[:20]}: use {allowed}")
            return respond(request, known, error.headers)
        return respond(request, BadRequestError(str(error.detail)), error.headers)

    async def gone(_: Request, __: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    async def broken(request: Request, _: Exception) -> Response:
        return respond(request, GorgonError("the gateway failed to answer this request: see its log"))

    app.add_exception_handler(GorgonError, gorgon_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, broken)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """With the request bodies of the routes that parse them themselves."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        models: list[type[BaseModel]] = [GenerateRequest, TokenizeRequest, DetokenizeRequest, *openai.REQUEST_MODELS]
        _, bodies = models_json_schema(
            [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
        )
        components = schema.setdefault("components", {})
        components.setdefault("schemas", {}).update(bodies["$defs"])
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer", "description": "an API key, where the gateway has any"}
        }
        schema["security"] = [{"bearer": []}, {}]
        app.openapi_schema = schema
    return app.openapi_schema
