"""The state of the running batch where recorded steps find it: in memory that stays where it is.

Letters: B rows of state, padding counted, M candidates, C hidden size.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from gorgon_engine.batch import RunningBatch, widened
from gorgon_engine.drafting import DraftMasks, DraftRows
from gorgon_engine.sampling import SamplingBatch
from gorgon_engine.tree.tree import MergedCandidates


class GraphState:
    """The running state of up to `size` sequences, in the memory that the recordings of that size know."""

    def __init__(self, like: RunningBatch, size: int, max_candidates: int, spare_slot: int | None) -> None:
        """like: a batch of the types that the state has. spare_slot: of the rows that no sequence has."""
        device = like.slots.device

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros((size, *shape), dtype=dtype, device=device)

        self.current: RunningBatch | None = None  # whose state lies here
        self.source_names: tuple[str, ...] = ()  # of the candidates
        self._spare_slot = spare_slot
        self._slots = zeros()
        self._prompt_lengths = zeros() + 1
        self._root_tokens = zeros()
        self._hidden = zeros(like.hidden.shape[1], dtype=like.hidden.dtype)
        greedy = SamplingBatch.of_temperatures(zeros(dtype=torch.float32), zeros(), vocab_size=like.sampling.vocab_size)
        self._sampling = greedy.repeat(1)  # each parameter in memory of its own
        self._candidates = MergedCandidates(
            tokens=zeros(max_candidates),
            parents=zeros(max_candidates) - 1,
            log_probs=zeros(max_candidates, dtype=torch.float32) - torch.inf,
            ranks=zeros(max_candidates),
            sources=zeros(max_candidates),
            source_names=(),
        )
        self._controls = torch.zeros((3, size), dtype=torch.int64, device=device)
        self._told: list[list[int]] = []  # what the controls hold

    @property
    def num_nodes(self) -> Tensor:
        """Rows to verify for each sequence: [B] int64."""
        return self._controls[0]

    @property
    def masks(self) -> DraftMasks:
        return DraftMasks(all=self._controls[1] != 0, known=self._controls[2] != 0)

    def load(self, batch: RunningBatch) -> None:
        """Take up the state of other sequences, or one that something else than a recording has made."""
        count = batch.slots.shape[0]
        for buffer, values in (
            (self._slots, batch.slots),
            (self._prompt_lengths, batch.prompt_lengths),
            (self._root_tokens, batch.root_tokens),
            (self._hidden, batch.hidden),
            *_tensors(self._sampling, batch.sampling),
        ):
            buffer[:count].copy_(values)
        if count < self._slots.shape[0]:
            assert self._spare_slot is not None
            self._slots[count:] = self._spare_slot
        if batch.candidates is not None:
            # Names are only ever added: recordings hold the places of those that they know.
            self.source_names = tuple(dict.fromkeys(self.source_names + batch.candidates.source_names))
            found = widened(batch.candidates, self._candidates.tokens.shape[1], self.source_names)
            for buffer, values in _tensors(self._candidates, found):
                buffer[:count].copy_(values)

    def load_controls(self, num_nodes: Sequence[int], rows: DraftRows | DraftMasks) -> None:
        """What the host decides about the next step, in one transfer where anything changes."""
        assert isinstance(rows, DraftRows)
        size = self._controls.shape[1]
        told = [
            [*num_nodes, *[1] * (size - len(num_nodes))],
            *([int(some is None or row in some) for row in range(size)] for some in (rows.all, rows.known)),
        ]
        if told != self._told:
            values = torch.tensor(told, dtype=torch.int64, pin_memory=self._controls.is_cuda)
            self._controls.copy_(values, non_blocking=True)
            self._told = told

    def store(self, after: RunningBatch, drafter_names: tuple[str, ...]) -> None:
        """Leave the state after a step of all rows to the next one. drafter_names: of all that may have drafted."""
        self.source_names = tuple(dict.fromkeys(self.source_names + drafter_names))
        self._root_tokens.copy_(after.root_tokens)
        self._hidden.copy_(after.hidden)
        if after.candidates is None:
            return
        found = replace(after.candidates, sources=_renamed(after.candidates, self.source_names))
        columns = found.tokens.shape[1]
        for buffer, values in _tensors(self._candidates, found):
            buffer[:, :columns].copy_(values)
        if columns < self._candidates.tokens.shape[1]:
            self._candidates.log_probs[:, columns:].fill_(-torch.inf)

    def whole(self, *, all_greedy: bool, any_filter: bool, has_candidates: bool) -> RunningBatch:
        """All rows, as recordings see them."""
        sampling = replace(self._sampling, all_greedy=all_greedy, any_filter=any_filter)
        return self.rows(self._slots.shape[0], sampling, has_candidates=has_candidates)

    def rows(self, count: int, sampling: SamplingBatch, *, has_candidates: bool) -> RunningBatch:
        """The first `count` rows, where they lie."""
        return RunningBatch(
            slots=self._slots[:count],
            prompt_lengths=self._prompt_lengths[:count],
            root_tokens=self._root_tokens[:count],
            hidden=self._hidden[:count],
            sampling=sampling,
            counts=None,
            candidates=self._first_candidates(count) if has_candidates else None,
        )

    def _first_candidates(self, count: int) -> MergedCandidates:
        found = self._candidates
        return MergedCandidates(
            tokens=found.tokens[:count],
            parents=found.parents[:count],
            log_probs=found.log_probs[:count],
            ranks=found.ranks[:count],
            sources=found.sources[:count],
            source_names=self.source_names,
        )


def _tensors(buffers: Any, values: Any) -> list[tuple[Tensor, Tensor]]:
    """The tensors of two of a kind in pairs, without those that only one has."""
    pairs = ((getattr(buffers, f.name), getattr(values, f.name)) for f in fields(buffers))
    return [(buffer, value) for buffer, value in pairs if isinstance(buffer, Tensor) and isinstance(value, Tensor)]


def _renamed(candidates: MergedCandidates, names: tuple[str, ...]) -> Tensor:
    """The sources [B, M] as places in `names`, without a table: one made here would have to be copied to the device."""
    places = [names.index(name) for name in candidates.source_names]
    renamed = candidates.sources
    for place, new_place in enumerate(places):
        if place != new_place:
            renamed = torch.where(candidates.sources == place, new_place, renamed)
    return renamed
