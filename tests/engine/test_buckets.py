"""Sizes that steps are rounded up to: few, and large enough for everything."""

import pytest

from gorgon_engine.buckets import Buckets


@pytest.mark.parametrize("num_slots", [1, 2, 5, 8, 100, 300])
@pytest.mark.parametrize("max_nodes", [1, 2, 20, 32, 128])
@pytest.mark.parametrize("num_positions", [130, 512, 513, 8320])
def test_every_size_has_a_bucket_that_is_not_much_larger(num_slots: int, max_nodes: int, num_positions: int) -> None:
    buckets = Buckets.of(num_slots=num_slots, max_nodes=max_nodes, num_positions=num_positions)
    for sizes, last in ((buckets.batches, num_slots), (buckets.widths, max_nodes), (buckets.lengths, num_positions)):
        assert list(sizes) == sorted(set(sizes))
        assert sizes[-1] == last
    for count in range(1, num_slots + 1):
        assert count <= buckets.batch(count) <= max(1.5 * count, 1)
    for count in range(1, max_nodes + 1):
        assert count <= buckets.width(count) < 2 * count or count == 1 == buckets.width(count)
    assert all(buckets.length(count) >= count for count in range(1, num_positions + 1))
    assert buckets.width(1) == buckets.batch(1) == 1, "plain decoding of one stream is never padded"


def test_beyond_the_largest_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="9 is beyond the largest"):
        Buckets.of(num_slots=8, max_nodes=4, num_positions=200).batch(9)
