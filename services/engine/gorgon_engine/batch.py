"""The device-side state of the running sequences, one row a sequence, in batch order.

Immutable: a step returns the next state. When sequences join or leave, rows are concatenated or selected; between those
moments nothing is rebuilt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from gorgon_engine.sampling import SamplingBatch, SamplingParams, TokenCounts
from gorgon_engine.transfer import to_device
from gorgon_engine.tree.tree import MergedCandidates

T = TypeVar("T", TokenCounts, MergedCandidates)


@dataclass(frozen=True, slots=True)
class RunningBatch:
    """B sequences after their last commit. `sampling` is rebuilt from the host's parameters when the batch changes."""

    slots: Tensor  # [B] int64
    prompt_lengths: Tensor  # [B] int64
    root_tokens: Tensor  # [B] int64: emitted, exact, not yet in the KV cache
    hidden: Tensor  # [B, C]: the hidden state that predicted the root
    sampling: SamplingBatch
    counts: TokenCounts | None  # where any sequence has penalties
    candidates: MergedCandidates | None  # the drafted next tree

    def select(self, rows: Sequence[int], params: list[SamplingParams]) -> "RunningBatch":
        """The given rows only, with their sampling parameters."""
        index = to_device(rows, self.slots.device)
        return RunningBatch(
            slots=self.slots[index],
            prompt_lengths=self.prompt_lengths[index],
            root_tokens=self.root_tokens[index],
            hidden=self.hidden[index],
            sampling=self._sampling(params),
            counts=_map(self.counts, lambda t: t[index]),
            candidates=_map(self.candidates, lambda t: t[index]),
        )

    def join(self, other: "RunningBatch", params: list[SamplingParams]) -> "RunningBatch":
        """The rows of both, `other`'s behind."""
        return RunningBatch(
            slots=torch.cat([self.slots, other.slots]),
            prompt_lengths=torch.cat([self.prompt_lengths, other.prompt_lengths]),
            root_tokens=torch.cat([self.root_tokens, other.root_tokens]),
            hidden=torch.cat([self.hidden, other.hidden]),
            sampling=self._sampling(params),
            counts=_concatenate(self.counts, other.counts),
            candidates=self._joined_candidates(other),
        )

    def _joined_candidates(self, other: "RunningBatch") -> MergedCandidates | None:
        # A side that drafted nothing has no candidates at all: the joined batch then takes one plain step.
        if self.candidates is None or other.candidates is None:
            return None
        return _concatenate(self.candidates, other.candidates)

    def _sampling(self, params: list[SamplingParams]) -> SamplingBatch:
        return SamplingBatch.of(params, vocab_size=self.sampling.vocab_size, device=self.slots.device)


def _map(value: T | None, change: Callable[[Tensor], Tensor]) -> T | None:
    if value is None:
        return None
    changed: dict[str, Any] = {
        f.name: change(t) for f in fields(value) if isinstance(t := getattr(value, f.name), Tensor)
    }
    return replace(value, **changed)


def _concatenate(first: T | None, second: T | None) -> T | None:
    assert (first is None) == (second is None), "sequences in one batch carry the same kinds of state"
    if first is None or second is None:
        return None
    joined: dict[str, Any] = {
        f.name: torch.cat([t, getattr(second, f.name)])
        for f in fields(first)
        if isinstance(t := getattr(first, f.name), Tensor)
    }
    return replace(first, **joined)
