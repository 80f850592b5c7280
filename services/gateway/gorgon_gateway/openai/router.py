"""OpenAI's routes: `/v1/chat/completions`, `/v1/completions`, `/v1/models`.

Limits are told in `x-ratelimit-*` headers, the request's id in `x-request-id`.
"""

import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from gorgon_gateway.callers import Caller
from gorgon_gateway.engines import Engine, Engines
from gorgon_gateway.limits import CallerLimitError
from gorgon_gateway.observability.logs import logger
from gorgon_gateway.observability.middleware import RequestRecord, record_of
from gorgon_gateway.openai.answers import ChatCompletion, Completion, Model, ModelList
from gorgon_gateway.openai.choices import ChoiceMessage, Choices
from gorgon_gateway.openai.completion import Plan, plan_chat, plan_completion, stream_events, whole_answer
from gorgon_gateway.openai.errors import OpenAIError, error_body, error_response, parse
from gorgon_gateway.openai.schemas import ChatCompletionRequest, CompletionRequest
from gorgon_gateway.openai.sse import EventStream, event
from gorgon_gateway.relay import Relay
from gorgon_gateway.responses import CLIENT_GONE, json_response, unless_disconnected
from gorgon_gateway.settings import GatewaySettings
from gorgon_protocol.errors import GorgonError, ModelNotFoundError

PREFIX: Final = "/v1"
REQUEST_MODELS: Final[tuple[type[BaseModel], ...]] = (ChatCompletionRequest, CompletionRequest)


class _OpenAIRoute(APIRoute):
    """Errors in OpenAI's shape."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_with_errors(request: Request) -> Response:
            try:
                return await handle(request)
            except GorgonError as error:
                record_of(request.scope).error_code = error.code
                headers = error.status.headers() if isinstance(error, CallerLimitError) else {}
                return error_response(error, headers)
            except ClientDisconnect:
                return Response(status_code=CLIENT_GONE)

        return handle_with_errors


def make_router(relay: Relay, engines: Engines, settings: GatewaySettings) -> APIRouter:
    """The routes. The guard has put the caller into `request.state.caller`."""
    router = APIRouter(prefix=PREFIX, route_class=_OpenAIRoute, tags=["OpenAI"])
    max_choices = settings.max_choices
    started_at = int(time.time())

    @router.post("/chat/completions", **_documented(ChatCompletion, ChatCompletionRequest))
    async def chat_completions(request: Request) -> Response:
        """An answer to a chat; with `stream: true` in chunks, as server-sent events."""
        wanted = parse(ChatCompletionRequest, await request.body())
        plan = plan_chat(wanted, request_id=record_of(request.scope).request_id, max_choices=max_choices)
        return await _answer(relay, request, plan, max_choices, is_streamed=bool(wanted.stream))

    @router.post("/completions", **_documented(Completion, CompletionRequest))
    async def completions(request: Request) -> Response:
        """A continuation of a text; with `stream: true` in chunks, as server-sent events."""
        wanted = parse(CompletionRequest, await request.body())
        plan = plan_completion(wanted, request_id=record_of(request.scope).request_id, max_choices=max_choices)
        return await _answer(relay, request, plan, max_choices, is_streamed=bool(wanted.stream))

    @router.head("/models", include_in_schema=False)
    @router.get("/models", response_model=None, responses={200: {"model": ModelList}, **_failures(401, 403)})
    async def models() -> Response:
        """The models that are served."""
        return json_response({"object": "list", "data": _models(engines, started_at)})

    @router.head("/models/{model:path}", include_in_schema=False)
    @router.get(
        "/models/{model:path}",
        response_model=None,
        # With a default FastAPI does not add a 422 of its own, which is never sent.
        responses={200: {"model": Model}, **_failures(401, 403, 404, "default")},
    )
    async def one_model(model: str) -> Response:
        """One of the models that are served."""
        for engine in engines.ready:
            if engine.serves(model):
                return json_response(_model(engine, started_at))
        names = ", ".join(engines.models) or "none now"
        raise ModelNotFoundError(f"model {model[:200]!r} is not served here: this gateway serves {names}")

    return router


async def _answer(relay: Relay, request: Request, plan: Plan, max_concurrent: int, *, is_streamed: bool) -> Response:
    caller: Caller = request.state.caller
    messages = Choices(relay, caller, plan.request_id, plan.generations, max_concurrent).messages()
    if not is_streamed:
        answer = await unless_disconnected(request, whole_answer(plan, messages))
        return json_response(answer, headers=relay.limiter.status(caller).headers())
    # What fails before the first message is answered with a status.
    first = await unless_disconnected(request, anext(messages))
    events = _events(plan, _behind(first, messages), record_of(request.scope))
    return EventStream(events, headers=relay.limiter.status(caller).headers())


async def _behind(
    first: ChoiceMessage, rest: AsyncGenerator[ChoiceMessage, None]
) -> AsyncGenerator[ChoiceMessage, None]:
    try:
        yield first
        async for message in rest:
            yield message
    finally:
        await rest.aclose()


async def _events(
    plan: Plan, messages: AsyncGenerator[ChoiceMessage, None], record: RequestRecord
) -> AsyncGenerator[bytes, None]:
    """What the client reads. A failure is an `error` event, and then no `[DONE]`: nobody takes it for the end."""
    try:
        async for data in stream_events(plan, messages):
            yield data
    except GorgonError as error:
        record.error_code = error.code
        yield event(error_body(error), name="error")
    except Exception:
        record.error_code = GorgonError.code
        logger().exception("stream_failed", request_id=record.request_id)
        failure = GorgonError("the gateway failed at this request: see its log")
        yield event(error_body(failure), name="error")
    finally:
        await messages.aclose()


def _models(engines: Engines, started_at: int) -> list[dict[str, Any]]:
    """One entry a model, of its first engine."""
    ready = [engine for engine in reversed(engines.ready) if engine.model]
    return list({engine.model: _model(engine, started_at) for engine in ready}.values())


def _model(engine: Engine, started_at: int) -> dict[str, Any]:
    """Created when its heads were loaded; without heads, when the gateway was started."""
    heads = engine.info.get("heads")
    loaded_at = heads.get("loaded_at") if isinstance(heads, dict) else None
    return {
        "id": engine.model,
        "object": "model",
        "created": int(loaded_at or started_at),
        "owned_by": "gorgon",
        "gorgon": {
            "backbone": engine.backbone,
            "context": engine.info.get("context"),
            "heads": engine.heads,
            "kernels": engine.info.get("kernels"),
        },
    }


def _documented(answer: type[BaseModel], body: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI says of a route that reads and writes its JSON itself."""
    reference = {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}
    whole: dict[str, Any] = {"model": answer, "content": {"text/event-stream": {"schema": {"type": "string"}}}}
    return {
        "response_model": None,
        "responses": {200: whole, **_failures(400, 401, 403, 404, 413, 429, 503, 504)},
        "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": reference}}},
    }


def _failures(*statuses: int | str) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": OpenAIError} for status in statuses}
