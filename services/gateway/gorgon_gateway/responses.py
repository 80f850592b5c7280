"""Bodies in, errors out: how the REST routes read JSON, and what every failure looks like.

{"error": {"code": "invalid_request", "message": "max_tokens: ...", "retry_after_seconds": null}}
"""

import asyncio
import math
from collections.abc import Coroutine, Mapping
from typing import Any, Final, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from gorgon_protocol.errors import BadRequestError, GorgonError

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

_MAX_SHOWN: Final = 200
CLIENT_GONE: Final = 499  # nobody reads it; the log does


def json_response(content: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """content: anything that orjson writes, or a model."""
    body = content.model_dump_json().encode() if isinstance(content, BaseModel) else orjson.dumps(content)
    return Response(body, status_code=status, headers=headers, media_type="application/json")


def error_headers(error: GorgonError) -> dict[str, str]:
    headers = {}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_seconds)))
    if error.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def error_fields(error: GorgonError) -> dict[str, Any]:
    return {"code": error.code, "message": str(error), "retry_after_seconds": error.retry_after_seconds}


def error_response(error: GorgonError) -> Response:
    return json_response({"error": error_fields(error)}, status=error.http_status, headers=error_headers(error))


def parse(model: type[M], body: bytes | str) -> M:
    """JSON as a model. Raises `BadRequestError` in one line that names the field."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise BadRequestError(one_line(error)) from None


def one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    message = " ".join(first["msg"].removeprefix("Value error, ").split())
    if first["type"] == "json_invalid":
        return f"this is not JSON in UTF-8: {message.removeprefix('Invalid JSON: ')}"
    where = ".".join(map(str, first["loc"]))[:_MAX_SHOWN]
    return f"{where}: {message}" if where else message


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away. Raises `ClientDisconnect` then.

    The request's body must have been read.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for future in (task, watcher):
            future.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
