"""The order in which packs are trained on: random, without overlap between ranks, and resumable at every batch."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice

import numpy as np
from torch.utils.data import Sampler

from gorgon_protocol.errors import TrainingError

SamplerValue = int | list[int] | list[float]
SamplerState = dict[str, SamplerValue]


class ResumableSampler(Sampler[list[int]]):
    """Batches of item indices, for a DataLoader's `batch_sampler`.

    Each epoch is a permutation of the items made from (seed, epoch). Its n-th stretch of batch_size * world_size items
    is the n-th batch of all ranks together, each taking its own part: the ranks never overlap, and every rank has the
    same number of batches. The items of the last, incomplete stretch are dropped in that epoch; the next permutation
    leaves out others.

    Items of several groups, numbered through, are mixed by shares: the next item is of the group that is furthest
    behind its share. Each group gives its own items in one permutation after another, none dropped, so that a small
    group may be gone through many times while a large one goes on. An epoch is one of the first group.

    The order depends on nothing but the arguments and the number of batches so far, which is all the state there is.
    """

    def __init__(
        self,
        num_items: int | Sequence[int],
        *,
        batch_size: int,
        shares: Sequence[float] | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_epochs: int | None = None,
    ) -> None:
        """num_items: of every group, or of the only one. batch_size: items a rank and batch. shares: of the groups in
        what is given, in any unit; None = by their size. num_epochs: None = endless.

        Raises `TrainingError` where the items do not fill one batch on every rank.
        """
        sizes = (num_items,) if isinstance(num_items, int) else tuple(num_items)
        weights = tuple(sizes if shares is None else shares)
        assert batch_size >= 1, batch_size
        assert seed >= 0, seed
        assert 0 <= rank < world_size, (rank, world_size)
        assert num_epochs is None or num_epochs >= 0, num_epochs
        assert len(weights) == len(sizes), (weights, sizes)
        assert all(weight > 0 for weight in weights), weights
        self._stretch = batch_size * world_size
        if sum(sizes) < self._stretch:
            raise TrainingError(
                f"{sum(sizes)} packs do not fill one batch of {batch_size} on each of {world_size} ranks: "
                "give more data, or shorter packs or a smaller batch"
            )
        # Items of all groups while the first one is gone through once.
        num_items_per_epoch = int(sizes[0] * sum(weights) / weights[0])
        self.batches_per_epoch = max(1, num_items_per_epoch // self._stretch)
        self._sizes = sizes
        self._shares = tuple(weight / sum(weights) for weight in weights)
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._num_epochs = num_epochs
        self._num_batches = 0

    @property
    def epoch(self) -> int:
        """Of the next batch."""
        return self._num_batches // self.batches_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        """From the next batch on: a second iterator goes on where the first one stopped."""
        items = islice(self._items(), self._num_batches * self._stretch, None)
        own = slice(self._rank * self._batch_size, (self._rank + 1) * self._batch_size)
        while self._num_epochs is None or self.epoch < self._num_epochs:
            self._num_batches += 1
            yield list(islice(items, self._stretch))[own]

    def state_dict(self, *, num_batches: int | None = None) -> SamplerState:
        """Where to go on. num_batches: how many batches this rank has trained on since the very first one, where the
        sampler is ahead of that because a DataLoader's workers prefetch; None = all that it has given.
        """
        is_mixed = len(self._sizes) > 1
        state: SamplerState = {
            "num_batches": self._num_batches if num_batches is None else num_batches,
            "num_items": list(self._sizes) if is_mixed else self._sizes[0],
            "batch_size": self._batch_size,
            "world_size": self._world_size,
            "seed": self._seed,
        }
        return state | {"shares": list(self._shares)} if is_mixed else state

    def load_state_dict(self, state: Mapping[str, SamplerValue]) -> None:
        """Go on with the batch after those of `state`, which any rank may have saved.

        Raises `TrainingError` where the state is of other data or settings, under which the order would be another.
        """
        here = self.state_dict()
        num_batches = state.get("num_batches")
        if state.keys() != here.keys() or not isinstance(num_batches, int):
            raise TrainingError(f"the sampler's state holds {sorted(state)}, expected {sorted(here)}")
        for name, value in here.items():
            if name != "num_batches" and state[name] != value:
                raise TrainingError(
                    f"the run was begun with {name} {state[name]} and cannot go on with {value}: "
                    "resume it as it was begun, or begin a new one"
                )
        self._num_batches = num_batches

    def _items(self) -> Iterator[int]:
        """Every item of all ranks, from the very first one on."""
        groups = [self._group(number) for number in range(len(self._sizes))]
        given = [0] * len(groups)
        for total in count(1):
            behind = [share * total - so_far for share, so_far in zip(self._shares, given, strict=True)]
            number = behind.index(max(behind))
            given[number] += 1
            yield next(groups[number])

    def _group(self, number: int) -> Iterator[int]:
        """A group's own items, one permutation after another."""
        first, size = sum(self._sizes[:number]), self._sizes[number]
        # Alone, a group's epoch ends where a batch does.
        kept = size if len(self._sizes) > 1 else self.batches_per_epoch * self._stretch
        for epoch in count():
            seed = [self._seed, epoch, number] if number else [self._seed, epoch]
            yield from (first + np.random.default_rng(seed).permutation(size)[:kept]).tolist()
