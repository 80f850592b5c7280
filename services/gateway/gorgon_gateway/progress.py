"""What has been received of one answer and what it cost, over all the engines that gave parts of it."""

from typing import Any

from gorgon_protocol.metrics import MetricsAccumulator


class Progress:
    """Counts one generation's token messages, so that another engine can go on behind them and the end adds up.

    An engine reports on its own part alone, and one that dies reports nothing: of an interrupted or cancelled
    generation the gateway's own count is what the client gets.
    """

    def __init__(self, given: list[int]) -> None:
        """given: tokens that the client had already when it asked."""
        self.token_ids = list(given)
        self.num_resumptions = 0
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self._num_given = len(given)
        self._num_first = 0  # tokens of the first message: decode speed counts what comes behind it
        self._steps = MetricsAccumulator()
        self._expects_prefill = True  # the next message begins with the token that prefill gives

    @property
    def num_received(self) -> int:
        return len(self.token_ids) - self._num_given

    def take(self, fields: dict[str, Any], now: float) -> None:
        """A `TokenMessage`, and when it came."""
        num_tokens = len(fields["token_ids"])
        if num_tokens == 0:
            return
        self.token_ids += fields["token_ids"]
        num_nodes: int = fields["num_nodes"]
        if self.first_token_at is None:
            self.first_token_at = now
            self._num_first = num_tokens
        self.last_token_at = now
        if self._expects_prefill:
            self._expects_prefill = False
            num_tokens -= 1
            num_nodes -= 1
            if self.num_resumptions:
                # Undisturbed it would have been a step's: so completion tokens = 1 + steps + accepted still holds.
                self._steps.record(num_accepted=0, num_drafted=0)
        if num_tokens:
            self._record(num_tokens, fields["num_accepted"], num_nodes)

    def interrupted(self) -> None:
        """The engine is lost; another one goes on."""
        self.num_resumptions += 1
        self._expects_prefill = True

    def finished(self, fields: dict[str, Any], started_at: float) -> dict[str, Any]:
        """The `FinishedMessage` of the engine that gave the last part, over all parts."""
        said = fields["metrics"]
        speed, ratio = said.get("tokens_per_second"), said.get("speedup")
        plain = speed / ratio if speed and ratio else None
        return {
            **fields,
            "usage": _usage(fields["usage"]["prompt_tokens"], len(self.token_ids)),
            "metrics": {**said, **self._metrics(started_at, plain)},
        }

    def cancelled(self, started_at: float, *, num_prompt_tokens: int) -> dict[str, Any]:
        """The `FinishedMessage` of a generation that its client has ended."""
        return {
            "type": "finished",
            "finish_reason": "cancelled",
            "text": "",
            "stop": None,
            "usage": _usage(num_prompt_tokens, len(self.token_ids)),
            "metrics": {
                "queue_seconds": 0.0,
                "prefill_seconds": None,
                "heads": None,
                **self._metrics(started_at, None),
            },
        }

    def _record(self, num_tokens: int, num_accepted: int, num_nodes: int) -> None:
        """One step; several, where the engine has merged the messages of a slow reader."""
        num_steps = max(1, num_tokens - num_accepted)
        if num_steps == 1:
            self._steps.record(num_accepted=num_tokens - 1, num_drafted=max(num_nodes, num_tokens) - 1)
            return
        # How they were spread is not said: evenly.
        each, more = divmod(num_tokens - num_steps, num_steps)
        drafted = max(num_nodes, num_tokens) - num_steps
        for step in range(num_steps):
            accepted = each + (step < more)
            share = max(accepted, drafted // (num_steps - step))
            self._steps.record(num_accepted=accepted, num_drafted=share)
            drafted -= share

    def _metrics(self, started_at: float, plain: float | None) -> dict[str, Any]:
        speed = decode_seconds = None
        if self.first_token_at is not None and self.last_token_at is not None:
            decode_seconds = self.last_token_at - self.first_token_at
            if decode_seconds > 0.0:
                speed = (self.num_received - self._num_first) / decode_seconds
        return {
            "speculative_decoding": self._steps.summary().model_dump(),
            "tokens_per_second": speed,
            "speedup": speed / plain if speed and plain else None,
            "ttft_seconds": self.first_token_at - started_at if self.first_token_at is not None else None,
            "decode_seconds": decode_seconds,
            "num_resumptions": self.num_resumptions,
        }


def _usage(num_prompt_tokens: int, num_completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
    }
