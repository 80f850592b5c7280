"""Features are the hidden states that serving gives, at the right positions, however sequences are packed together."""

from pathlib import Path

import pytest
import torch

from gorgon_engine.backbone.base import Backbone, ForwardInputs
from gorgon_engine.backbone.select import Kernels
from gorgon_engine.kv_cache import KVCache
from gorgon_trainer import features
from gorgon_trainer.dataset import IGNORE, PackBatch, PackedDataset, collate
from gorgon_trainer.features import examples, hidden_states
from gorgon_trainer.shards import TokenSequence
from support.training import VOCAB, load_fp32

pytestmark = pytest.mark.usefixtures("one_thread")


def random_sequences(count: int, longest: int = 19) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(3)
    sequences = []
    for _ in range(count):
        size = int(torch.randint(1, longest + 1, (1,), generator=generator))
        tokens = torch.randint(3, VOCAB, (size,), generator=generator).int()
        mask = (torch.rand(size, generator=generator) < 0.6).to(torch.uint8)
        sequences.append(TokenSequence(tokens, mask))
    return sequences


def make_batch(offsets: tuple[int, ...] = (1, 2, 4), pack_length: int = 24) -> PackBatch:
    dataset = PackedDataset(random_sequences(30), pack_length=pack_length, offsets=offsets)
    return collate([dataset[index] for index in range(len(dataset))])


def alone(backbone: Backbone, tokens: torch.Tensor) -> torch.Tensor:
    """The hidden states [T, C] of one sequence, as the engine prefills a prompt."""
    shape = backbone.config
    cache = KVCache(
        num_layers=shape.num_layers,
        num_slots=1,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        capacity=64,
        max_scratch=1,
        dtype=backbone.cache_dtype,
        device=backbone.device,
    )
    inputs = ForwardInputs.chain(tokens, slot=cache.acquire(), length=0, prompt_length=len(tokens))
    return backbone.forward(inputs, cache).hidden[0]


@pytest.mark.parametrize("group_rows", [1, 60, 65536])
@pytest.mark.parametrize("kernels", [Kernels.NATIVE, Kernels.TORCH])
def test_each_sequence_is_seen_alone(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, kernels: Kernels, group_rows: int
) -> None:
    monkeypatch.setattr(features, "_GROUP_ROWS", group_rows)
    backbone = load_fp32(small_model, kernels)
    batch = make_batch()
    hidden = hidden_states(backbone, batch)
    assert hidden.shape == (len(batch.tokens), backbone.config.hidden_size)
    inside = torch.zeros(len(batch.tokens), dtype=torch.bool)
    for start, length in zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True):
        here = slice(start, start + length)
        inside[here] = True
        expected = alone(backbone, batch.tokens[here])
        if kernels is Kernels.NATIVE:
            assert torch.equal(hidden[here], expected)
        else:
            torch.testing.assert_close(hidden[here], expected, rtol=1e-4, atol=1e-4)
    assert not inside.all(), "there is padding"
    assert not hidden[~inside].any()


def test_groups_hold_each_segment_once_and_keep_to_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_GROUP_ROWS", 50)
    batch = make_batch()
    groups = features._groups(batch.starts, batch.lengths)
    assert len(groups) > 3
    assert sorted(torch.cat([starts for starts, _ in groups]).tolist()) == sorted(batch.starts.tolist())
    for starts, lengths in groups:
        assert len(starts) * int(lengths.max()) <= 50
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            assert length == batch.lengths[batch.starts == start]


@pytest.mark.parametrize("offsets", [(1,), (2,), (1, 2, 3), (2, 3, 4), (1, 4)])
def test_examples_are_the_positions_with_a_target(offsets: tuple[int, ...]) -> None:
    batch = make_batch(offsets)
    hidden = torch.randn(len(batch.tokens), 5, generator=torch.Generator().manual_seed(1))
    made = examples(batch, hidden, offsets, teachers=True)
    assert made.teachers is not None
    assert made.next_tokens.shape[0] == max(offsets) - 1

    row = 0
    for position in range(len(batch.tokens)):
        targets = batch.targets[:, position].tolist()
        if all(target == IGNORE for target in targets):
            continue
        assert torch.equal(made.hidden[row], hidden[position])
        assert made.targets[:, row].tolist() == targets
        for head, (offset, target) in enumerate(zip(offsets, targets, strict=True)):
            if target == IGNORE:
                continue
            assert batch.tokens[position + offset] == target
            assert torch.equal(made.teachers[head, row], hidden[position + offset - 1])
            between = [int(batch.tokens[position + step]) for step in range(1, offset)]
            assert made.next_tokens[: offset - 1, row].tolist() == between
        row += 1
    assert made.num_positions == row > 0


def test_packs_keep_what_is_around_the_examples() -> None:
    offsets = (2, 3, 4)
    batch = make_batch(offsets)
    hidden = torch.randn(len(batch.tokens), 5, generator=torch.Generator().manual_seed(1))
    made = examples(batch, hidden, offsets, teachers=False, pack_length=24)
    packs = made.packs
    assert packs is not None
    assert torch.equal(packs.hidden.flatten(0, 1), hidden)
    assert torch.equal(packs.hidden.flatten(0, 1)[packs.chosen], made.hidden)
    assert packs.next_tokens.shape == (3, len(batch.tokens) // 24, 24)
    last = len(batch.tokens)
    for place in packs.chosen.tolist():
        for step in range(1, 4):
            assert packs.next_tokens[step - 1].flatten()[place] == batch.tokens[(place + step) % last]
    mask, inside = packs.mask(), torch.zeros_like(packs.segments, dtype=torch.bool)
    for start, length in zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True):
        pack, begin = divmod(start, 24)
        here = slice(begin, begin + length)
        inside[pack, here] = True
        assert packs.positions[pack, here].tolist() == list(range(length))
        assert torch.equal(mask[pack, here, here], torch.ones(length, length).tril().bool())
        assert mask[pack, here].sum() == length * (length + 1) // 2, "nothing of another segment"
    assert not inside.all()
    assert mask.diagonal(dim1=1, dim2=2).all(), "padding sees itself: no row sees nothing"


def test_packs_can_be_trained_on(small_backbone: Backbone) -> None:
    batch = make_batch((2, 3))
    packs = examples(batch, hidden_states(small_backbone, batch), (2, 3), teachers=False, pack_length=24).packs
    weight = torch.ones(small_backbone.config.hidden_size, requires_grad=True)
    assert packs is not None
    (packs.hidden * weight).square().sum().backward()
    assert weight.grad is not None


def test_teachers_are_left_out_unless_asked_for() -> None:
    batch = make_batch()
    assert examples(batch, torch.zeros(len(batch.tokens), 2), (1, 2, 4), teachers=False).teachers is None


def test_a_batch_without_targets_has_no_examples() -> None:
    dataset = PackedDataset([TokenSequence.from_lists([5, 6, 7], [0, 0, 0])], pack_length=8, offsets=(2, 3))
    made = examples(collate([dataset[0]]), torch.zeros(8, 4), (2, 3), teachers=True)
    assert (made.num_positions, made.targets.shape, made.next_tokens.shape) == (0, (2, 0), (2, 0))


def test_features_can_be_trained_on(small_backbone: Backbone) -> None:
    """They come out of inference mode, whose tensors autograd refuses to keep."""
    batch = make_batch()
    made = examples(batch, hidden_states(small_backbone, batch), (1, 2, 4), teachers=True)
    weight = torch.ones(small_backbone.config.hidden_size, requires_grad=True)
    assert made.teachers is not None
    ((made.hidden * weight).square().sum() + (made.teachers * weight).square().sum()).backward()
    assert weight.grad is not None
    assert weight.grad.abs().min() > 0
