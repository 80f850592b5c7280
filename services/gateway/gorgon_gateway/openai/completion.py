"""One OpenAI request from its parameters to its answer: whole, or in chunks.

plan -> choices run -> StreamWriter | whole_answer
"""

import hashlib
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from gorgon_gateway.generation import Generation
from gorgon_gateway.openai.choices import ChoiceMessage, choice_seed
from gorgon_gateway.openai.errors import ParameterError
from gorgon_gateway.openai.schemas import ChatCompletionRequest, CompletionRequest
from gorgon_gateway.openai.shapes import ChatShape, CompletionShape, Shape
from gorgon_gateway.openai.sse import DONE, comment, event
from gorgon_protocol.requests import ChatMessage, GenerateRequest

_FINGERPRINT_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be generated, and how it is written. Answer i is the (i mod n)-th to prompt i // n."""

    request_id: str
    generations: list[GenerateRequest]
    num_choices: int  # n: answers to a prompt
    make_shape: Callable[[], Shape]
    has_logprobs: bool
    includes_usage: bool
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def is_single(self) -> bool:
        return len(self.generations) == 1


def plan_chat(request: ChatCompletionRequest, *, request_id: str, max_choices: int) -> Plan:
    """Raises `ParameterError`."""
    messages = [
        ChatMessage(role="system" if message.role == "developer" else message.role, content=message.text)
        for message in request.messages
    ]
    return _plan(request, [{"messages": messages}], ChatShape, request_id=request_id, max_choices=max_choices)


def plan_completion(request: CompletionRequest, *, request_id: str, max_choices: int) -> Plan:
    """Raises `ParameterError`."""
    prompts: list[dict[str, Any]] = [
        {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt} for prompt in request.prompts
    ]
    num_top = request.logprobs or 0
    return _plan(request, prompts, lambda: CompletionShape(num_top), request_id=request_id, max_choices=max_choices)


def _plan(
    request: ChatCompletionRequest | CompletionRequest,
    prompts: list[dict[str, Any]],
    make_shape: Callable[[], Shape],
    *,
    request_id: str,
    max_choices: int,
) -> Plan:
    n = request.num_choices
    if n > max_choices:
        raise ParameterError(f"n: {n}, and this gateway gives at most {max_choices}", param="n", reason="invalid_value")
    sampling = request.sampling()
    try:
        generations = [
            GenerateRequest(
                model=request.model,
                seed=choice_seed(request.seed, choice),
                **prompt,
                **sampling,
            )
            for prompt in prompts
            for choice in range(n)
        ]
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        raise ParameterError(message, param=None, reason="invalid_value") from None
    return Plan(
        request_id=request_id,
        generations=generations,
        num_choices=n,
        make_shape=make_shape,
        has_logprobs=sampling.get("logprobs") is not None,
        includes_usage=request.includes_usage,
    )


class _Usage:
    """Prompts count once, whatever the number of answers."""

    def __init__(self, num_choices: int) -> None:
        self._num_choices = num_choices
        self._prompt = self._completion = 0

    def add(self, index: int, usage: dict[str, int]) -> None:
        if index % self._num_choices == 0:
            self._prompt += usage["prompt_tokens"]
        self._completion += usage["completion_tokens"]

    def fields(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._completion,
            "total_tokens": self._prompt + self._completion,
        }


async def stream_events(plan: Plan, messages: AsyncGenerator[ChoiceMessage, None]) -> AsyncGenerator[bytes, None]:
    """The chunks as server-sent events, `[DONE]` included. Raises what `messages` raises."""
    shapes = [plan.make_shape() for _ in plan.generations]
    usage = _Usage(plan.num_choices)
    heads: dict[int, dict[str, Any]] = {}  # what a choice's chunks have in common; there once it has begun
    extra: dict[str, Any] = {"usage": None} if plan.includes_usage else {}
    head: dict[str, Any] = {}
    async for index, generation, fields in messages:
        kind = fields["type"]
        shape = shapes[index]
        if kind == "status":
            yield comment(fields["state"])
            continue
        if index not in heads:
            head = heads[index] = _head(plan, generation, shape.object_chunk)
            if (opening := shape.opening()) is not None:
                yield event({**head, "choices": [{"index": index, **opening, "finish_reason": None}], **extra})
        head = heads[index]
        text = fields["text"]
        logprobs = fields if plan.has_logprobs and kind == "token" else None
        if text or logprobs is not None:
            choice = {"index": index, **shape.chunk(text, logprobs), "finish_reason": None}
            yield event({**head, "choices": [choice], **extra})
        if kind == "finished":
            usage.add(index, fields["usage"])
            choice = {"index": index, **shape.closing(), "finish_reason": fields["finish_reason"]}
            own = {"request_id": generation.request_id, **_details(generation, fields)}
            yield event({**head, "choices": [choice], **extra, "gorgon": own})
    if plan.includes_usage:
        yield event({**head, "choices": [], "usage": usage.fields()})
    yield DONE


async def whole_answer(plan: Plan, messages: AsyncGenerator[ChoiceMessage, None]) -> dict[str, Any]:
    """A `ChatCompletion` or `Completion` as a dictionary. Raises what `messages` raises."""
    count = len(plan.generations)
    texts: list[list[str]] = [[] for _ in range(count)]
    tokens: list[list[dict[str, Any]]] = [[] for _ in range(count)]  # messages, for their log-probabilities
    choices: list[dict[str, Any]] = [{} for _ in range(count)]
    details: list[dict[str, Any]] = [{} for _ in range(count)]
    usage = _Usage(plan.num_choices)
    head: dict[str, Any] = {}
    async for index, generation, fields in messages:
        kind = fields["type"]
        if kind == "status":
            continue
        texts[index].append(fields["text"])
        if kind == "token":
            if plan.has_logprobs:
                tokens[index].append(fields)
            continue
        shape = plan.make_shape()
        head = _head(plan, generation, shape.object_whole)
        usage.add(index, fields["usage"])
        choices[index] = {
            "index": index,
            **shape.whole(tokens[index], "".join(texts[index])),
            "finish_reason": fields["finish_reason"],
        }
        details[index] = _details(generation, fields)
    own = details[0] if plan.is_single else {"choices": [{"index": i, **each} for i, each in enumerate(details)]}
    return {
        **head,
        "choices": choices,
        "usage": usage.fields(),
        "gorgon": {"request_id": plan.request_id, **own},
    }


def _head(plan: Plan, generation: Generation, kind: str) -> dict[str, Any]:
    engine = generation.engine
    prefix = plan.make_shape().id_prefix
    return {
        "id": f"{prefix}{plan.request_id}",
        "object": kind,
        "created": plan.created,
        "model": engine.model if engine is not None else "",
        "system_fingerprint": fingerprint(engine.backbone, engine.heads) if engine is not None else "",
    }


def fingerprint(backbone: str, heads: str | None) -> str:
    """OpenAI's `system_fingerprint`: answers with the same one, seed and parameters are the same."""
    return "fp_" + hashlib.sha256(f"{backbone} {heads}".encode()).hexdigest()[:_FINGERPRINT_DIGITS]


def _details(generation: Generation, fields: dict[str, Any]) -> dict[str, Any]:
    return {"seed": generation.seed, "stop": fields.get("stop"), "metrics": fields["metrics"]}
