"""The device-side state of the running sequences, one row a sequence, in batch order.

Immutable: a step returns the next state, though one that runs as a graph leaves it where its next launch overwrites it.
When sequences join or leave, rows are concatenated or selected, which copies them; between those moments nothing is
rebuilt.
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
            counts=_map(self.counts, lambda t: t[index]) if any(p.penalised for p in params) else None,
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
            counts=self._joined_counts(other),
            candidates=self._joined_candidates(other),
        )

    def _joined_counts(self, other: "RunningBatch") -> TokenCounts | None:
        if self.counts is None and other.counts is None:
            return None
        # Nothing is ever read of the counts of a sequence without penalties.
        ours = self.counts or TokenCounts.empty(self.root_tokens, self.sampling.vocab_size)
        theirs = other.counts or TokenCounts.empty(other.root_tokens, self.sampling.vocab_size)
        return _concatenate(ours, theirs)

    def _joined_candidates(self, other: "RunningBatch") -> MergedCandidates | None:
        ours, theirs = self.candidates, other.candidates
        if ours is None and theirs is None:
            return None
        if any(side is not None and side.draft_probs is not None for side in (ours, theirs)):
            # Drawn drafts come with their distributions: without those of one side, one plain step for all.
            return None if ours is None or theirs is None else _concatenate(ours, theirs)
        # A side that drafted nothing, or with fewer drafters, gets padding: the other keeps its guesses.
        ours = ours or _no_candidates(self.root_tokens, like=theirs)
        theirs = theirs or _no_candidates(other.root_tokens, like=ours)
        names = tuple(dict.fromkeys(ours.source_names + theirs.source_names))
        width = max(ours.tokens.shape[1], theirs.tokens.shape[1])
        return _concatenate(widened(ours, width, names), widened(theirs, width, names))

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


def _no_candidates(root_tokens: Tensor, *, like: MergedCandidates | None) -> MergedCandidates:
    """Padding for B sequences [B] that drafted nothing."""
    assert like is not None
    zeros = torch.zeros((root_tokens.shape[0], like.tokens.shape[1]), dtype=torch.int64, device=root_tokens.device)
    return MergedCandidates(
        tokens=zeros,
        parents=zeros - 1,
        log_probs=torch.full_like(zeros, -torch.inf, dtype=torch.float32),
        ranks=zeros,
        sources=zeros,
        source_names=like.source_names,
    )


def widened(candidates: MergedCandidates, width: int, names: tuple[str, ...]) -> MergedCandidates:
    """The same candidates with padding up to `width`, their sources indices into `names`."""
    places = to_device([names.index(name) for name in candidates.source_names], candidates.sources.device)
    missing = width - candidates.tokens.shape[1]

    def pad(values: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(values, (0, missing), value=value)

    return replace(
        candidates,
        tokens=pad(candidates.tokens, 0),
        parents=pad(candidates.parents, -1),
        log_probs=pad(candidates.log_probs, -torch.inf),
        ranks=pad(candidates.ranks, 0),
        sources=pad(places[candidates.sources], 0),
        source_names=names,
    )
