"""The fake engine's routes that depend on the request alone, and how it reads bodies and says errors."""

from typing import Any, TypeVar

import orjson
from aiohttp import web
from pydantic import BaseModel, ValidationError

from gorgon_protocol.errors import BadRequestError, GorgonError
from gorgon_protocol.messages import HeadsInfo
from gorgon_protocol.requests import DetokenizeRequest, EngineRequest, ReloadHeadsRequest, TokenizeRequest
from support.fake_answer import VOCAB_SIZE, prompt_tokens, text_tokens, token_text

R = TypeVar("R", bound=BaseModel)


async def tokenize(http: web.Request) -> web.Response:
    request = await parse(http, TokenizeRequest)
    if request.text is not None:
        ids = text_tokens(request.text)
    else:
        ids = prompt_tokens(EngineRequest(messages=request.messages, request_id="tokenize", seed=0))
    return web.json_response({"token_ids": ids, "tokens": [token_text(token) for token in ids], "num_tokens": len(ids)})


async def detokenize(http: web.Request) -> web.Response:
    request = await parse(http, DetokenizeRequest)
    bad = next((token for token in request.token_ids if token >= VOCAB_SIZE), None)
    if bad is not None:
        raise BadRequestError(f"token {bad} is not in the vocabulary of {VOCAB_SIZE} tokens")
    return web.json_response({"text": "".join(map(token_text, request.token_ids))})


async def heads(http: web.Request) -> web.Response:
    return web.Response(body=HeadsInfo(current=None).model_dump_json(), content_type="application/json")


async def reload_heads(http: web.Request) -> web.Response:
    await parse(http, ReloadHeadsRequest)
    return await heads(http)


async def live(http: web.Request) -> web.Response:
    return web.json_response({"state": "live"})


async def parse(http: web.Request, kind: type[R]) -> R:
    """The body. Raises `BadRequestError` that names the field."""
    try:
        return kind.model_validate_json(await http.read())
    except ValidationError as error:
        first = error.errors()[0]
        raise BadRequestError(f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}") from error


def error_response(error: GorgonError) -> web.Response:
    body = {"code": error.code, "message": str(error), "retry_after_seconds": error.retry_after_seconds}
    headers = {}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_seconds)))
    return web.json_response({"error": body}, status=error.http_status, headers=headers)


def encode(message: dict[str, Any]) -> bytes:
    """A line of a stream."""
    return orjson.dumps(message, option=orjson.OPT_APPEND_NEWLINE)
