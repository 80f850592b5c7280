"""What the gateway says to engines, over HTTP: one session for all of them.

A generation is one `POST /generate` whose response is read line by line; closing it cancels the generation.
"""

import asyncio
from collections.abc import Iterable
from typing import Any, Final, NamedTuple, Self

import aiohttp
import orjson

from gorgon_protocol import errors
from gorgon_protocol.errors import GorgonError

_MAX_LINE_BYTES: Final = 16 << 20
_MAX_JSON_BYTES: Final = 64 << 20
_READ_BYTES: Final = 1 << 18
_JSON_SECONDS: Final = 30.0  # to tokenise a long prompt
_MESSAGE_TYPES: Final = frozenset({"token", "status", "finished", "error"})
_BY_CODE: Final = {
    kind.code: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, GorgonError) and not name.startswith("_") and "code" in vars(kind)
}


class EngineLost(Exception):
    """An engine cannot be reached, broke off or says what makes no sense: another one may do."""

    def __init__(self, message: str, *, is_refused: bool = False) -> None:
        super().__init__(message)
        self.is_refused = is_refused  # nothing listens there


class RelayedMessage(NamedTuple):
    """One message of a generation: as it came, and parsed."""

    raw: bytes  # JSON in UTF-8, without a line end
    fields: dict[str, Any]

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Self:
        return cls(orjson.dumps(fields), fields)


class EngineStream:
    """The response of one `POST /generate`. For one reader."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self._content = response.content
        self._now = asyncio.get_running_loop().time
        self._tail = b""
        self._failure: EngineLost | None = None
        self.last_byte_at = self._now()  # of the loop's clock

    async def read(self) -> list[RelayedMessage]:
        """All messages that have come, at least one. Raises `EngineLost`; every message before that was returned."""
        while self._failure is None:
            try:
                data = await self._content.readany()
            except (aiohttp.ClientError, OSError) as error:
                raise EngineLost(f"the engine broke off: {_describe(error)}") from None
            if not data:
                raise EngineLost("the engine ended its stream without a last message")
            self.last_byte_at = self._now()
            lines = (self._tail + data).split(b"\n")
            self._tail = lines.pop()
            if len(self._tail) > _MAX_LINE_BYTES:
                self._failure = EngineLost(f"the engine sent a line of more than {_MAX_LINE_BYTES} bytes")
            if messages := self._parse(lines):
                return messages
        raise self._failure

    def close(self) -> None:
        """Cancel the generation, where it runs: the engine sees the connection end. Wakes a waiting `read`."""
        if self._content.is_eof():
            self._response.release()
        else:
            self._response.close()

    def _parse(self, lines: Iterable[bytes]) -> list[RelayedMessage]:
        messages: list[RelayedMessage] = []
        for line in lines:
            if not line:
                continue
            try:
                fields = orjson.loads(line)
            except orjson.JSONDecodeError:
                fields = None
            if not _is_message(fields):
                self._failure = EngineLost(f"the engine sent what is no message: {line[:80]!r}")
                break
            messages.append(RelayedMessage(line, fields))
        return messages


def _is_message(fields: Any) -> bool:
    if type(fields) is not dict:
        return False
    kind = fields.get("type")
    if kind == "token":
        return (
            type(fields.get("token_ids")) is list
            and type(fields.get("text")) is str
            and type(fields.get("num_accepted")) is int
            and type(fields.get("num_nodes")) is int
        )
    return kind in _MESSAGE_TYPES


class EngineClient:
    """Speaks to every engine. `start` it on the event loop that it is to be used on."""

    def __init__(self, *, secret: str | None, connect_seconds: float) -> None:
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if secret is not None:
            self._headers["Authorization"] = f"Bearer {secret}"
        self._connect_seconds = connect_seconds
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        assert self._session is None, "started twice"
        seconds = self._connect_seconds
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=10),
            # How long an engine may be silent is the relay's to say: a timer a read would cost more than the read.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=seconds),
            headers=self._headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            read_bufsize=_READ_BYTES,
        )

    async def close(self) -> None:
        """Harmless when it was not started."""
        if self._session is not None:
            await self._session.close()

    async def generate(self, url: str, body: bytes, headers: dict[str, str] | None = None) -> EngineStream:
        """Start a generation. Raises `EngineLost`, or the engine's refusal as the `GorgonError` that it is."""
        response = await self._send("POST", f"{url}/generate", body, headers=headers)
        if response.status == 200:
            return EngineStream(response)
        try:
            async with asyncio.timeout(_JSON_SECONDS):
                _, answer = await _read_json(response)
        except TimeoutError:
            raise EngineLost("the engine took too long to say why it refuses") from None
        finally:
            response.release()
        raise _refusal(response.status, answer)

    async def ask(
        self, method: str, url: str, body: bytes | None = None, *, seconds: float = _JSON_SECONDS
    ) -> tuple[int, dict[str, Any]]:
        """Status and JSON of a short answer, whatever the status. Raises `EngineLost`."""
        try:
            async with asyncio.timeout(seconds):
                response = await self._send(method, url, body)
                try:
                    return await _read_json(response)
                finally:
                    response.release()
        except TimeoutError:
            raise EngineLost(f"the engine did not answer within {seconds:g} s") from None

    async def call(self, url: str, path: str, body: bytes) -> dict[str, Any]:
        """The answer to a short POST. Raises `EngineLost`, or the engine's refusal as the `GorgonError` that it is."""
        status, answer = await self.ask("POST", url + path, body)
        if status != 200:
            raise _refusal(status, answer)
        return answer

    async def _send(
        self, method: str, url: str, body: bytes | None, *, headers: dict[str, str] | None = None
    ) -> aiohttp.ClientResponse:
        assert self._session is not None, "not started"
        try:
            return await self._session.request(method, url, data=body, headers=headers, allow_redirects=False)
        except aiohttp.ClientConnectorError as error:
            raise EngineLost(f"the engine cannot be reached: {_describe(error)}", is_refused=True) from None
        except aiohttp.ConnectionTimeoutError:
            raise EngineLost("the engine cannot be reached: it accepts no connection", is_refused=True) from None
        except (aiohttp.ClientError, OSError) as error:
            raise EngineLost(f"the engine did not answer: {_describe(error)}") from None


async def _read_json(response: aiohttp.ClientResponse) -> tuple[int, dict[str, Any]]:
    parts: list[bytes] = []
    size = 0
    try:
        while part := await response.content.readany():
            parts.append(part)
            size += len(part)
            if size > _MAX_JSON_BYTES:
                response.close()
                raise EngineLost(f"the engine answered with more than {_MAX_JSON_BYTES} bytes")
        answer = orjson.loads(b"".join(parts))
    except (aiohttp.ClientError, OSError) as error:
        raise EngineLost(f"the engine broke off: {_describe(error)}") from None
    except orjson.JSONDecodeError:
        answer = None
    if not isinstance(answer, dict):
        raise EngineLost(f"the engine answered {response.status} with what is no JSON object")
    return response.status, answer


def _refusal(status: int, answer: dict[str, Any]) -> Exception:
    """What an answer other than 200 means to the one that asked."""
    error = answer.get("error")
    if status in (401, 403):
        return EngineLost("the engine refuses this gateway: give both the same secret file")
    if not isinstance(error, dict) or not isinstance(error.get("code"), str) or status < 400:
        return EngineLost(f"the engine answered {status} without an error of ours")
    retry_after = error.get("retry_after_seconds")
    return known_error(
        error["code"],
        str(error.get("message", "")),
        retry_after_seconds=float(retry_after) if isinstance(retry_after, int | float) else None,
    )


def known_error(code: str, message: str, *, retry_after_seconds: float | None = None) -> GorgonError:
    """An engine's error as the exception that it was there; one of an unknown code is `internal`."""
    error = _BY_CODE.get(code, GorgonError)(message)
    if retry_after_seconds is not None:
        error.retry_after_seconds = retry_after_seconds
    return error


def _describe(error: BaseException) -> str:
    return str(error) or type(error).__name__
