"""Every generation, whatever route it came by: counted, logged in a line, and a span of its trace.

Attributes are OpenTelemetry's GenAI conventions (https://opentelemetry.io/docs/specs/semconv/gen-ai/).
"""

import asyncio
from typing import TYPE_CHECKING, Any

from gorgon_gateway.observability.logs import logger
from gorgon_gateway.observability.metrics import FINISH_REASONS, GatewayMetrics
from gorgon_gateway.observability.tracing import AttributeValue, Telemetry, current_context
from gorgon_protocol.requests import GenerateRequest

if TYPE_CHECKING:
    from gorgon_gateway.generation import Generation

ABANDONED = "abandoned"


class GenerationWatch:
    """The relay's observer: `begun` is called for every generation that begins."""

    def __init__(self, metrics: GatewayMetrics, telemetry: Telemetry, *, log_prompts: bool = False) -> None:
        self._metrics = metrics
        self._telemetry = telemetry
        self._log_prompts = log_prompts

    def begun(self, generation: "Generation") -> "WatchedGeneration":
        self._metrics.generation_begun()
        return WatchedGeneration(self._metrics, self._telemetry, generation.request, log_prompts=self._log_prompts)


class WatchedGeneration:
    """One generation; `ended` exactly once."""

    def __init__(
        self, metrics: GatewayMetrics, telemetry: Telemetry, request: GenerateRequest, *, log_prompts: bool
    ) -> None:
        self._metrics = metrics
        self._telemetry = telemetry
        self._log_prompts = log_prompts
        self._started_at = asyncio.get_running_loop().time()
        operation = "text_completion" if request.messages is None else "chat"
        self._attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "gorgon",
        }
        if request.model is not None:
            self._attributes["gen_ai.request.model"] = request.model
        self._span = telemetry.start(
            f"{operation} {request.model or ''}".rstrip(),
            kind="internal",
            parent=current_context.get(),
            attributes=self._attributes | _parameters(request),
        )

    def between_messages(self, seconds: float, num_tokens: int) -> None:
        """For every token message but the first."""
        self._metrics.between_messages(seconds, num_tokens)

    def ended(self, generation: "Generation", *, reason: str, num_prompt_tokens: int) -> None:
        """reason: `finish_reason`, the code of an error, or `abandoned`."""
        progress = generation.progress
        e2e_seconds = asyncio.get_running_loop().time() - self._started_at
        ttft_seconds = seconds_per_token = None
        if progress.first_token_at is not None and progress.last_token_at is not None:
            ttft_seconds = progress.first_token_at - self._started_at
            if progress.num_received > 1:
                seconds_per_token = (progress.last_token_at - progress.first_token_at) / (progress.num_received - 1)
        self._metrics.generation_ended(
            reason,
            e2e_seconds=e2e_seconds,
            ttft_seconds=ttft_seconds,
            seconds_per_token=seconds_per_token,
            num_prompt_tokens=num_prompt_tokens,
            num_tokens=progress.num_received,
        )
        self._metrics.resumed(progress.num_resumptions)
        self._metrics.retried(generation.num_retries)
        model = generation.engine.model if generation.engine is not None else None
        self._trace_end(generation, reason, model, num_prompt_tokens)
        result = {} if reason in FINISH_REASONS else {"error.type": reason}
        served = {} if model is None else {"gen_ai.response.model": model}
        self._telemetry.generation_ended(
            self._attributes | served | result,
            duration_seconds=e2e_seconds,
            ttft_seconds=ttft_seconds,
            seconds_per_token=seconds_per_token,
        )
        logger().info(
            "generation",
            generation_id=generation.request_id,
            caller=generation.caller.id,
            model=model,
            engine=generation.engine.id if generation.engine is not None else None,
            reason=reason,
            num_prompt_tokens=num_prompt_tokens,
            num_tokens=progress.num_received,
            num_resumptions=progress.num_resumptions,
            seconds=round(e2e_seconds, 6),
            ttft_seconds=None if ttft_seconds is None else round(ttft_seconds, 6),
            **(_prompt(generation.request) if self._log_prompts else {}),
        )

    def _trace_end(self, generation: "Generation", reason: str, model: str | None, num_prompt_tokens: int) -> None:
        attributes: dict[str, AttributeValue] = {
            "gen_ai.response.id": generation.request_id,
            "gen_ai.usage.input_tokens": num_prompt_tokens,
            "gen_ai.usage.output_tokens": generation.progress.num_received,
            "gorgon.num_resumptions": generation.progress.num_resumptions,
        }
        if model is not None:
            attributes["gen_ai.response.model"] = model
        has_finished = reason in FINISH_REASONS
        if has_finished:
            attributes["gen_ai.response.finish_reasons"] = [reason]
        self._span.set(attributes)
        self._span.end(error=None if has_finished else reason)


def _parameters(request: GenerateRequest) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        "gen_ai.request.temperature": request.temperature,
        "gen_ai.request.top_p": request.top_p,
        "gen_ai.request.frequency_penalty": request.frequency_penalty,
        "gen_ai.request.presence_penalty": request.presence_penalty,
    }
    if request.top_k:
        attributes["gen_ai.request.top_k"] = request.top_k
    if request.max_tokens is not None:
        attributes["gen_ai.request.max_tokens"] = request.max_tokens
    if request.seed is not None:
        attributes["gen_ai.request.seed"] = request.seed
    if request.stop:
        attributes["gen_ai.request.stop_sequences"] = list(request.stop)
    return attributes


def _prompt(request: GenerateRequest) -> dict[str, Any]:
    if request.messages is not None:
        return {"prompt": "\n".join(f"{message.role}: {message.content}" for message in request.messages)}
    return {"prompt": request.prompt if request.prompt is not None else str(request.prompt_token_ids)}
