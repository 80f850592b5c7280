"""One generation, however many engines it takes."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import orjson

from gorgon_gateway.callers import Caller
from gorgon_gateway.engine_client import EngineLost, RelayedMessage, known_error
from gorgon_gateway.engines import Engine, LoadingError
from gorgon_gateway.progress import Progress
from gorgon_gateway.visit import Attempts, Visit
from gorgon_protocol.cancellation import heed_cancellation
from gorgon_protocol.errors import (
    BadRequestError,
    CapacityError,
    DeadlineError,
    GorgonError,
    QueueFullError,
    UnavailableError,
)
from gorgon_protocol.requests import GenerateRequest

if TYPE_CHECKING:
    from gorgon_gateway.relay import Observer, Relay

_SEED_BITS: Final = 53  # what every JSON reader, JavaScript's too, can hold
_ASK_ELSEWHERE: Final = (UnavailableError, QueueFullError, CapacityError)
_LOADING_POLL_SECONDS: Final = 0.5
_QUEUE_POLL_SECONDS: Final = 0.25
_TOKENIZE_SECONDS: Final = 1.0


class Generation:
    """Iterate over it once, and close it (`contextlib.aclosing`).

    It raises `GorgonError` before the first message where nothing could start; afterwards it gives exactly one
    `finished` or `error` message, the last. Closing it before that cancels at the engine.
    """

    def __init__(
        self,
        relay: "Relay",
        request: GenerateRequest,
        caller: Caller,
        *,
        request_id: str,
        headers: Mapping[str, str],
        patience_seconds: float,
    ) -> None:
        """As `Relay.generate` says."""
        self.request = request
        self.caller = caller
        self.request_id = request_id
        self.seed = request.seed if request.seed is not None else secrets.randbits(_SEED_BITS)
        self.progress = Progress(request.generated_token_ids)
        self.engine: Engine | None = None  # the current or last one
        self._relay = relay
        self._settings = relay.settings
        self._headers = headers
        self._loop = asyncio.get_running_loop()
        self._started_at = self._loop.time()
        self._deadline = self._started_at + relay.settings.request_seconds
        self._patient_until = self._started_at + patience_seconds
        self._queue_until: float | None = None
        self._messages = self._run()
        self._observer: Observer | None = None
        self._fields: dict[str, Any] = {}
        self._attempts = Attempts(relay.engines, request.model)
        self._visit: Visit | None = None
        # What the client knows
        self._has_begun = False
        self._knows_seed = False
        self._loading_shown: float | None = -1.0
        # How it ends
        self._is_over = False
        self._is_ending = False
        self._ending: GorgonError | None = None  # while ending; None: cancelled by the client
        self._reason = "abandoned"
        self._num_prompt_tokens = 0

    @property
    def num_retries(self) -> int:
        """Times that another engine was asked before anything had come."""
        return self._attempts.num_retries

    def __aiter__(self) -> AsyncIterator[RelayedMessage]:
        return self._messages

    async def aclose(self) -> None:
        """End it, cancelling what still runs. Harmless at any time."""
        await self._messages.aclose()

    def cancel(self) -> None:
        """It finishes with reason `cancelled`."""
        self._break_off(None)

    def end(self, error: GorgonError) -> None:
        """It ends with this error."""
        self._break_off(error)

    def check(self, now: float) -> None:
        """Break off from an engine that hangs; end what runs for too long. now: of the loop's clock."""
        if now > self._deadline:
            self.end(DeadlineError(f"the generation took longer than {self._settings.request_seconds:g} s"))
            return
        visit = self._visit
        if visit is None or (since := visit.silent_since) is None:
            return
        patience = self._settings.silence_seconds
        if not visit.has_tokens and self._relay.engines.is_responsive(visit.engine):
            patience += self._settings.queue_seconds  # it waits for a slot
        if now - since > patience:
            visit.hang()

    async def _run(self) -> AsyncGenerator[RelayedMessage, None]:
        observer = self._observer = self._relay.begin(self)
        lease = None
        try:
            self._fields = self._request_fields()
            max_tokens = self._fields.get("max_tokens", self._settings.default_max_tokens)
            lease = await self._relay.limiter.admit(self.caller, max_tokens=max_tokens)
            heed_cancellation()
            while not self._is_over:
                try:
                    messages = await self._next()
                except GorgonError as error:
                    if not self._has_begun:
                        raise
                    messages = [self._error(error)]
                for message in messages:
                    self._has_begun = True
                    yield message
        except GorgonError as error:
            self._reason = error.code
            raise
        finally:
            self._leave()
            try:
                if lease is not None:
                    await lease.release(self.progress.num_received)
            finally:
                self._relay.ended(self)
                observer.ended(self, reason=self._reason, num_prompt_tokens=self._num_prompt_tokens)

    async def _next(self) -> list[RelayedMessage]:
        """What the client is told next; that may be nothing yet. Raises `GorgonError` once there is no way to go on."""
        if self._is_ending:
            return [await self._ended()]
        try:
            if self._visit is None:
                await self._open()
                return []
            messages = await self._visit.read()
        except EngineLost as error:
            return [] if self._is_ending else self._lose(error)
        except LoadingError as error:
            if self._loop.time() >= self._patient_until:
                raise
            return await self._wait_for_loading(error)
        return self._passed_on(messages)

    # Finding an engine

    async def _open(self) -> None:
        """One attempt to start at one engine. Raises `EngineLost`, or `GorgonError` where there is none to try."""
        try:
            self.engine = self._attempts.choose()
        except UnavailableError as error:
            await self._wait_for_queue(error)
            return
        visit = self._visit = Visit(self._relay.engines, self.engine)
        body = orjson.dumps(self._fields | {"generated_token_ids": self.progress.token_ids})
        try:
            await visit.open(body, self._headers)
        except _ASK_ELSEWHERE as error:
            self._leave()
            self._attempts.refused(self.engine, error)
        else:
            self._attempts.begun(self.engine)

    async def _wait_for_queue(self, error: UnavailableError) -> None:
        """Wait a little where full queues alone are in the way of going on. Raises what the client is to know."""
        if not self._is_interrupted:
            if isinstance(error, LoadingError) and self._loop.time() < self._patient_until:
                self._attempts.forget_refusals()
                raise error
            raise self._attempts.refusal or error
        now = self._loop.time()
        if self._queue_until is None:
            self._queue_until = now + self._settings.resume_queue_seconds
        if not self._attempts.met_full_queue or now > self._queue_until:
            raise UnavailableError(
                "the engine was lost in the middle of the answer and no other can go on: ask again with the same seed "
                "and the tokens so far as generated_token_ids"
            )
        self._attempts.forget_refusals()
        await asyncio.sleep(_QUEUE_POLL_SECONDS)

    async def _wait_for_loading(self, error: LoadingError) -> list[RelayedMessage]:
        await asyncio.sleep(_LOADING_POLL_SECONDS if self._has_begun else 0.0)
        if self._loading_shown == error.progress:
            return []
        self._loading_shown = error.progress
        return [self._status("loading", progress=error.progress)]

    def _lose(self, error: EngineLost) -> list[RelayedMessage]:
        """Give the engine up. Another one is tried next."""
        visit = self._visit
        assert visit is not None, "only a visit raises it"
        self._leave()
        self._attempts.lost(visit, error)
        if not visit.has_tokens:
            return []
        if self.progress.num_resumptions >= self._settings.max_resumptions:
            raise UnavailableError(f"the answer was interrupted {self.progress.num_resumptions + 1} times")
        self.progress.interrupted()
        self._attempts.forget_refusals()
        self._queue_until = None
        return [self._status("resuming")]

    @property
    def _is_interrupted(self) -> bool:
        return self.progress.num_received > 0

    # What an engine says

    def _passed_on(self, messages: list[RelayedMessage]) -> list[RelayedMessage]:
        """Those that the client gets, counted."""
        observer, visit = self._observer, self._visit
        assert observer is not None, "it has begun"
        assert visit is not None, "somebody said it"
        now = self._loop.time()
        passed: list[RelayedMessage] = []
        for message in messages:
            fields = message.fields
            kind = fields["type"]
            if kind == "token":
                if not self._knows_seed:
                    passed.append(self._status("prefill", progress=1.0))
                visit.has_tokens = True
                before = self.progress.last_token_at
                self.progress.take(fields, now)
                if before is not None:
                    observer.between_messages(now - before, len(fields["token_ids"]))
                passed.append(message)
            elif kind == "status":
                if not self._is_interrupted:
                    self._knows_seed = True
                    passed.append(RelayedMessage.of({**fields, "request_id": self.request_id, "seed": self.seed}))
            elif kind == "finished":
                passed.append(self._finished(message))
                break
            else:
                error = known_error(str(fields.get("code")), str(fields.get("message")))
                if isinstance(error, _ASK_ELSEWHERE):
                    visit.fail(EngineLost(f"the engine gave up: {error}"))
                else:
                    self._is_over = True
                    self._reason = str(fields.get("code"))
                    passed.append(RelayedMessage.of({**fields, "request_id": self.request_id}))
                break
        return passed

    def _finished(self, message: RelayedMessage) -> RelayedMessage:
        fields = message.fields
        self._is_over = True
        self._reason = fields["finish_reason"]
        self._num_prompt_tokens = fields["usage"]["prompt_tokens"]
        if self.progress.num_resumptions:
            fields = self.progress.finished(fields, self._started_at)
        elif fields.get("request_id") == self.request_id and fields.get("seed") == self.seed:
            return message
        return RelayedMessage.of({**fields, "request_id": self.request_id, "seed": self.seed})

    def _status(self, state: str, *, progress: float | None = None) -> RelayedMessage:
        self._knows_seed = True
        return RelayedMessage.of(
            {
                "type": "status",
                "state": state,
                "position": None,
                "progress": progress,
                "request_id": self.request_id,
                "seed": self.seed,
            }
        )

    def _error(self, error: GorgonError) -> RelayedMessage:
        self._is_over = True
        self._reason = error.code
        return RelayedMessage.of(
            {
                "type": "error",
                "code": error.code,
                "message": str(error),
                "retry_after_seconds": error.retry_after_seconds,
                "request_id": self.request_id,
            }
        )

    # Ending early

    def _break_off(self, error: GorgonError | None) -> None:
        if not self._is_ending and not self._is_over:
            self._is_ending = True
            self._ending = error
            if self._visit is not None:
                self._visit.leave()  # who waits for it is woken

    def _leave(self) -> None:
        """The engine, which cancels there what still runs."""
        if self._visit is not None:
            self._visit.leave()
            self._visit = None

    async def _ended(self) -> RelayedMessage:
        """The last message of a generation that did not end by itself."""
        if self._ending is not None:
            raise self._ending
        self._is_over = True
        self._reason = "cancelled"
        self._num_prompt_tokens = await self._count_prompt()
        fields = self.progress.cancelled(self._started_at, num_prompt_tokens=self._num_prompt_tokens)
        return RelayedMessage.of({**fields, "request_id": self.request_id, "seed": self.seed})

    async def _count_prompt(self) -> int:
        """Its tokens: an engine that is cut off does not say. 0 where none can be asked."""
        request = self.request
        if request.prompt_token_ids is not None:
            return len(request.prompt_token_ids)
        if self.engine is None:
            return 0
        if request.messages is not None:
            body: dict[str, Any] = {"messages": [message.model_dump() for message in request.messages]}
        else:
            body = {"text": request.prompt}
        try:
            async with asyncio.timeout(_TOKENIZE_SECONDS):
                answer = await self._relay.engines.client.call(self.engine.url, "/tokenize", orjson.dumps(body))
        except (EngineLost, GorgonError, TimeoutError):
            return 0
        count = answer.get("num_tokens")
        return count if isinstance(count, int) else 0

    def _request_fields(self) -> dict[str, Any]:
        """All that an engine is told but the tokens so far."""
        cap = self._settings.max_tokens
        asked = self.request.max_tokens
        if cap is not None and asked is not None and asked > cap:
            raise BadRequestError(f"max_tokens is {asked}: this gateway gives at most {cap}")
        fields = self.request.model_dump(
            exclude_defaults=True, exclude={"type", "model", "request_id", "generated_token_ids"}
        )
        fields |= {
            "request_id": self.request_id,
            "seed": self.seed,
            "client": self.caller.id[:128],
            "timeout_seconds": self._settings.queue_seconds,
        }
        if cap is not None and asked is None:
            fields["max_tokens"] = cap
        return fields
