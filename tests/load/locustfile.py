"""Users of all three interfaces, for Locust.

    locust -f tests/load/locustfile.py --host http://127.0.0.1:8100 \
        --headless --users 50 --spawn-rate 10 --run-time 2m --only-summary --html report.html --csv report

Without `--headless` the page at http://localhost:8089 starts it. `--class-picker` or names at the end of the command
(`RestUser`, `SseUser`, `WebSocketUser`) choose who takes part; `--api-key-file` where the gateway asks for keys.

Beside the row of each interface (whole requests in milliseconds; size = tokens) there is one for each of these:

    ttft        milliseconds from asking to the first text
    itl         milliseconds a token after that, one value a request
    tokens/s    of one request from its first token to its last, in the column of milliseconds
"""

import http.client
import json
import random
import socket
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import websocket
from locust import User, between, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment

_TIMEOUT_SECONDS = 120.0
_QUESTIONS = Path(__file__).parents[2] / "benchmarks" / "data" / "mt_bench.jsonl"


@events.init_command_line_parser.add_listener
def _add_options(parser: LocustArgumentParser) -> None:
    parser.add_argument("--max-tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument(
        "--prompts", type=Path, default=_QUESTIONS, help="JSON lines with `turns`, as MT-bench has them"
    )
    parser.add_argument("--api-key-file", type=Path, default=None, help="holds the key to send")


@events.init.add_listener
def _read_prompts(environment: Environment, **_: Any) -> None:
    options = _options(environment)
    lines = options.prompts.read_text(encoding="utf-8").splitlines()
    options.questions = [json.loads(line)["turns"][0] for line in lines]
    options.headers = {}
    if options.api_key_file is not None:
        options.headers["Authorization"] = f"Bearer {options.api_key_file.read_text().strip()}"


def _options(environment: Environment) -> Namespace:
    assert environment.parsed_options is not None
    return environment.parsed_options


class GenerationError(Exception):
    """The server's own words for what went wrong."""


class Recorder:
    """Times one generation and tells Locust."""

    def __init__(self, environment: Environment, kind: str, name: str) -> None:
        self._environment = environment
        self._kind = kind
        self._name = name
        self._begun = time.perf_counter()
        self._first: float | None = None
        self._last = self._begun

    def token(self) -> None:
        """Something of the answer has come."""
        self._last = time.perf_counter()
        self._first = self._first or self._last

    def end(self, num_tokens: int, error: Exception | None = None) -> None:
        self._fire(self._kind, (time.perf_counter() - self._begun) * 1e3, num_tokens, error)
        if error is not None or self._first is None:
            return
        self._fire("ttft", (self._first - self._begun) * 1e3)
        decode_seconds = self._last - self._first
        if num_tokens > 1 and decode_seconds > 0.0:
            self._fire("itl", decode_seconds / (num_tokens - 1) * 1e3)
            self._fire("tokens/s", (num_tokens - 1) / decode_seconds)

    def _fire(self, kind: str, value: float, size: int = 0, error: Exception | None = None) -> None:
        self._environment.events.request.fire(
            request_type=kind, name=self._name, response_time=value, response_length=size, exception=error, context={}
        )


class _Generating(User):
    """One answer after another; what its class does with a question is `ask`."""

    abstract = True
    kind: str
    path: str
    wait_time = between(0.1, 1.0)

    @task
    def generate(self) -> None:
        options = _options(self.environment)
        recorder = Recorder(self.environment, self.kind, self.path)
        question = random.choice(options.questions)
        fields = {"max_tokens": options.max_tokens, "temperature": options.temperature}
        try:
            num_tokens = self.ask([{"role": "user", "content": question}], fields, recorder)
        except (GenerationError, OSError, http.client.HTTPException, websocket.WebSocketException) as error:
            recorder.end(0, error)
        else:
            recorder.end(num_tokens)

    def ask(self, messages: list[dict[str, str]], fields: dict[str, Any], recorder: Recorder) -> int:
        """The answer's number of tokens. Raises `GenerationError` for what the server refuses."""
        raise NotImplementedError

    def post(self, payload: dict[str, Any]) -> http.client.HTTPResponse:
        """A response of status 200, not read yet; its connection ends with it."""
        url = urlsplit(self.host or "")
        connection = http.client.HTTPConnection(url.hostname or "127.0.0.1", url.port, timeout=_TIMEOUT_SECONDS)
        headers = {"Content-Type": "application/json", "Connection": "close", **_options(self.environment).headers}
        connection.request("POST", self.path, json.dumps(payload), headers)
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            with response:
                raise GenerationError(f"{response.status}: {_message(response.read())}")
        return response


class RestUser(_Generating):
    """Whole answers, so no first token and no latency between tokens."""

    kind = "REST"
    path = "/generate"

    def ask(self, messages: list[dict[str, str]], fields: dict[str, Any], recorder: Recorder) -> int:
        with self.post({"messages": messages, **fields}) as response:
            return int(json.load(response)["usage"]["completion_tokens"])


class SseUser(_Generating):
    """OpenAI's streamed chat completions."""

    kind = "SSE"
    path = "/v1/chat/completions"
    model: str | None = None

    def on_start(self) -> None:
        url = urlsplit(self.host or "")
        connection = http.client.HTTPConnection(url.hostname or "127.0.0.1", url.port, timeout=_TIMEOUT_SECONDS)
        connection.request("GET", "/v1/models", headers=_options(self.environment).headers)
        with connection.getresponse() as response:
            self.model = json.load(response)["data"][0]["id"]
        connection.close()

    def ask(self, messages: list[dict[str, str]], fields: dict[str, Any], recorder: Recorder) -> int:
        streamed = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        num_tokens = 0
        with self.post({"messages": messages, **fields, **streamed}) as response:
            for chunk in _events(response):
                if "error" in chunk:
                    raise GenerationError(chunk["error"]["message"])
                if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                    recorder.token()
                if chunk.get("usage"):
                    num_tokens = chunk["usage"]["completion_tokens"]
        return num_tokens


class WebSocketUser(_Generating):
    """`/generate_stream`; one socket for all answers of a user."""

    kind = "WebSocket"
    path = "/generate_stream"
    _socket: websocket.WebSocket | None = None

    def ask(self, messages: list[dict[str, str]], fields: dict[str, Any], recorder: Recorder) -> int:
        if self._socket is None:
            self._socket = self._connect()
        try:
            self._socket.send(json.dumps({"messages": messages, **fields}))
            while True:
                message = json.loads(self._socket.recv())
                match message["type"]:
                    case "token":
                        recorder.token()
                    case "finished":
                        return int(message["usage"]["completion_tokens"])
                    case "error":
                        raise GenerationError(f"{message['code']}: {message['message']}")
        except (OSError, ValueError, websocket.WebSocketException):
            self.on_stop()  # the next one gets a new socket
            raise

    def _connect(self) -> websocket.WebSocket:
        url = (self.host or "").replace("http", "ws", 1) + self.path
        headers = _options(self.environment).headers
        nodelay = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]
        # A browser's Origin is checked by the gateway; this is none.
        return websocket.create_connection(
            url, timeout=_TIMEOUT_SECONDS, header=headers, suppress_origin=True, sockopt=nodelay
        )

    def on_stop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The data of server-sent events, up to [DONE]."""
    while line := response.readline():
        if line.startswith(b"data: "):
            data = line.removeprefix(b"data: ").strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)
    raise GenerationError("the stream ended without [DONE]")


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
