"""The drafters of an engine at work: which rows of a batch each of them drafts for, and what they are told.

Sequences that do not speculate cost nothing here. A drafter with a memory drafts only for sequences that it has known
from their first position on: after a change of drafters those that are running go on with the others alone.

Letters: B sequences of the batch, R of them that are drafted for, E rows of a sequence, C hidden size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gorgon_engine.batch import RunningBatch
from gorgon_engine.drafters.base import Committed, DraftContext, Drafter, StatefulDrafter
from gorgon_engine.kv_cache import KVCache
from gorgon_engine.transfer import to_device
from gorgon_engine.tree.candidates import CandidateTree
from gorgon_engine.tree.cost_model import FULL, Effort, Price
from gorgon_engine.tree.tree import MergedCandidates, merge_candidates

# The part of the history that is looked at is rounded up to this many positions, so that a GPU sees few shapes.
POSITION_BUCKET = 128


@dataclass(frozen=True, slots=True)
class DraftRows:
    """Whom the next tree is drafted for: rows of a batch, ascending; None = all of them."""

    all: tuple[int, ...] | None = None
    known: tuple[int, ...] | None = None  # to drafters with a memory, from the sequence's first position on

    @property
    def are_none(self) -> bool:
        return self.all == ()


@dataclass(frozen=True, slots=True)
class DraftMasks:
    """The same where every drafter looks at all rows, whoever they are for, so that no shape depends on it: the guesses
    for the others become padding."""

    all: Tensor  # [B] bool
    known: Tensor  # [B] bool


ALL_ROWS = DraftRows()
NO_ROWS = DraftRows((), ())


class Drafting:
    """The drafters, the history of every slot, and what drafters remember of it."""

    def __init__(self, drafters: Iterable[Drafter], cache: KVCache, *, max_nodes: int, max_depth: int) -> None:
        self._cache = cache
        self.max_nodes = max_nodes
        self.max_depth = max_depth
        # Prompt and answer of every slot: [S, P + 1].
        self.history = torch.zeros(
            (cache.num_slots, cache.num_positions + 1), dtype=torch.int64, device=cache.lengths.device
        )
        self.drafters: tuple[Drafter, ...] = ()
        self._remembering: tuple[StatefulDrafter, ...] = ()
        self.use(self.bind(drafters))

    def bind(self, drafters: Iterable[Drafter]) -> tuple[Drafter, ...]:
        """The same with memories for these slots, where they have any; empty ones, whatever is in the slots."""
        slots, positions = self._cache.num_slots, self._cache.num_positions
        return tuple(
            drafter.for_slots(slots, positions) if isinstance(drafter, StatefulDrafter) else drafter
            for drafter in drafters
        )

    def use(self, bound: tuple[Drafter, ...]) -> None:
        """Draft with these from now on."""
        self.drafters = bound
        self._remembering = tuple(drafter for drafter in bound if isinstance(drafter, StatefulDrafter))

    @property
    def is_remembering(self) -> bool:
        """Whether anybody wants to be told what is committed: nobody has to where nothing is ever drafted."""
        return bool(self._remembering) and self.max_nodes > 1

    @property
    def has_costly(self) -> bool:
        return any(drafter.is_costly for drafter in self.drafters)

    def observe(self, committed: Committed) -> None:
        """Tell the drafters that remember what was committed, also in steps in which they do not draft: else their
        memory had gaps."""
        for drafter in self._remembering:
            drafter.observe(committed)

    def propose(
        self,
        batch: RunningBatch,
        max_length: int,
        rows: DraftRows | DraftMasks,
        effort: Effort = FULL,
    ) -> MergedCandidates | None:
        """Continuations of the roots, best first; None where there is none at all.

        max_length: the host's upper bound of the committed lengths. effort: its price is asked for on a CPU.
        """
        if effort.is_none or (isinstance(rows, DraftRows) and rows.are_none):
            return None
        bound = min(round_up(max_length + 1), self.history.shape[1])
        context = DraftContext(
            root_tokens=batch.root_tokens,
            hidden=batch.hidden,
            history=self.history[batch.slots, :bound],
            history_lengths=self._cache.lengths[batch.slots] + 1,
            seeds=batch.sampling.seeds,
            slots=batch.slots,
        )
        return self.guess(context, rows, effort)

    def guess(
        self, context: DraftContext, rows: DraftRows | DraftMasks = ALL_ROWS, effort: Effort = FULL
    ) -> MergedCandidates | None:
        """What the drafters make of a context, merged."""
        if self.max_nodes == 1:
            return None
        forests = []
        for drafter in self.drafters:
            chosen = rows.known if any(drafter is other for other in self._remembering) else rows.all
            if (effort.costly or not drafter.is_costly) and not (isinstance(chosen, tuple) and chosen == ()):
                forests.append(self._forest(drafter, context, chosen))
        if not forests:
            return None
        # On a CPU a look at the guesses costs nothing: where they promise too little, the next step is a plain one.
        if context.root_tokens.device.type == "cpu" and not _pays(forests, effort.price):
            return None
        return merge_candidates(forests, max_nodes=self.max_nodes, max_depth=self.max_depth)

    def _forest(self, drafter: Drafter, context: DraftContext, rows: Sequence[int] | Tensor | None) -> CandidateTree:
        if rows is None:
            return drafter.propose(context, self.max_nodes - 1)
        if isinstance(rows, Tensor):
            forest = drafter.propose(context, self.max_nodes - 1)
            return replace(forest, log_probs=forest.log_probs.masked_fill(~rows[:, None], -torch.inf))
        index = to_device(rows, context.root_tokens.device)
        forest = drafter.propose(context.select(index), self.max_nodes - 1)
        return forest.spread(index, context.root_tokens.shape[0])


def _pays(forests: Sequence[CandidateTree], price: Price) -> bool:
    """Whether guesses promise more than they cost, those that several drafters make counted as often."""
    gains = sum(float((forest.log_probs.exp() - price.row).clamp(min=0.0).sum()) for forest in forests)
    return gains > price.tree


def chosen_rows(rows: Sequence[int], batch: int) -> tuple[int, ...] | None:
    """As `DraftRows` wants them."""
    return None if len(rows) == batch else tuple(rows)


def select_rows(committed: Committed, rows: tuple[int, ...] | None) -> Committed:
    """What concerns the given rows."""
    if rows is None:
        return committed
    index: Tensor = to_device(rows, committed.slots.device)
    return Committed(
        slots=committed.slots[index],
        starts=committed.starts[index],
        hidden=committed.hidden[index],
        next_tokens=committed.next_tokens[index],
        counts=committed.counts[index],
    )


def round_up(length: int) -> int:
    """To whole buckets of positions."""
    return -(-length // POSITION_BUCKET) * POSITION_BUCKET
