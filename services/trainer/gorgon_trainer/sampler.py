"""The order in which packs are trained on: random, without overlap between ranks, and resumable at every batch."""

from collections.abc import Iterator, Mapping

import numpy as np
from torch.utils.data import Sampler

from gorgon_protocol.errors import TrainingError

SamplerState = dict[str, int]


class ResumableSampler(Sampler[list[int]]):
    """Batches of item indices, for a DataLoader's `batch_sampler`.

    Each epoch is a permutation of the items made from (seed, epoch). Its n-th stretch of batch_size * world_size items
    is the n-th batch of all ranks together, each taking its own part: the ranks never overlap, and every rank has the
    same number of batches. The items of the last, incomplete stretch are dropped in that epoch; the next permutation
    leaves out others.

    The order depends on nothing but the arguments and the number of batches so far, which is all the state there is.
    """

    def __init__(
        self,
        num_items: int,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_epochs: int | None = None,
    ) -> None:
        """batch_size: items a rank and batch. num_epochs: None = endless.

        Raises `TrainingError` where the items do not fill one batch on every rank.
        """
        assert batch_size >= 1, batch_size
        assert seed >= 0, seed
        assert 0 <= rank < world_size, (rank, world_size)
        assert num_epochs is None or num_epochs >= 0, num_epochs
        self.batches_per_epoch = num_items // (batch_size * world_size)
        if self.batches_per_epoch == 0:
            raise TrainingError(
                f"{num_items} packs do not fill one batch of {batch_size} on each of {world_size} ranks: "
                "give more data, or shorter packs or a smaller batch"
            )
        self._num_items = num_items
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
        shuffled_epoch, order = -1, np.empty(0, dtype=np.int64)
        while self._num_epochs is None or self.epoch < self._num_epochs:
            if self.epoch != shuffled_epoch:
                shuffled_epoch = self.epoch
                order = np.random.default_rng([self._seed, shuffled_epoch]).permutation(self._num_items)
            batch = self._num_batches % self.batches_per_epoch * self._world_size + self._rank
            self._num_batches += 1
            yield order[batch * self._batch_size : (batch + 1) * self._batch_size].tolist()

    def state_dict(self, *, num_batches: int | None = None) -> SamplerState:
        """Where to go on. num_batches: how many batches this rank has trained on since the very first one, where the
        sampler is ahead of that because a DataLoader's workers prefetch; None = all that it has given.
        """
        return {
            "num_batches": self._num_batches if num_batches is None else num_batches,
            "num_items": self._num_items,
            "batch_size": self._batch_size,
            "world_size": self._world_size,
            "seed": self._seed,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on with the batch after those of `state`, which any rank may have saved.

        Raises `TrainingError` where the state is of other data or settings, under which the order would be another.
        """
        here = self.state_dict()
        if state.keys() != here.keys():
            raise TrainingError(f"the sampler's state holds {sorted(state)}, expected {sorted(here)}")
        for name, value in here.items():
            if name != "num_batches" and state[name] != value:
                raise TrainingError(
                    f"the run was begun with {name} {state[name]} and cannot go on with {value}: "
                    "resume it as it was begun, or begin a new one"
                )
        self._num_batches = state["num_batches"]
