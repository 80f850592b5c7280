"""What the fake engine answers: a pure function of (prompt, seed, position), as the real one's output is.

Two fake engines with different names cut the same tokens into different steps, as real ones do under different load.
"""

import hashlib
import random
from dataclasses import dataclass
from typing import Any, Literal

from gorgon_protocol.errors import BadRequestError, ContextLengthError
from gorgon_protocol.metrics import MetricsAccumulator, Usage
from gorgon_protocol.requests import EngineRequest

VOCAB_SIZE = 512
EOS = 2
MAX_ACCEPTED = 3  # drafts of a step: 0..3 equally often, 2.5 tokens a message
NUM_NODES = 16
_FIRST_WORD = 3


def token_text(token_id: int) -> str:
    """Words with what is easily broken on the way: characters of several bytes, quotes, backslashes, line ends."""
    if token_id < _FIRST_WORD:
        return ""
    match token_id % 16:
        case 0:
            return f" 猫{token_id}"
        case 1:
            return f' "{token_id}\\"\n'
        case 2:
            return f" café{token_id}"
        case _:
            return f" w{token_id}"


def text_tokens(text: str) -> list[int]:
    """One id a word; `token_text` does not lead back, as nothing here needs it to."""
    return [_FIRST_WORD + hashlib.blake2b(word.encode()).digest()[0] for word in text.split()]


def prompt_tokens(request: EngineRequest) -> list[int]:
    if request.prompt_token_ids is not None:
        return request.prompt_token_ids
    if request.messages is not None:
        return text_tokens(" ".join(f"{message.role} {message.content}" for message in request.messages))
    assert request.prompt is not None
    return text_tokens(request.prompt) or [_FIRST_WORD]


@dataclass(frozen=True, slots=True)
class End:
    reason: Literal["stop", "length"]
    stop: str | int | None = None


class FakeAnswer:
    """The tokens of one request, step by step, from behind `generated_token_ids` on.

    `end` is set once there is nothing more to say. Raises `ContextLengthError` for a prompt that does not fit, and
    `BadRequestError` for generated tokens that this request's answer does not begin with: a client that resumes wrongly
    must not go unnoticed.
    """

    def __init__(self, request: EngineRequest, *, engine: str, context: int) -> None:
        prompt = prompt_tokens(request)
        if len(prompt) >= context:
            raise ContextLengthError(f"the prompt is {len(prompt)} tokens long and the context holds {context}")
        drawn = request.seed if request.temperature > 0.0 else None
        self._words = random.Random(repr((prompt, drawn)))
        self._steps = random.Random(f"{engine} {request.request_id}")
        self._natural_length = self._words.randrange(24, 160)
        room = context - len(prompt)
        self._max_tokens = min(request.max_tokens or room, room)
        self._request = request
        self._num_prompt_tokens = len(prompt)
        self._num_tokens = 0
        self._pending = ""  # text that is not certain yet
        self._metrics = MetricsAccumulator()
        self._has_begun = False
        self.end: End | None = None
        for position, token in enumerate(request.generated_token_ids):
            if self.end is not None or self._next_token()[0] != token:
                raise BadRequestError(f"generated_token_ids[{position}] is not a token of this answer")

    def next_step(self) -> dict[str, Any]:
        """A `TokenMessage` as a dictionary. Only while `end` is None."""
        accepted = 0
        if self._has_begun:
            accepted = self._steps.randint(0, MAX_ACCEPTED) if self._request.speculation.enabled else 0
        ids: list[int] = []
        pieces: list[str] = []
        while self.end is None and len(ids) <= accepted:
            token, piece = self._next_token()
            ids.append(token)
            pieces.append(piece)
        accepted = len(ids) - 1
        nodes = NUM_NODES if self._has_begun and self._request.speculation.enabled else 1
        if self._has_begun:
            self._metrics.record(num_accepted=accepted, num_drafted=nodes - 1)
        message = {
            "type": "token",
            "text": "".join(pieces),
            "token_ids": ids,
            "pieces": pieces,
            "num_accepted": accepted,
            "num_nodes": nodes,
        }
        if self._request.logprobs is not None:
            message["logprobs"] = [_logprob(token, self._request.logprobs) for token in ids]
        if self._request.tree_debug:
            message["tree_debug"] = _tree(ids[:accepted], nodes - 1, step=self._metrics.num_steps)
        self._has_begun = True
        return message

    def finished(self) -> dict[str, Any]:
        """The `FinishedMessage` as a dictionary. Only once `end` is set."""
        end = self.end
        assert end is not None
        usage = Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self._num_tokens,
            total_tokens=self._num_prompt_tokens + self._num_tokens,
        )
        return {
            "type": "finished",
            "finish_reason": end.reason,
            "text": self._pending,  # empty after a stop string
            "stop": end.stop,
            "usage": usage.model_dump(),
            "metrics": {
                "speculative_decoding": self._metrics.summary().model_dump(),
                "tokens_per_second": 100.0,
                "speedup": 2.0,
                "queue_seconds": 0.0,
                "prefill_seconds": 0.01,
                "ttft_seconds": 0.01,
                "decode_seconds": 0.1,
                "heads": None,
                "num_resumptions": 0,
            },
            "request_id": self._request.request_id,
            "seed": self._request.seed,
        }

    def _next_token(self) -> tuple[int, str]:
        """The next token and the text that it releases: all but what may be the beginning of a stop string."""
        request = self._request
        word = self._words.randrange(_FIRST_WORD, VOCAB_SIZE)
        self._num_tokens += 1
        token = EOS if self._num_tokens >= self._natural_length and not request.ignore_eos else word
        self._pending += token_text(token)
        found = [(self._pending.find(stop), stop) for stop in request.stop if stop in self._pending]
        if found:
            index, stop = min(found)
            piece = self._pending[:index]
            self._pending = ""
            self.end = End("stop", stop)
            return token, piece
        if token in request.stop_token_ids or (token == EOS and not request.ignore_eos):
            self.end = End("stop", token)
        elif self._num_tokens >= self._max_tokens:
            self.end = End("length")
        certain = len(self._pending) - _num_held(self._pending, request.stop)
        piece, self._pending = self._pending[:certain], self._pending[certain:]
        return token, piece


def _num_held(text: str, stops: list[str]) -> int:
    """Characters at the end that a later token may still make part of a stop string, or (every seventh length of a
    text, for no reason but to lag as characters of several tokens do) one more token."""
    longest = 1 if len(text) % 7 == 0 and text else 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest


def _logprob(token: int, num_top: int) -> dict[str, Any]:
    def entry(token: int, rank: int) -> dict[str, Any]:
        return {"token_id": token, "token": token_text(token), "logprob": -0.5 - rank}

    top = [entry(_FIRST_WORD + (token + rank) % (VOCAB_SIZE - _FIRST_WORD), rank) for rank in range(num_top)]
    return {**entry(token, 0), "top": top}


def _tree(accepted: list[int], num_drafts: int, *, step: int) -> dict[str, Any]:
    """The accepted path, and guesses beside its first node up to the size of the tree."""
    depth = len(accepted)
    others = [_FIRST_WORD + (step + i) % 100 for i in range(num_drafts - depth)]
    ids = [*accepted, *others]
    return {
        "candidates": [token_text(token) for token in ids],
        "token_ids": ids,
        "accepted": [True] * depth + [False] * len(others),
        "parents": [*range(-1, depth - 1), *([-1] * len(others))],
        "depths": [*range(1, depth + 1), *([1] * len(others))],
        "probabilities": [0.5 ** (i + 1) for i in range(num_drafts)],
        "ranks": [0] * depth + list(range(1, len(others) + 1)),
        "sources": ["head" if i % 3 else "lookup" for i in range(num_drafts)],
        "num_nodes": num_drafts + 1,
        "speedup": 2.0,
        "tokens_per_second": 100.0,
        "plain_tokens_per_second": 50.0,
        "step": step,
        "step_seconds": {"draft": 0.002, "verify": 0.024, "accept": 0.001, "commit": 0.0005},
        "batch_size": 1,
    }
