"""The time-shifted targets: the seed's own example, and packs whose targets are right wherever they are."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from gorgon_protocol.errors import DataError, TrainingError
from gorgon_trainer.dataset import IGNORE, Pack, PackBatch, PackedDataset, collate, shifted_targets
from gorgon_trainer.sampler import ResumableSampler
from gorgon_trainer.shards import TokenSequence

A, B, C, D, E = 11, 12, 13, 14, 15
_ = IGNORE


def said(*tokens: int) -> TokenSequence:
    return TokenSequence.from_lists(tokens, [1] * len(tokens))


def test_head_k_predicts_the_token_k_positions_ahead() -> None:
    sequence = said(A, B, C, D, E)
    targets = shifted_targets(sequence.tokens, sequence.loss_mask, [1, 2, 3])
    assert targets[:, :4].tolist() == [  # for the input [A, B, C, D]
        [B, C, D, E],
        [C, D, E, _],
        [D, E, _, _],
    ]
    assert targets[:, 4].tolist() == [_, _, _]
    assert targets.dtype == torch.int64


def test_only_what_the_assistant_says_is_a_target() -> None:
    sequence = TokenSequence.from_lists([A, B, C, D, E], [0, 0, 1, 0, 1])
    assert shifted_targets(sequence.tokens, sequence.loss_mask, [1, 2, 4, 9]).tolist() == [
        [_, C, _, E, _],
        [C, _, E, _, _],
        [E, _, _, _, _],
        [_, _, _, _, _],
    ]


def test_a_pack_holds_several_sequences_and_nothing_crosses() -> None:
    dataset = PackedDataset([said(A, B, C), said(D, E)], pack_length=7, offsets=[1, 2])
    (pack,) = (dataset[index] for index in range(len(dataset)))
    assert pack.tokens.tolist() == [D, E, A, B, C, 0, 0]
    assert pack.targets.tolist() == [[E, _, B, C, _, _, _], [_, _, C, _, _, _, _]]
    assert (pack.starts.tolist(), pack.lengths.tolist()) == ([0, 2], [2, 3])
    assert dataset.fill == pytest.approx(5 / 7)


def test_a_sequence_longer_than_a_pack_is_cut() -> None:
    dataset = PackedDataset([said(*range(1, 11))], pack_length=4, offsets=[1, 3])
    packs = sorted((dataset[index] for index in range(len(dataset))), key=lambda pack: int(pack.tokens[0]))
    assert [pack.tokens.tolist() for pack in packs] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 0]]
    assert packs[0].targets.tolist() == [[2, 3, 4, _], [4, _, _, _]]
    assert packs[2].lengths.tolist() == [2]


def test_sequences_of_similar_length_share_a_pack() -> None:
    lengths = [1, 2, 3, 50, 51, 52] * 20
    dataset = PackedDataset([said(*range(1, n + 1)) for n in lengths], pack_length=60, offsets=[1], seed=3)
    spreads = [int(pack.lengths.max() - pack.lengths.min()) for pack in (dataset[i] for i in range(len(dataset)))]
    assert sum(spread > 2 for spread in spreads) <= 1
    assert dataset.fill > 0.8


def test_the_seed_decides_which_sequences_meet() -> None:
    sequences = [said(*range(n, n + 5)) for n in range(100)]

    def packs(seed: int) -> list[list[int]]:
        dataset = PackedDataset(sequences, pack_length=20, offsets=[1], seed=seed)
        return [dataset[index].tokens.tolist() for index in range(len(dataset))]

    assert packs(1) == packs(1)
    assert packs(1) != packs(2)


SEQUENCES = st.lists(
    st.lists(st.booleans(), min_size=1, max_size=25).map(lambda mask: TokenSequence.from_lists([0] * len(mask), mask)),
    min_size=1,
    max_size=30,
)


def numbered(sequences: list[TokenSequence]) -> list[TokenSequence]:
    """Every token of the data set another id, so that a target's id says where it comes from."""
    ids = iter(range(1, 10_000))
    return [TokenSequence(torch.tensor([next(ids) for _ in s.tokens]).int(), s.loss_mask) for s in sequences]


@given(
    sequences=SEQUENCES,
    pack_length=st.integers(6, 40),
    offsets=st.sets(st.integers(1, 5), min_size=1).map(sorted),
    seed=st.integers(0, 3),
)
def test_packs_of_any_sequences(
    sequences: list[TokenSequence], pack_length: int, offsets: list[int], seed: int
) -> None:
    sequences = numbered(sequences)
    dataset = PackedDataset(sequences, pack_length=pack_length, offsets=offsets, seed=seed)
    assert dataset.num_tokens == sum(map(len, sequences))
    batch = collate([dataset[index] for index in range(len(dataset))])

    seen: list[int] = []
    targets: list[Counter[int]] = [Counter() for _ in offsets]
    inside = torch.zeros(len(batch.tokens), dtype=torch.bool)
    for start, length in zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True):
        assert start // pack_length == (start + length - 1) // pack_length  # no segment crosses packs
        assert not inside[start : start + length].any()
        inside[start : start + length] = True
        seen += batch.tokens[start : start + length].tolist()
        for row, offset, counter in zip(batch.targets, offsets, targets, strict=True):
            for position in range(start, start + length):
                if (target := int(row[position])) != IGNORE:
                    assert position + offset < start + length  # nothing crosses
                    assert target == batch.tokens[position + offset]
                    counter[target] += 1
    assert sorted(seen) == list(range(1, dataset.num_tokens + 1))  # no token lost, none twice
    assert (batch.tokens[~inside] == 0).all()
    assert (batch.targets[:, ~inside] == IGNORE).all()
    # Each of the assistant's tokens is every head's target once, where its piece has an input that far before it.
    for offset, counter in zip(offsets, targets, strict=True):
        expected = [
            int(s.tokens[position])
            for s in sequences
            for position in range(len(s))
            if s.loss_mask[position] and position % pack_length >= offset
        ]
        assert counter == Counter(expected)


def test_a_data_loader_gives_batches_of_packs() -> None:
    dataset = PackedDataset(numbered([said(*[0] * 9)] * 40), pack_length=20, offsets=[1, 2])
    sampler = ResumableSampler(len(dataset), batch_size=4, num_epochs=1)
    loader: DataLoader[Pack] = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=1)
    batches = list(loader)
    assert len(batches) == len(dataset) // 4
    for batch in batches:
        assert isinstance(batch, PackBatch)
        assert batch.tokens.shape == (80,)
        assert batch.targets.shape == (2, 80)
        assert batch.starts.tolist() == [0, 9, 20, 29, 40, 49, 60, 69]
        assert batch.lengths.tolist() == [9] * 8
        assert torch.equal(batch.to("cpu").tokens, batch.tokens)


@pytest.mark.parametrize("offsets", [[], [0, 1], [2, 1], [1, 1]])
def test_offsets_that_cannot_be(offsets: list[int]) -> None:
    with pytest.raises(TrainingError, match="ascending numbers from 1"):
        PackedDataset([said(A)], pack_length=8, offsets=offsets)


def test_packs_too_short_for_the_farthest_head() -> None:
    with pytest.raises(TrainingError, match="pack_length 4 leaves the head of offset 4 no target"):
        PackedDataset([said(A)], pack_length=4, offsets=[1, 4])


def test_no_data() -> None:
    with pytest.raises(DataError, match="the split is empty"):
        PackedDataset([], pack_length=8, offsets=[1])
