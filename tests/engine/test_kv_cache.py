"""Slots and slicing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon_engine.kv_cache import KVCache
from gorgon_protocol.errors import CapacityError


def make_cache(num_slots: int = 3, capacity: int = 20, scratch: int = 12) -> KVCache:
    return KVCache(
        num_layers=2,
        num_slots=num_slots,
        num_kv_heads=2,
        head_dim=4,
        capacity=capacity,
        max_scratch=scratch,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_commit_moves_the_branch_and_leaves_the_rest(data: st.DataObject) -> None:
    cache = make_cache()
    cache.keys.copy_(torch.randn(cache.keys.shape))
    cache.values.copy_(torch.randn(cache.values.shape))
    before_keys, before_values = cache.keys.clone(), cache.values.clone()
    slots = torch.tensor(data.draw(st.permutations([0, 1, 2]))[:2])
    lengths = [data.draw(st.integers(0, 19)) for _ in range(2)]
    cache.lengths[slots] = torch.tensor(lengths)
    places = data.draw(st.integers(1, 12))
    path = torch.tensor(
        [sorted(data.draw(st.sets(st.integers(0, 11), min_size=places, max_size=places))) for _ in range(2)]
    )
    kept = torch.tensor([data.draw(st.integers(1, places)) for _ in range(2)])
    cache.commit(slots, path, kept)
    for b, slot in enumerate(slots.tolist()):
        assert int(cache.lengths[slot]) == lengths[b] + int(kept[b])
        for now, before in ((cache.keys, before_keys), (cache.values, before_values)):
            assert torch.equal(now[:, slot, :, : lengths[b]], before[:, slot, :, : lengths[b]])
            source = lengths[b] + path[b, : int(kept[b])]
            assert torch.equal(now[:, slot, :, lengths[b] : lengths[b] + int(kept[b])], before[:, slot, :, source])
    (other,) = {0, 1, 2} - set(slots.tolist())
    assert torch.equal(cache.keys[:, other], before_keys[:, other])


def test_a_step_is_committed_whole() -> None:
    """The cache is sliced, the history goes on, and the last token said is the next root."""
    cache = make_cache()
    cache.keys.copy_(torch.randn(cache.keys.shape))
    slots, lengths = torch.tensor([2, 0]), torch.tensor([4, 20])
    cache.lengths[slots] = lengths
    path = torch.tensor([[0, 2, 5], [0, 1, 11]])
    tokens, kept = torch.tensor([[7, 8, 9], [5, 6, 6]]), torch.tensor([3, 1])
    history, hidden = torch.full((3, 33), -1), torch.randn(2, 12, 6)
    before = cache.keys.clone()
    after = cache.commit_step(slots, path, kept, tokens=tokens, history=history, hidden=hidden)
    assert after.tokens.tolist() == [9, 5]
    assert torch.equal(after.hidden, torch.stack([hidden[0, 5], hidden[1, 0]]))
    assert cache.lengths.tolist() == [21, 0, 7]
    assert torch.equal(cache.keys[:, 2, :, 4:7], before[:, 2, :, [4, 6, 9]])
    assert history[2, 4:9].tolist() == [-1, 7, 8, 9, -1]
    assert history[0, :22].tolist() == [-1] * 21 + [5]
    assert (history[1] == -1).all()


def test_slots_run_out_with_a_clear_error_and_come_back_empty() -> None:
    cache = make_cache(num_slots=2)
    first = cache.acquire()
    cache.append(first, 5)
    cache.acquire()
    with pytest.raises(CapacityError, match="all 2 KV cache slots are in use"):
        cache.acquire()
    cache.release(first)
    assert cache.num_free_slots == 1
    assert cache.acquire() == first
    assert int(cache.lengths[first]) == 0


def test_size_in_bytes_counts_keys_and_values() -> None:
    assert make_cache().num_bytes == 2 * 2 * 3 * 2 * 32 * 4 * 4
