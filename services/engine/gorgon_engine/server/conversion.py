"""Between the wire and the engine: requests in, messages out.

A message is written straight into JSON: a model instance a message would cost more than everything else that the
service does for a token. The tests hold every line against `gorgon_protocol.messages`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from gorgon_protocol.errors import BadRequestError, GorgonError
from gorgon_protocol.messages import ErrorMessage, FinishedMessage, GenerationMetrics
from gorgon_protocol.requests import EngineRequest, TokenizeRequest

if TYPE_CHECKING:
    from gorgon_engine.engine import Engine
    from gorgon_engine.events import FinishedEvent, StatusEvent, TokenEvent
    from gorgon_engine.logprobs import TokenLogprobs
    from gorgon_engine.outcome import TreeTrace
    from gorgon_engine.sequence import Request

_PROBABILITY_DIGITS = 5
_SECONDS_DIGITS = 7
_PART_CHARACTER = "\ufffd"


def to_engine_request(engine: "Engine", wire: EngineRequest) -> "Request":
    """What the engine runs. Tokenises: not for the event loop. Raises `BadRequestError`, `ContextLengthError`."""
    from gorgon_engine.acceptance import AcceptanceRule
    from gorgon_engine.sampling import SamplingParams
    from gorgon_engine.sequence import SpeculationParams

    sampling = SamplingParams(
        max_tokens=wire.max_tokens,
        temperature=wire.temperature,
        top_p=wire.top_p,
        top_k=wire.top_k,
        min_p=wire.min_p,
        repetition_penalty=wire.repetition_penalty,
        presence_penalty=wire.presence_penalty,
        frequency_penalty=wire.frequency_penalty,
        logit_bias={int(token): bias for token, bias in wire.logit_bias.items()},
        seed=wire.seed,
        stop=tuple(wire.stop),
        stop_token_ids=tuple(wire.stop_token_ids),
        ignore_eos=wire.ignore_eos,
        logprobs=wire.logprobs,
    )
    speculation = SpeculationParams(
        enabled=wire.speculation.enabled,
        max_nodes=wire.speculation.max_nodes,
        acceptance=AcceptanceRule(wire.speculation.acceptance),
    )
    prompt: Any
    if wire.messages is not None:
        prompt = [{"role": message.role, "content": message.content} for message in wire.messages]
    else:
        prompt = wire.prompt if wire.prompt is not None else wire.prompt_token_ids
    return engine.request(
        prompt,
        sampling,
        speculation,
        trace=wire.tree_debug,
        generated=tuple(wire.generated_token_ids),
        client=wire.client,
        timeout_seconds=wire.timeout_seconds,
    )


def tokenize(engine: "Engine", wire: TokenizeRequest) -> list[int]:
    """Raises `BadRequestError`."""
    if wire.messages is not None:
        return engine.tokenizer.encode_chat([{"role": m.role, "content": m.content} for m in wire.messages])
    assert wire.text is not None, "the wire's validation lets one of the two through"
    return engine.tokenizer.encode(wire.text, add_special_tokens=wire.add_special_tokens)


def detokenize(engine: "Engine", token_ids: list[int]) -> str:
    """Raises `BadRequestError` for ids outside the vocabulary."""
    size = engine.backbone.config.vocab_size
    bad = next((t for t in token_ids if t >= size), None)
    if bad is not None:
        raise BadRequestError(f"token_ids holds {bad}: the vocabulary has {size} tokens")
    return engine.tokenizer.decode(token_ids)


class TokenTexts:
    """Each token as people see it, worked out once."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        """token_bytes: `Tokenizer.token_bytes`."""
        self._token_bytes = token_bytes
        self._known: dict[int, str] = {}

    def __call__(self, token_id: int) -> str:
        text = self._known.get(token_id)
        if text is None:
            text = self._known[token_id] = self._token_bytes(token_id).decode("utf-8", errors="replace")
        return text

    def fields(self, token_id: int) -> dict[str, Any]:
        """`token_id` and `token`, and `bytes` where the text does not tell them."""
        text = self(token_id)
        fields: dict[str, Any] = {"token_id": token_id, "token": text}
        if _PART_CHARACTER in text:
            fields["bytes"] = list(self._token_bytes(token_id))
        return fields


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a request has been decoded up to a step, beside the engine's own plain decoding."""

    tokens_per_second: float | None  # from the first token to here
    plain_tokens_per_second: float | None  # of a stream at this step's batch size
    speedup: float | None  # over plain decoding at the batch sizes that there were


@dataclass(slots=True)
class TokenChunk:
    """The tokens of one step; of several, where the reader was slower than the model."""

    token_ids: list[int]
    pieces: list[str]
    num_accepted: int
    num_nodes: int
    logprobs: "list[TokenLogprobs] | None"
    last: "TokenEvent"
    speed: Speed

    @classmethod
    def of(cls, event: "TokenEvent", speed: Speed) -> "TokenChunk":
        return cls(event.token_ids, event.pieces, event.num_accepted, event.num_nodes, event.logprobs, event, speed)

    def merge(self, later: "TokenChunk") -> None:
        """Take in what follows: every token and its text; of the trees the last."""
        # The lists may be an event's own: never changed in place.
        self.token_ids = self.token_ids + later.token_ids
        self.pieces = self.pieces + later.pieces
        self.num_accepted += later.num_accepted
        self.num_nodes += later.num_nodes
        if later.logprobs is not None:
            self.logprobs = (self.logprobs or []) + later.logprobs
        self.last, self.speed = later.last, later.speed


class LineWriter:
    """Messages as lines of JSON, each with its newline."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def tokens(self, chunk: TokenChunk) -> bytes:
        fields: dict[str, Any] = {
            "type": "token",
            "text": "".join(chunk.pieces),
            "token_ids": chunk.token_ids,
            "pieces": chunk.pieces,
            "num_accepted": chunk.num_accepted,
            "num_nodes": chunk.num_nodes,
        }
        if chunk.logprobs is not None:
            fields["logprobs"] = [self._logprob(entry) for entry in chunk.logprobs]
        if chunk.last.trace is not None:
            fields["tree_debug"] = self._tree(chunk.last, chunk.last.trace, chunk.speed)
        return orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE)

    def status(self, event: "StatusEvent", *, request_id: str, seed: int) -> bytes:
        fields = {
            "type": "status",
            "state": event.state,
            "position": event.position,
            "progress": event.progress,
            "request_id": request_id,
            "seed": seed,
        }
        return orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE)

    def _logprob(self, entry: "TokenLogprobs") -> dict[str, Any]:
        fields = self._texts.fields
        return {
            **fields(entry.token),
            "logprob": entry.logprob,
            "top": [{**fields(token), "logprob": value} for token, value in entry.top],
        }

    def _tree(self, event: "TokenEvent", trace: "TreeTrace", speed: Speed) -> dict[str, Any]:
        seconds = event.seconds
        return {
            "candidates": [self._texts(token) for token in trace.tokens],
            "token_ids": trace.tokens,
            "accepted": trace.accepted,
            "parents": trace.parents,
            "depths": trace.depths,
            "probabilities": [round(p, _PROBABILITY_DIGITS) for p in trace.probabilities],
            "ranks": trace.ranks,
            "sources": trace.sources,
            "num_nodes": event.num_nodes,
            "speedup": speed.speedup,
            "tokens_per_second": speed.tokens_per_second,
            "plain_tokens_per_second": speed.plain_tokens_per_second,
            "step": event.step,
            "step_seconds": {
                "draft": round(seconds.draft, _SECONDS_DIGITS),
                "verify": round(seconds.verify, _SECONDS_DIGITS),
                "accept": round(seconds.accept, _SECONDS_DIGITS),
                "commit": round(seconds.commit, _SECONDS_DIGITS),
            },
            "batch_size": event.batch_size,
        }


def finished_message(event: "FinishedEvent", *, request_id: str, seed: int, heads: str | None) -> FinishedMessage:
    plain = event.plain_tokens_per_second
    rate = event.tokens_per_second
    return FinishedMessage(
        finish_reason=event.finish_reason.value,
        text=event.text,
        stop=event.stop,
        usage=event.usage,
        metrics=GenerationMetrics(
            speculative_decoding=event.metrics,
            tokens_per_second=rate,
            speedup=rate / plain if rate is not None and plain else None,
            queue_seconds=event.queue_seconds or 0.0,
            prefill_seconds=event.prefill_seconds,
            ttft_seconds=event.ttft_seconds,
            decode_seconds=event.decode_seconds,
            heads=heads,
        ),
        request_id=request_id,
        seed=seed,
    )


def error_message(error: GorgonError, *, request_id: str) -> ErrorMessage:
    return ErrorMessage(
        code=error.code,
        message=str(error),
        retry_after_seconds=error.retry_after_seconds,
        request_id=request_id,
    )


def terminal_line(message: FinishedMessage | ErrorMessage) -> bytes:
    return message.model_dump_json().encode() + b"\n"
