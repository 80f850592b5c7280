"""Users of all three interfaces, for Locust.

    locust -f tests/load/locustfile.py --host http://127.0.0.1:8100 \
        --headless --users 50 --spawn-rate 10 --run-time 2m --only-summary --html report.html --csv report

Without `--headless` the page at http://localhost:8089 starts it. `--class-picker` or names at the end of the command
(`RestUser`, `SseUser`, `WebSocketUser`) choose who takes part; `--api-key-file` where the gateway asks for keys.

Beside the row of each interface (whole answers in milliseconds; size = tokens) there is one for each of these:

    ttft        milliseconds from asking to the first text
    itl         milliseconds a token after that, one value an answer
    tokens/s    of one answer from its first token to its last, in the column of milliseconds
    refused     429 with the time to come back after, in milliseconds until it was said

Who is refused comes back when told, with the same question, until it is answered. So a refusal is no failure; what it
costs is in the answer's times, which begin when the question was asked for the first time. A 429 that does not say when
to come back is a failure, as everything else that is no answer.

Locust rounds percentiles to two digits and has them for one row at a time: `--answers FILE` gets each answer as a line
of JSON, an `Answer` (of this process, where Locust has several).
"""

import dataclasses
import http.client
import json
import random
import socket
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import websocket
from locust import User, between, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import STATE_RUNNING, STATE_SPAWNING

_TIMEOUT_SECONDS = 120.0
_QUESTIONS = Path(__file__).parents[2] / "benchmarks" / "data" / "mt_bench.jsonl"
_REFUSALS = ("queue_full", "rate_limit_exceeded")  # what a WebSocket calls 429


def _add_options(parser: LocustArgumentParser) -> None:
    parser.add_argument("--max-tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument(
        "--prompts", type=Path, default=_QUESTIONS, help="JSON lines with `turns`, as MT-bench has them"
    )
    parser.add_argument("--api-key-file", type=Path, default=None, help="holds the key to send")
    parser.add_argument("--answers", type=Path, default=None, help="write each answer here, as a line of JSON")


def _begin(environment: Environment, **_: Any) -> None:
    options = _options(environment)
    lines = options.prompts.read_text(encoding="utf-8").splitlines()
    options.questions = [json.loads(line)["turns"][0] for line in lines]
    options.headers = {}
    if options.api_key_file is not None:
        options.headers["Authorization"] = f"Bearer {options.api_key_file.read_text().strip()}"
    if options.answers is not None:
        options.answers.write_text("")


events.init_command_line_parser.add_listener(_add_options)
events.init.add_listener(_begin)


def _options(environment: Environment) -> Namespace:
    assert environment.parsed_options is not None
    return environment.parsed_options


class GenerationError(Exception):
    """The server's own words for what went wrong."""


class RefusedError(Exception):
    """Too much for now (429): ask again later."""

    def __init__(self, retry_after_seconds: float) -> None:
        super().__init__(f"come back after {retry_after_seconds} s")
        self.retry_after_seconds = retry_after_seconds


@dataclasses.dataclass(slots=True)
class Answer:
    """What came of one question. Times are of this process's monotonic clock, in seconds."""

    interface: str  # REST, SSE or WebSocket
    begun_at: float  # asked for the first time
    outcome: Literal["answered", "failed", "cut"] = "cut"  # cut: the run ended before
    ended_at: float | None = None
    num_refused: int = 0  # times that it was refused before
    num_tokens: int = 0
    ttft_seconds: float | None = None  # None where there is no stream
    itl_seconds: float | None = None  # its mean; None below two tokens, too
    error: str | None = None


class Recorder:
    """Times one answer and tells Locust."""

    def __init__(self, environment: Environment, interface: str, name: str) -> None:
        self.answer = Answer(interface, time.perf_counter())
        self._environment = environment
        self._name = name
        self._asked_at = self.answer.begun_at  # the last time
        self._first: float | None = None
        self._last = self.answer.begun_at

    def ask_again(self) -> None:
        self._asked_at = time.perf_counter()

    def refused(self) -> None:
        self.answer.num_refused += 1
        self._fire("refused", time.perf_counter() - self._asked_at)

    def token(self) -> None:
        """Something of the answer has come."""
        self._last = time.perf_counter()
        self._first = self._first or self._last

    def answered(self, num_tokens: int) -> None:
        answer = self.answer
        answer.outcome, answer.num_tokens, answer.ended_at = "answered", num_tokens, time.perf_counter()
        self._fire(answer.interface, answer.ended_at - answer.begun_at, num_tokens)
        if self._first is None:
            return
        answer.ttft_seconds = self._first - answer.begun_at
        self._fire("ttft", answer.ttft_seconds)
        decode_seconds = self._last - self._first
        if num_tokens > 1 and decode_seconds > 0.0:
            answer.itl_seconds = decode_seconds / (num_tokens - 1)
            self._fire("itl", answer.itl_seconds)
            self._fire("tokens/s", 1e-3 / answer.itl_seconds)

    def failed(self, error: Exception) -> None:
        answer = self.answer
        answer.outcome, answer.ended_at = "failed", time.perf_counter()
        answer.error = f"{type(error).__name__}: {error}"
        self._fire(answer.interface, answer.ended_at - answer.begun_at, error=error)

    def close(self) -> None:
        """Also of an answer that the end of the run has cut off."""
        path = _options(self._environment).answers
        if path is not None:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(self.answer)) + "\n")

    def _fire(self, kind: str, seconds: float, num_tokens: int = 0, error: Exception | None = None) -> None:
        self._environment.events.request.fire(
            request_type=kind, name=self._name, response_time=seconds * 1e3, response_length=num_tokens,
            exception=error, context={},
        )  # fmt: skip


class _Generating(User):
    """One answer after another; what its class does with a question is `ask`."""

    abstract = True
    kind: str
    path: str
    wait_time = between(0.1, 1.0)

    @task
    def generate(self) -> None:
        # Who waits when the run ends is killed, even if the wait is over in that moment: a question would be cut off.
        runner = self.environment.runner
        assert runner is not None
        if runner.state not in (STATE_SPAWNING, STATE_RUNNING):
            return
        options = _options(self.environment)
        recorder = Recorder(self.environment, self.kind, self.path)
        question = random.choice(options.questions)
        fields = {"max_tokens": options.max_tokens, "temperature": options.temperature}
        try:
            recorder.answered(self._ask_until_taken([{"role": "user", "content": question}], fields, recorder))
        except (
            GenerationError, OSError, http.client.HTTPException, websocket.WebSocketException,
            ValueError, LookupError,  # what the server says makes no sense
        ) as error:  # fmt: skip
            recorder.failed(error)
        finally:
            recorder.close()

    def _ask_until_taken(self, messages: list[dict[str, str]], fields: dict[str, Any], recorder: Recorder) -> int:
        while True:
            try:
                return self.ask(messages, fields, recorder)
            except RefusedError as refusal:
                recorder.refused()
                # gevent's sleep, as Locust has patched it. Not all that were refused together come back together.
                time.sleep(refusal.retry_after_seconds * random.uniform(1.0, 1.5))
                recorder.ask_again()

    def ask(self, messages: list[dict[str, str]], fields: dict[str, Any], recorder: Recorder) -> int:
        """The answer's number of tokens. Raises `RefusedError`, and `GenerationError` for whatever else is none."""
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
                retry_after = response.headers["Retry-After"]
                if response.status == http.HTTPStatus.TOO_MANY_REQUESTS and retry_after is not None:
                    raise RefusedError(float(retry_after))
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

    def ask(self, messages: list[dict[str, str]], fields: dict[str, Any], recorder: Recorder) -> int:
        self.model = self.model or self._first_model()
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

    def _first_model(self) -> str:
        url = urlsplit(self.host or "")
        connection = http.client.HTTPConnection(url.hostname or "127.0.0.1", url.port, timeout=_TIMEOUT_SECONDS)
        connection.request("GET", "/v1/models", headers={"Connection": "close", **_options(self.environment).headers})
        with connection.getresponse() as response:
            body = response.read()
        if response.status != http.HTTPStatus.OK:
            raise GenerationError(f"/v1/models: {response.status}: {_message(body)}")
        return str(json.loads(body)["data"][0]["id"])


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
                        if message["code"] in _REFUSALS and message.get("retry_after_seconds") is not None:
                            raise RefusedError(message["retry_after_seconds"])
                        raise GenerationError(f"{message['code']}: {message['message']}")
        except (OSError, ValueError, LookupError, websocket.WebSocketException):
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
