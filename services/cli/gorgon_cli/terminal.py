"""What a person sees of a generation: streamed text with the accepted drafts marked, and the figures at its end."""

import os
import signal
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import IO, Any

import click

from gorgon_engine.engine import Engine
from gorgon_engine.events import FinishedEvent, TokenEvent
from gorgon_engine.sequence import FinishReason, Request

# Accepted drafts are green and underlined: visible in colour and without it.
_DRAFT_ON, _DRAFT_OFF = "\x1b[32;4m", "\x1b[0m"


@dataclass(slots=True)
class Generation:
    """One finished request: all that its events said."""

    request: Request
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    steps: list[TokenEvent] = field(default_factory=list)
    finished: FinishedEvent | None = None

    @property
    def end(self) -> FinishedEvent:
        assert self.finished is not None, "a generation is read before its terminal event"
        return self.finished

    @property
    def cancelled(self) -> bool:
        return self.end.finish_reason is FinishReason.CANCELLED


def run(engine: Engine, request: Request, *, show: bool) -> Generation:
    """Run a request to its end; Ctrl-C ends it with what was produced (`finish_reason` "cancelled")."""
    generation = Generation(request)
    with _cancel_on_interrupt(engine, request):
        for event in engine.generate(request):
            _take(event, generation)
            if show:
                _show(event)
    if show:
        if not generation.text.endswith("\n"):
            click.echo()
        for notice in generation.end.notices:
            click.echo(f"gorgon: {notice}", err=True)
    return generation


def note(text: str) -> None:
    """A line about the answer, on standard error: dim on a terminal, to stand back behind it."""
    click.echo(f"\x1b[2m{text}\x1b[0m" if _takes_escapes(sys.stderr) else text, err=True, color=True)


@contextmanager
def _cancel_on_interrupt(engine: Engine, request: Request) -> Iterator[None]:
    """The first Ctrl-C cancels the request, which then ends like any other; the second one is an interrupt."""

    def cancel(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        engine.cancel(request.id)

    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:  # a background job of a script: Ctrl-C is not for it
        yield
        return
    signal.signal(signal.SIGINT, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _take(event: TokenEvent | FinishedEvent, generation: Generation) -> None:
    if isinstance(event, FinishedEvent):
        generation.finished = event
    else:
        generation.token_ids += event.token_ids
        generation.steps.append(event)
    generation.text += event.text


def _show(event: TokenEvent | FinishedEvent) -> None:
    pieces, num_drafts = ([event.text], 0) if isinstance(event, FinishedEvent) else (event.pieces, event.num_accepted)
    if is_terminal(sys.stdout):
        pieces = [printable(piece) for piece in pieces]
    drafted, own = "".join(pieces[:num_drafts]), "".join(pieces[num_drafts:])
    if drafted and _takes_escapes(sys.stdout):
        drafted = f"{_DRAFT_ON}{drafted}{_DRAFT_OFF}"
    # click would take our own escapes out where it sees no terminal: there are none then.
    click.echo(drafted + own, nl=False, color=True)


def is_terminal(stream: IO[str] | None) -> bool:
    """None is a standard stream that was closed before we began."""
    return stream is not None and stream.isatty()


def _takes_escapes(stream: IO[str] | None) -> bool:
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def printable(text: str) -> str:
    """Text that cannot control a terminal: what a model says may hold escape sequences, by accident or by design."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def speedup(engine: Engine, generation: Generation) -> float | None:
    """This request's decode speed over the plain speed measured at start-up; None where either is unknown."""
    rate = generation.end.tokens_per_second
    return rate / engine.calibration.plain_tokens_per_second if rate and engine.calibration else None


def summary(engine: Engine, generation: Generation) -> str:
    """One line: tokens, tokens/s, tokens a step, measured speedup."""
    end = generation.end
    parts = [f"{end.usage.completion_tokens} tokens"]
    if end.tokens_per_second is not None:
        parts.append(f"{end.tokens_per_second:.1f} tokens/s")
    if end.metrics.num_spec_steps:
        parts.append(f"{end.metrics.mean_acceptance_length:.2f} tokens/step")
    ratio = speedup(engine, generation)
    if ratio is not None and engine.calibration is not None:
        parts.append(f"{ratio:.2f}x plain decoding ({engine.calibration.plain_tokens_per_second:.1f} tokens/s here)")
    parts.append(engine.backbone.kernels)
    if generation.cancelled:
        parts.append("interrupted")
    elif end.finish_reason is FinishReason.LENGTH:
        parts.append("stopped at the token limit")
    return " · ".join(parts)


def as_json(engine: Engine, generation: Generation) -> dict[str, Any]:
    """The object that `--json` prints."""
    end = generation.end
    calibration = engine.calibration
    report: dict[str, Any] = {
        "text": generation.text,
        "token_ids": generation.token_ids,
        "finish_reason": str(end.finish_reason),
        "usage": end.usage.model_dump(),
        "metrics": {"speculative_decoding": end.metrics.model_dump()},
        "tokens_per_second": end.tokens_per_second,
        "plain_tokens_per_second": calibration.plain_tokens_per_second if calibration else None,
        "speedup": speedup(engine, generation),
        "ttft_seconds": end.ttft_seconds,
        "acceptance": str(generation.request.speculation.acceptance),
        "kernels": engine.backbone.kernels,
        "row_invariant": engine.backbone.row_invariant,
    }
    if generation.request.sampling.logprobs is not None:
        report["logprobs"] = [
            {
                "token_id": entry.token,
                "token": engine.tokenizer.token_text(entry.token),
                "logprob": entry.logprob,
                "top": [
                    {"token_id": token, "token": engine.tokenizer.token_text(token), "logprob": value}
                    for token, value in entry.top
                ],
            }
            for step in generation.steps
            for entry in step.logprobs or []
        ]
    return report
