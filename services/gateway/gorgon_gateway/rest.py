"""REST: whole answers, token counts, what is served, and how the gateway is."""

import contextlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, Literal

import orjson
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from gorgon_gateway.callers import Caller
from gorgon_gateway.engine_client import EngineLost, known_error
from gorgon_gateway.engines import Engines, LoadingError
from gorgon_gateway.gateway import Gateway
from gorgon_gateway.generation import Generation
from gorgon_gateway.observability.metrics import CONTENT_TYPE
from gorgon_gateway.observability.middleware import record_of
from gorgon_gateway.observability.tracing import outgoing_headers
from gorgon_gateway.responses import error_fields, json_response, parse, unless_disconnected
from gorgon_protocol.errors import BadRequestError, GorgonError, NotAllowedError, UnavailableError
from gorgon_protocol.messages import Detokenized, EngineInfo, GenerationMetrics, Tokenized, TokenLogprob, TreeDebug
from gorgon_protocol.metrics import Usage
from gorgon_protocol.requests import DetokenizeRequest, GenerateRequest, TokenizeRequest

_ENGINE_TRIES: Final = 3
_UPGRADE: Final = {"Upgrade": "websocket", "Connection": "Upgrade"}
_LOOPBACK: Final = ("127.0.0.1", "::1")


class UpgradeRequiredError(BadRequestError):
    code = "upgrade_required"
    http_status = 426


class ErrorFields(BaseModel):
    code: str
    message: str
    retry_after_seconds: float | None = None


class ErrorAnswer(BaseModel):
    error: ErrorFields


class Answer(BaseModel):
    """A whole answer. Nothing of it is `null` but what says so."""

    request_id: str
    model: str
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length", "cancelled"]
    stop: str | int | None = Field(description="the stop string or token that ended it")
    usage: Usage
    metrics: GenerationMetrics
    seed: int
    logprobs: list[TokenLogprob] | None = Field(description="one a token, where they were asked for")
    tree_debug: list[TreeDebug] | None = Field(description="one a step, where they were asked for")


class GatewayInfo(BaseModel):
    """What is served. Engines are as they described themselves last."""

    version: str
    models: list[str]
    engines: list[EngineInfo]
    num_running: int = Field(description="generations of this gateway")


class Health(BaseModel):
    state: Literal["live", "ready", "loading", "draining", "unavailable"]
    progress: float | None = Field(default=None, description="loading: share done")
    stage: str | None = Field(default=None, description="loading: of what")


def gateway_version() -> str:
    try:
        return version("gorgon")
    except PackageNotFoundError:  # run from a source tree
        return "0"


def make_router(gateway: Gateway) -> APIRouter:
    relay, engines, metrics = gateway.relay, gateway.engines, gateway.metrics
    router = APIRouter()

    @router.post("/generate", **_documented(Answer, "GenerateRequest", 400, 401, 403, 404, 429, 503, 504))
    async def generate(request: Request) -> Response:
        """A whole answer. Streams are at the WebSocket `/generate_stream` and the OpenAI routes."""
        wanted = parse(GenerateRequest, await request.body())
        caller: Caller = request.state.caller
        generation = relay.generate(
            wanted,
            caller,
            request_id=wanted.request_id or record_of(request.scope).request_id,
            headers=outgoing_headers(),
        )
        answer = await unless_disconnected(request, collect(generation))
        return json_response(answer)

    @router.get("/generate_stream", include_in_schema=False)
    async def no_stream(request: Request) -> Response:
        """Who comes without a WebSocket is told so."""
        error = UpgradeRequiredError("/generate_stream is a WebSocket: open it as one, or POST to /generate")
        record_of(request.scope).error_code = error.code
        return json_response({"error": error_fields(error)}, status=error.http_status, headers=_UPGRADE)

    @router.post("/tokenize", **_documented(Tokenized, "TokenizeRequest", 400, 401, 403, 503))
    async def tokenize(request: Request) -> Response:
        """The tokens of a text, or of a chat as the model's template writes it."""
        wanted = parse(TokenizeRequest, await request.body())
        return json_response(await ask_any(engines, "/tokenize", wanted))

    @router.post("/detokenize", **_documented(Detokenized, "DetokenizeRequest", 400, 401, 403, 503))
    async def detokenize(request: Request) -> Response:
        """The text of tokens."""
        wanted = parse(DetokenizeRequest, await request.body())
        return json_response(await ask_any(engines, "/detokenize", wanted))

    @router.head("/info", include_in_schema=False)
    @router.get("/info", **_documented(GatewayInfo, None, 401, 403))
    async def info() -> Response:
        """The models that are served, and the engines that serve them."""
        known = [engine.info for engine in engines.all if engine.info and engine.state != "unreachable"]
        return json_response(
            {
                "version": gateway_version(),
                "models": engines.models,
                "engines": known,
                "num_running": relay.num_running,
            }
        )

    # Monitors ask with HEAD.
    @router.head("/health/live", include_in_schema=False)
    @router.get("/health/live", **_documented(Health, None))
    async def live() -> Response:
        """200 as long as the gateway answers at all."""
        return json_response({"state": "live"})

    @router.head("/health/ready", include_in_schema=False)
    @router.get("/health/ready", **_documented(Health, None, 503))
    async def ready() -> Response:
        """200 while a request could be served, else 503 and why not."""
        if gateway.is_draining:
            return json_response({"state": "draining"}, status=503)
        if engines.ready:
            return json_response({"state": "ready"})
        try:
            engines.choose()
        except LoadingError as error:
            return json_response({"state": "loading", "progress": error.progress, "stage": error.stage}, status=503)
        except GorgonError:
            pass
        return json_response({"state": "unavailable"}, status=503)

    if gateway.settings.metrics_port is None:

        @router.get("/metrics", include_in_schema=False)
        async def prometheus(request: Request) -> Response:
            """For this machine alone: elsewhere set GORGON_GATEWAY_METRICS_PORT."""
            if request.client is None or request.client.host not in _LOOPBACK:
                raise NotAllowedError("metrics are for this machine alone: set GORGON_GATEWAY_METRICS_PORT")
            return Response(metrics.render(), media_type=CONTENT_TYPE)

    return router


async def collect(generation: Generation) -> dict[str, Any]:
    """An `Answer` as a dictionary. Raises `GorgonError`, also for an `error` message."""
    texts: list[str] = []
    token_ids: list[int] = []
    logprobs: list[Any] = []
    trees: list[Any] = []
    end: dict[str, Any] = {}
    async with contextlib.aclosing(generation):
        async for message in generation:
            fields = message.fields
            if fields["type"] == "token":
                texts.append(fields["text"])
                token_ids += fields["token_ids"]
                logprobs += fields.get("logprobs") or ()
                if (tree := fields.get("tree_debug")) is not None:
                    trees.append(orjson.Fragment(orjson.dumps(tree)))  # a tenth of the objects' memory
            elif fields["type"] in ("finished", "error"):
                end = fields
    if end["type"] == "error":
        raise known_error(end["code"], end["message"], retry_after_seconds=end.get("retry_after_seconds"))
    request = generation.request
    return {
        "request_id": generation.request_id,
        "model": generation.engine.model if generation.engine is not None else "",
        "text": "".join([*texts, end["text"]]),
        "token_ids": token_ids,
        "finish_reason": end["finish_reason"],
        "stop": end["stop"],
        "usage": end["usage"],
        "metrics": end["metrics"],
        "seed": generation.seed,
        "logprobs": logprobs if request.logprobs is not None else None,
        "tree_debug": trees if request.tree_debug else None,
    }


async def ask_any(engines: Engines, path: str, request: BaseModel) -> dict[str, Any]:
    """What some ready engine answers. Raises `GorgonError`."""
    body = orjson.dumps(request.model_dump(exclude_defaults=True))
    lost: set[str] = set()
    for _ in range(_ENGINE_TRIES):
        engine = engines.choose(exclude=lost)
        try:
            return await engines.client.call(engine.url, path, body)
        except EngineLost as error:
            engines.failed(engine, error)
            lost.add(engine.url)
    raise UnavailableError("no engine answers: try again soon")


def _documented(model: type[BaseModel], body: str | None, *statuses: int) -> dict[str, Any]:
    """What OpenAPI says of a route, which reads and writes its JSON itself."""
    documented: dict[str, Any] = {
        "response_model": None,
        "responses": {200: {"model": model}} | {status: {"model": ErrorAnswer} for status in statuses},
    }
    if body is not None:
        reference = {"schema": {"$ref": f"#/components/schemas/{body}"}}
        documented["openapi_extra"] = {"requestBody": {"required": True, "content": {"application/json": reference}}}
        documented["responses"][413] = {"model": ErrorAnswer}
    return documented
