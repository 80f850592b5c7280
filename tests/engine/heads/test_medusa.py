"""The heads against a plain restatement, one head and one block at a time."""

import pytest
import torch

from gorgon_engine.heads.medusa import MedusaHeads

HIDDEN, VOCAB = 16, 23


def make(num_heads: int = 3, num_blocks: int = 2, *, own: bool, filled: bool = True) -> MedusaHeads:
    torch.manual_seed(0)
    lm_head = torch.randn(VOCAB, HIDDEN) if own else None
    heads = MedusaHeads(HIDDEN, num_heads=num_heads, num_blocks=num_blocks, lm_head=lm_head)
    if filled:
        for parameter in heads.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return heads


def plain(heads: MedusaHeads, hidden: torch.Tensor, project: torch.Tensor | None) -> torch.Tensor:
    rows = []
    for head in range(heads.num_heads):
        x = hidden
        for block in range(heads.num_blocks):
            inner = x @ heads.weight[head, block].T + heads.bias[head, block]
            x = x + inner * torch.sigmoid(inner)
        weight = project if heads.projection is None else heads.projection[head]
        assert weight is not None
        rows.append(x @ weight.T)
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("num_blocks", [1, 3])
@pytest.mark.parametrize("own", [True, False])
def test_every_head_is_its_blocks_and_its_projection(own: bool, num_blocks: int) -> None:
    heads = make(num_blocks=num_blocks, own=own)
    project = None if own else torch.randn(VOCAB, HIDDEN)
    hidden = torch.randn(5, HIDDEN)
    calls: list[torch.Size] = []

    def shared(features: torch.Tensor) -> torch.Tensor:
        calls.append(features.shape)
        assert project is not None
        return features @ project.T

    logits = heads(hidden, shared)
    assert logits.shape == (5, 3, VOCAB)
    torch.testing.assert_close(logits, plain(heads, hidden, project))
    assert calls == ([] if own else [(5, 3, HIDDEN)]), "the shared projection is one product for all heads"


@pytest.mark.parametrize("own", [True, False])
def test_new_heads_say_what_the_backbone_says(own: bool) -> None:
    lm_head = torch.randn(VOCAB, HIDDEN)
    heads = MedusaHeads(HIDDEN, num_heads=4, lm_head=lm_head if own else None)
    hidden = torch.randn(3, HIDDEN)
    logits = heads(hidden, lambda features: features @ lm_head.T)
    assert heads.num_heads == 4
    for head in range(4):
        torch.testing.assert_close(logits[:, head], hidden @ lm_head.T)


def test_a_shared_projection_is_no_part_of_the_heads() -> None:
    shared = make(own=False)
    assert set(shared.state_dict()) == {"weight", "bias"}
    projection = torch.nn.Linear(HIDDEN, VOCAB)
    shared(torch.randn(1, HIDDEN), projection)
    assert set(shared.state_dict()) == {"weight", "bias"}
    assert set(make(own=True).state_dict()) == {"weight", "bias", "projection"}


def test_own_projections_are_copies_that_train_apart() -> None:
    lm_head = torch.randn(VOCAB, HIDDEN)
    heads = MedusaHeads(HIDDEN, num_heads=2, lm_head=lm_head)
    assert heads.projection is not None
    with torch.no_grad():
        heads.projection[0] += 1
    assert torch.equal(heads.projection[1], lm_head)


@pytest.mark.parametrize("own", [True, False])
def test_training_fits_each_head_to_its_own_target(own: bool) -> None:
    """From the pass-through start, head k learns token k: gradients reach every weight, and none the backbone."""
    torch.manual_seed(1)
    lm_head = torch.nn.Parameter(torch.randn(VOCAB, HIDDEN), requires_grad=False)
    heads = MedusaHeads(HIDDEN, num_heads=2, num_blocks=2, lm_head=lm_head if own else None)
    hidden, targets = torch.randn(12, HIDDEN), torch.randint(VOCAB, (12, 2))
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.05)
    losses = []
    for _ in range(100):
        logits = heads(hidden, lambda features: features @ lm_head.T)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.abs().sum(dim=-1).any()) for p in heads.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert lm_head.grad is None


def test_selected_heads_are_the_same_heads() -> None:
    heads = make(4, own=True)
    hidden = torch.randn(2, HIDDEN)
    chosen = heads.select([1, 3])
    torch.testing.assert_close(chosen(hidden), heads(hidden)[:, [1, 3]])
    with torch.no_grad():
        heads.weight += 1
    assert not torch.equal(chosen.weight[0], heads.weight[1]), "a copy"


def test_hidden_states_of_another_dtype_are_taken() -> None:
    heads = make(own=True)
    hidden = torch.randn(2, HIDDEN, dtype=torch.bfloat16)
    torch.testing.assert_close(heads(hidden), heads(hidden.float()))
