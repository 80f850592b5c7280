"""Errors in OpenAI's shape, which its clients turn into exceptions by the status.

{"error": {"message": "...", "type": "invalid_request_error", "param": "messages[0].role", "code": "invalid_value"}}
"""

from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from gorgon_gateway.engine_client import known_error
from gorgon_gateway.responses import error_headers, json_response
from gorgon_protocol.errors import BadRequestError, GorgonError, ModelNotFoundError

M = TypeVar("M", bound=BaseModel)

# Kinds of pydantic errors raised over a whole object: which of its fields is meant is in their context, as `param`.
UNSUPPORTED: Final = "unsupported_parameter"
INCONSISTENT: Final = "inconsistent_parameters"
_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
_MAX_SHOWN: Final = 200

# OpenAI's codes for what pydantic calls otherwise.
_CODES: Final = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}

# Fields of several types: pydantic names every attempt, one sentence says more.
_SHAPES: Final = {
    "prompt": "must be a string, a list of strings, a list of token ids or a list of such lists, none of them empty",
    "stop": "must be a string or a list of at most 64 strings, each of 1 to 1024 characters",
    "content": 'must be a string or a list of {"type": "text", "text": ...} parts; images, audio and files are not '
    "supported",
}


class ParameterError(BadRequestError):
    """A request that cannot be: `param` names the field as OpenAI does, `reason` is OpenAI's code."""

    def __init__(self, message: str, *, param: str | None, reason: str | None) -> None:
        super().__init__(message)
        self.param = param
        self.reason = reason


class OpenAIErrorFields(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    """What every failure looks like."""

    error: OpenAIErrorFields


def error_body(error: GorgonError) -> dict[str, Any]:
    """As JSON: of a response, and of an SSE `error` event."""
    param, code = None, error.code
    if isinstance(error, ParameterError):
        param, code = error.param, error.reason or error.code
    elif isinstance(error, ModelNotFoundError):
        param = "model"
    kind = _TYPES.get(error.http_status, "server_error" if error.http_status >= 500 else "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": param, "code": code}}


def error_response(error: GorgonError, headers: dict[str, str] | None = None) -> Response:
    return json_response(
        error_body(error), status=error.http_status, headers={**(headers or {}), **error_headers(error)}
    )


def message_error(fields: dict[str, Any]) -> GorgonError:
    """An `error` message of a generation."""
    return known_error(
        str(fields.get("code")), str(fields.get("message")), retry_after_seconds=fields.get("retry_after_seconds")
    )


def parse(model: type[M], body: bytes) -> M:
    """A request's body. Raises `ParameterError` in one line that names the field."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _parameter_error(error) from None


def _parameter_error(error: ValidationError) -> ParameterError:
    first = error.errors(include_url=False, include_input=False)[0]
    kind = first["type"]
    message = " ".join(first["msg"].removeprefix("Value error, ").split())
    if kind == "json_invalid":
        message = f"the body is not JSON in UTF-8: {message.removeprefix('Invalid JSON: ')}"
        return ParameterError(message, param=None, reason="invalid_json")
    path = list(first["loc"])
    if kind in (UNSUPPORTED, INCONSISTENT):
        param = _path([*path, first["ctx"]["param"]])
        reason = UNSUPPORTED if kind == UNSUPPORTED else "invalid_value"
        return ParameterError(f"{param}: {message}", param=param, reason=reason)
    for index, part in enumerate(path):
        if part in _SHAPES and len(path) > index + 1:
            path, message, kind = path[: index + 1], _SHAPES[str(part)], "invalid_type"
            break
    param = _path(path)
    reason = _CODES.get(kind, "invalid_type" if kind.endswith("_type") else "invalid_value")
    if kind == "extra_forbidden":
        message = "there is no such parameter"
    return ParameterError(f"{param}: {message}" if param else message, param=param or None, reason=reason)


def _path(parts: list[int | str]) -> str:
    """`messages[0].role`"""
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text[:_MAX_SHOWN]
