"""A prompt run into its slot, as the scheduler does it, but with nothing around it."""

import torch

from gorgon_engine.outcome import StepResult
from gorgon_engine.sampling import SamplingBatch, SamplingParams, TokenCounts
from gorgon_engine.step import PrefillChunk, SpeculativeStep, Wanted


def prefill(
    step: SpeculativeStep, prompt: list[int], sampling: SamplingParams, *, chunk: int, wanted: Wanted | None = None
) -> StepResult:
    """Prefill in chunks in a slot of its own; the state after the first token."""
    device, vocab_size = step.backbone.device, step.backbone.config.vocab_size
    rows = SamplingBatch.of([sampling], vocab_size=vocab_size, device=device)
    counts = None
    if sampling.penalised:
        counts = TokenCounts.empty(torch.zeros(1), vocab_size)
        counts.in_prompt[0, prompt] = True
    wanted = wanted or Wanted()
    slot, tokens, result = step.cache.acquire(), tuple(prompt), None
    for start in range(0, len(tokens), chunk):
        stop = min(start + chunk, len(tokens))
        part = PrefillChunk(slot, tokens, start, stop, prompt_length=len(tokens), remember=wanted.draft)
        result = step.prefill([part], rows if part.is_last else None, counts if part.is_last else None, wanted=wanted)
    assert result is not None
    return result
