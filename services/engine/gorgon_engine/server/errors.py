"""Errors as HTTP says them: `{"error": {"code", "message", "retry_after_seconds"}}`, whatever went wrong."""

import math
from collections.abc import Mapping
from typing import TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from gorgon_protocol.errors import BadRequestError, GorgonError

M = TypeVar("M", bound=BaseModel)

_MAX_SHOWN = 200


def json_response(content: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """content: anything that orjson writes, or a model."""
    body = content.model_dump_json().encode() if isinstance(content, BaseModel) else orjson.dumps(content)
    return Response(body, status_code=status, headers=headers, media_type="application/json")


def error_response(
    code: str,
    message: str,
    *,
    status: int,
    retry_after_seconds: float | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    sent = dict(headers or {})
    if retry_after_seconds is not None:
        sent["Retry-After"] = str(math.ceil(retry_after_seconds))
    error = {"code": code, "message": message, "retry_after_seconds": retry_after_seconds}
    return json_response({"error": error}, status=status, headers=sent)


def gorgon_error_response(error: GorgonError, *, status: int | None = None) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if error.http_status == 401 else None
    return error_response(
        error.code,
        str(error),
        status=status or error.http_status,
        retry_after_seconds=error.retry_after_seconds,
        headers=headers,
    )


async def on_gorgon_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, GorgonError)
    return gorgon_error_response(error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Routing's own: no such path, no such method."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:_MAX_SHOWN]
    if error.status_code == 404:
        return error_response("not_found", f"{path}: no such route", status=404)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"{path} does not take {request.method[:_MAX_SHOWN]}: use {allowed}"
        return error_response("method_not_allowed", message, status=405, headers=error.headers)
    return error_response("invalid_request", error.detail, status=error.status_code, headers=error.headers)


async def on_exception(_: Request, error: Exception) -> Response:
    """A bug of ours; the traceback is in the log."""
    return error_response("internal", "the engine failed to answer this request: see its log", status=500)


def parse(model: type[M], body: bytes) -> M:
    """A request's body. Raises `BadRequestError` that names the field."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise BadRequestError(_one_line(error)) from None


def _one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    message = " ".join(first["msg"].removeprefix("Value error, ").split())
    if first["type"] == "json_invalid":
        return f"the body is not JSON in UTF-8: {message.removeprefix('Invalid JSON: ')}"
    where = ".".join(map(str, first["loc"]))[:_MAX_SHOWN]
    return f"{where}: {message}" if where else message
