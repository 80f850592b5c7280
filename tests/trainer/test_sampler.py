"""The sampler: resumed at any batch it is the uninterrupted one; ranks share an epoch without overlap."""

import itertools
from typing import Any

import numpy as np
import pytest

from gorgon_protocol.errors import TrainingError
from gorgon_trainer.sampler import ResumableSampler


def test_resumed_after_any_batch_is_uninterrupted() -> None:
    options: dict[str, Any] = {"num_items": 11, "batch_size": 3, "seed": 5, "num_epochs": 3}
    whole = list(ResumableSampler(**options))
    assert len(whole) == 9
    for cut in range(len(whole) + 1):
        first = ResumableSampler(**options)
        head = list(itertools.islice(first, cut))
        second = ResumableSampler(**options)
        second.load_state_dict(first.state_dict())
        assert second.epoch == cut // 3
        assert head + list(second) == whole


def test_a_second_iterator_goes_on_with_the_next_batch() -> None:
    sampler = ResumableSampler(10, batch_size=2, num_epochs=2)
    head = list(itertools.islice(sampler, 3))
    assert head + list(sampler) == list(ResumableSampler(10, batch_size=2, num_epochs=2))


def test_a_sampler_that_is_ahead_of_the_training_saves_what_was_trained_on() -> None:
    whole = list(ResumableSampler(20, batch_size=2, num_epochs=2))
    ahead = ResumableSampler(20, batch_size=2, num_epochs=2)
    list(itertools.islice(ahead, 9))
    resumed = ResumableSampler(20, batch_size=2, num_epochs=2)
    resumed.load_state_dict(ahead.state_dict(num_batches=4))
    assert list(resumed) == whole[4:]


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 3), (3, 2), (4, 1)])
def test_ranks_are_disjoint_and_together_complete(world_size: int, batch_size: int) -> None:
    num_items = world_size * batch_size * 5
    ranks = [
        list(ResumableSampler(num_items, batch_size=batch_size, rank=rank, world_size=world_size, num_epochs=1))
        for rank in range(world_size)
    ]
    assert [len(batches) for batches in ranks] == [5] * world_size
    assert sorted(item for batches in ranks for batch in batches for item in batch) == list(range(num_items))


def test_what_does_not_fill_a_batch_on_every_rank_waits_for_another_epoch() -> None:
    ranks = [ResumableSampler(13, batch_size=2, rank=rank, world_size=3, num_epochs=20) for rank in range(3)]
    assert [rank.batches_per_epoch for rank in ranks] == [2, 2, 2]
    batches = list(zip(*ranks, strict=True))
    epochs = [[item for step in batches[n : n + 2] for batch in step for item in batch] for n in range(0, 40, 2)]
    assert all(len(set(epoch)) == len(epoch) == 12 for epoch in epochs)
    assert set().union(*epochs) == set(range(13))


def test_the_order_is_of_the_ranks_together() -> None:
    """Twice the ranks with half the batch train on the same items at the same step."""
    one = list(ResumableSampler(24, batch_size=4, seed=2, num_epochs=1))
    two = [ResumableSampler(24, batch_size=2, seed=2, rank=rank, world_size=2, num_epochs=1) for rank in range(2)]
    assert [first + second for first, second in zip(*two, strict=True)] == one


def test_epochs_and_seeds_differ() -> None:
    batches = list(ResumableSampler(50, batch_size=50, num_epochs=2))
    assert batches[0] != batches[1]
    assert sorted(batches[0]) == sorted(batches[1]) == list(range(50))
    assert next(iter(ResumableSampler(50, batch_size=50, seed=1))) != batches[0]


def test_without_a_number_of_epochs_it_never_ends() -> None:
    sampler = ResumableSampler(4, batch_size=2)
    assert len(list(itertools.islice(sampler, 1001))) == 1001
    assert sampler.epoch == 500


def test_too_little_data_for_one_batch() -> None:
    with pytest.raises(TrainingError, match="5 packs do not fill one batch of 3 on each of 2 ranks"):
        ResumableSampler(5, batch_size=3, world_size=2)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_items": 13}, "begun with num_items 12 and cannot go on with 13"),
        ({"batch_size": 3}, "begun with batch_size 2 and cannot go on with 3"),
        ({"seed": 1}, "begun with seed 0 and cannot go on with 1"),
        ({"world_size": 2}, "begun with world_size 1 and cannot go on with 2"),
    ],
)
def test_a_state_of_other_settings_is_refused(changes: dict[str, Any], expected: str) -> None:
    state = ResumableSampler(12, batch_size=2).state_dict()
    other = ResumableSampler(**({"num_items": 12, "batch_size": 2} | changes))
    with pytest.raises(TrainingError, match=expected):
        other.load_state_dict(state)


def test_a_state_of_something_else_is_refused() -> None:
    with pytest.raises(TrainingError, match="the sampler's state holds"):
        ResumableSampler(12, batch_size=2).load_state_dict({"epoch": 3})


MIXED: dict[str, Any] = {"num_items": (30, 4, 11), "shares": (3, 2, 1), "batch_size": 4, "seed": 5}


def group_of(item: int) -> int:
    return 0 if item < 30 else 1 if item < 34 else 2


def test_groups_are_mixed_by_their_shares() -> None:
    """At every moment, not only in the end; each group's own items are all given before one comes again."""
    batches = list(itertools.islice(ResumableSampler(**MIXED), 90))
    items = [item for batch in batches for item in batch]
    for count in range(1, len(items) + 1):
        groups = [group_of(item) for item in items[:count]]
        for number, share in enumerate((3 / 6, 2 / 6, 1 / 6)):
            assert abs(groups.count(number) - share * count) < 1.5
    for number, (first, size) in enumerate(((0, 30), (30, 4), (34, 11))):
        own = [item for item in items if group_of(item) == number]
        passes = [own[at : at + size] for at in range(0, len(own) - size + 1, size)]
        assert len(passes) == (6, 30, 5)[number]
        assert all(sorted(one) == list(range(first, first + size)) for one in passes)
        assert len({tuple(one) for one in passes}) > 1


def test_without_shares_groups_count_by_their_size() -> None:
    items = [item for batch in itertools.islice(ResumableSampler((30, 10), batch_size=4), 10) for item in batch]
    assert sorted(items) == list(range(40))
    assert all(sum(item >= 30 for item in items[at : at + 4]) == 1 for at in range(0, 40, 4))


def test_an_epoch_of_a_mixture_is_one_of_the_first_group() -> None:
    sampler = ResumableSampler(**MIXED, num_epochs=2)
    assert sampler.batches_per_epoch == 15
    items = [item for batch in sampler for item in batch]
    assert [items.count(item) for item in range(30)] == [2] * 30
    tiny = ResumableSampler((1, 100), shares=(9, 1), batch_size=4, num_epochs=3)
    assert len(list(tiny)) == 3, "an epoch has one batch at least"


def test_a_mixture_resumed_after_any_batch_is_uninterrupted() -> None:
    whole = list(itertools.islice(ResumableSampler(**MIXED), 40))
    for cut in range(41):
        first = ResumableSampler(**MIXED)
        head = list(itertools.islice(first, cut))
        second = ResumableSampler(**MIXED)
        second.load_state_dict(first.state_dict())
        assert head + list(itertools.islice(second, 40 - cut)) == whole


def test_ranks_share_a_mixture() -> None:
    one = list(itertools.islice(ResumableSampler(**MIXED), 20))
    halves = MIXED | {"batch_size": 2, "world_size": 2}
    two = [itertools.islice(ResumableSampler(**halves, rank=rank), 20) for rank in range(2)]
    assert [first + second for first, second in zip(*two, strict=True)] == one


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_items": (30, 5, 11)}, r"begun with num_items \[30, 4, 11\] and cannot go on with \[30, 5, 11\]"),
        ({"shares": (1, 1, 1)}, r"begun with shares \[0.5, 0.33"),
        ({"num_items": 45, "shares": None}, "the sampler's state holds .*'shares'"),
    ],
)
def test_a_state_of_another_mixture_is_refused(changes: dict[str, Any], expected: str) -> None:
    state = ResumableSampler(**MIXED).state_dict()
    with pytest.raises(TrainingError, match=expected):
        ResumableSampler(**(MIXED | changes)).load_state_dict(state)


def test_a_state_from_before_there_were_mixtures_is_taken() -> None:
    sampler = ResumableSampler(11, batch_size=3, seed=5)
    whole = list(itertools.islice(sampler, 9))
    old = {"num_batches": 4, "num_items": 11, "batch_size": 3, "world_size": 1, "seed": 5}
    assert sampler.state_dict().keys() == old.keys()
    resumed = ResumableSampler(11, batch_size=3, seed=5)
    resumed.load_state_dict(old)
    assert list(itertools.islice(resumed, 5)) == whole[4:]
    # As they were drawn then.
    order = np.random.default_rng([5, 1]).permutation(11)
    assert whole[3:6] == [order[at : at + 3].tolist() for at in (0, 3, 6)]
