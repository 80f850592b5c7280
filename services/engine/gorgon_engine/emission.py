"""What a step's tokens mean for their sequence: how many of them count, the text that they release, its end.

The scheduler decides when; here is how an answer ends, the same whether its tokens come one by one, several a step, or
were said before.
"""

import time
from dataclasses import dataclass, replace

from gorgon_engine.events import FinishedEvent, TokenEvent
from gorgon_engine.logprobs import TokenLogprobs
from gorgon_engine.outcome import StepResult
from gorgon_engine.sequence import FinishReason, Sequence
from gorgon_protocol.metrics import Usage


@dataclass(frozen=True, slots=True)
class Ending:
    """Why an answer is over."""

    reason: FinishReason
    stop: str | int | None = None  # the stop string or token


CANCELLED = Ending(FinishReason.CANCELLED)


@dataclass(frozen=True, slots=True)
class Emitted:
    """One sequence's part of a step."""

    event: TokenEvent
    ending: Ending | None


def emit(
    sequence: Sequence, result: StepResult, row: int, *, capacity: int, batch_size: int, plain_rate: float | None
) -> Emitted:
    """Append a step's tokens to their sequence, up to the first that ends it.

    capacity: positions of a slot. batch_size: sequences that were decoding; plain_rate: tokens a second that plain
    decoding gives to each of so many, None where it is not known.
    """
    offered = result.tokens[row]
    kept, ending = _until_stop(sequence, offered, capacity)
    pieces: list[str] = []
    for token in kept:
        pieces.append(sequence.detokenizer.push([token]))
        if sequence.detokenizer.stopped is not None:
            ending = Ending(FinishReason.STOP, sequence.detokenizer.stopped)
            break
    kept = kept[: len(pieces)]
    sequence.output += kept
    first = sequence.first_token_at is None
    _count_time(sequence, plain_rate)
    if not first:
        sequence.metrics.record(num_accepted=len(kept) - 1, num_drafted=result.num_drafted[row])
    event = TokenEvent(
        request_id=sequence.request.id,
        token_ids=kept,
        pieces=pieces,
        num_accepted=0 if first else min(len(kept), len(offered) - 1),
        step=sequence.metrics.num_steps,
        num_nodes=result.num_drafted[row] + 1,
        logprobs=_logprobs(sequence, result, row, len(kept)),
        trace=result.traces[row] if result.traces is not None else None,
        seconds=result.seconds,
        batch_size=batch_size,
    )
    return Emitted(event, ending)


def ended_before(sequence: Sequence, capacity: int) -> Ending | None:
    """How an answer of which a part was said before is over already, as it would have ended when it was said."""
    said = sequence.request.generated
    if not said:
        return None
    if sequence.detokenizer.stopped is not None:
        return Ending(FinishReason.STOP, sequence.detokenizer.stopped)
    stop = next((token for token in said if token in sequence.stop_token_ids), None)
    if stop is not None:
        return Ending(FinishReason.STOP, stop)
    return Ending(FinishReason.LENGTH) if tokens_left(sequence, capacity) <= 0 else None


def tokens_left(sequence: Sequence, capacity: int) -> int:
    """Tokens that may still be said. capacity: positions of a slot."""
    room = capacity - len(sequence.request.prompt) - len(sequence.output)
    limit = sequence.request.sampling.max_tokens
    return room if limit is None else min(room, limit - len(sequence.output))


def finished_event(sequence: Sequence, ending: Ending) -> FinishedEvent:
    prompt, output = len(sequence.request.prompt), len(sequence.output)
    return FinishedEvent(
        request_id=sequence.request.id,
        text=sequence.detokenizer.finish(),
        finish_reason=ending.reason,
        stop=ending.stop,
        usage=Usage(prompt_tokens=prompt, completion_tokens=output, total_tokens=prompt + output),
        metrics=sequence.metrics.summary(),
        tokens_per_second=sequence.tokens_per_second,
        ttft_seconds=sequence.ttft_seconds,
        queue_seconds=sequence.queue_seconds,
        prefill_seconds=sequence.prefill_seconds,
        decode_seconds=sequence.decode_seconds,
        plain_tokens_per_second=sequence.plain_tokens_per_second,
    )


def _until_stop(sequence: Sequence, offered: list[int], capacity: int) -> tuple[list[int], Ending | None]:
    room = tokens_left(sequence, capacity)
    for place, token in enumerate(offered[:room]):
        if token in sequence.stop_token_ids:
            return offered[: place + 1], Ending(FinishReason.STOP, token)
    if len(offered) >= room:
        return offered[:room], Ending(FinishReason.LENGTH)
    return offered, None


def _logprobs(sequence: Sequence, result: StepResult, row: int, count: int) -> list[TokenLogprobs] | None:
    """Of the first `count` tokens, with as many alternatives as this request wants: another one may want more."""
    wanted = sequence.request.sampling.logprobs
    entries = None if result.logprobs is None else result.logprobs[row]
    if wanted is None or entries is None:
        return None
    return [replace(entry, top=entry.top[:wanted]) for entry in entries[:count]]


def _count_time(sequence: Sequence, plain_rate: float | None) -> None:
    now = time.perf_counter()
    if sequence.last_token_at is None:
        sequence.first_token_at = now
    elif plain_rate is None or sequence.plain_tokens is None:
        sequence.plain_tokens = None
    else:
        sequence.plain_tokens += plain_rate * (now - sequence.last_token_at)
    sequence.last_token_at = now
