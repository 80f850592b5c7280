"""Hydra heads against a plain restatement, one head, one position and one block at a time."""

from typing import Any

import pytest
import torch

from gorgon_engine.heads.hydra import HydraHeads, HydraShape

HIDDEN, VOCAB, HEADS = 16, 23, 3

SHAPES: list[dict[str, Any]] = [
    {"normalised": normalised, "matrix_residual": matrix, "own_projection": own, "projection_bias": bias}
    for normalised in (True, False)
    for matrix in (True, False)
    for own, bias in ((None, False), (VOCAB, False), (VOCAB, True))
]


def make(*, num_blocks: int = 3, filled: bool = True, dtype: torch.dtype = torch.float32, **values: Any) -> HydraHeads:
    torch.manual_seed(0)
    heads = HydraHeads(HydraShape(hidden_size=HIDDEN, num_heads=HEADS, num_blocks=num_blocks, **values), dtype=dtype)
    if filled:
        for parameter in heads.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return heads


def normed(x: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean() + 1e-5)


def plain(
    heads: HydraHeads, depth: int, hidden: torch.Tensor, embeddings: torch.Tensor, lm_head: torch.Tensor
) -> torch.Tensor:
    """hidden [C], embeddings [K, C] -> logits [V] of the head `depth` (from 1), by its weights' names."""
    weights = dict(heads.named_parameters())
    first = f"heads.{depth - 1}"

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return weights[f"{first}.{name}.weight"] @ x + weights[f"{first}.{name}.bias"]

    inputs = [hidden, *embeddings[:depth]]
    if heads.shape.normalised:
        inputs = [normed(x) for x in inputs]
    side_by_side = torch.cat(inputs)
    residual = linear("residual", side_by_side) if heads.shape.matrix_residual else inputs[0]
    inner = linear("input", side_by_side)
    x = residual + inner * torch.sigmoid(inner)
    for block in range(heads.shape.num_blocks - 1):
        inner = linear(f"blocks.{block}", x)
        x = x + inner * torch.sigmoid(inner)
    if heads.shape.normalised:
        x = normed(x) * weights["norm"]
    own = weights.get("projection")
    logits = (lm_head if own is None else own[depth - 1]) @ x
    bias = weights.get("projection_bias")
    return logits if bias is None else logits + bias[depth - 1]


@pytest.mark.parametrize("num_blocks", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_head_is_its_formula(shape: dict[str, Any], num_blocks: int) -> None:
    heads = make(num_blocks=num_blocks, **shape)
    lm_head = torch.randn(VOCAB, HIDDEN)
    hidden, embeddings = torch.randn(2, 5, HIDDEN) * 3, torch.randn(2, 5, HEADS, HIDDEN) * 0.1
    logits = heads(hidden, embeddings, lambda features: features @ lm_head.T)
    assert [rows.shape for rows in logits] == [(2, 5, VOCAB)] * HEADS
    for depth, rows in enumerate(logits, start=1):
        for row in range(2):
            for position in range(5):
                expected = plain(heads, depth, hidden[row, position], embeddings[row, position], lm_head)
                torch.testing.assert_close(rows[row, position], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_depth_at_a_time_gives_the_same(shape: dict[str, Any]) -> None:
    """As drafting does it: conditions that grow by one embedding a depth."""
    heads = make(**shape)
    lm_head = torch.randn(VOCAB, HIDDEN)
    hidden, embeddings = torch.randn(4, HIDDEN), torch.randn(4, HEADS, HIDDEN)
    together = heads(hidden, embeddings, lambda features: features @ lm_head.T)
    conditions = heads.condition(hidden)
    for depth in range(1, HEADS + 1):
        conditions = torch.cat([conditions, heads.condition(embeddings[:, depth - 1])], dim=-1)
        features = heads.features(depth, hidden, conditions)
        assert features.shape == (4, HIDDEN)
        logits = heads.project(depth, features, lambda features: features @ lm_head.T)
        torch.testing.assert_close(logits, together[depth - 1])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_depth_sees_the_tokens_above_it_and_none_below(shape: dict[str, Any]) -> None:
    heads = make(**shape)
    lm_head = torch.randn(VOCAB, HIDDEN)
    hidden, embeddings = torch.randn(HIDDEN), torch.randn(HEADS, HIDDEN, requires_grad=True)
    for depth, logits in enumerate(heads(hidden, embeddings, lambda features: features @ lm_head.T), start=1):
        (gradient,) = torch.autograd.grad(logits.square().sum(), embeddings, retain_graph=True)
        seen = gradient.abs().sum(dim=-1) > 0
        assert seen.tolist() == [position < depth for position in range(HEADS)]


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_reach_every_weight(shape: dict[str, Any], started: bool) -> None:
    """From random weights and from the start of training; the backbone's projection gets none."""
    heads = make(filled=not started, **shape)
    lm_head = torch.nn.Parameter(torch.randn(VOCAB, HIDDEN), requires_grad=False)
    if started:
        heads.start_as_pass_through(lm_head=lm_head)
    logits = heads(torch.randn(6, HIDDEN), torch.randn(6, HEADS, HIDDEN), lambda features: features @ lm_head.T)
    targets = torch.randint(VOCAB, (6,))
    sum(torch.nn.functional.cross_entropy(rows, targets) for rows in logits).backward()
    without = [
        name for name, p in heads.named_parameters() if p.grad is None or not bool(p.grad.abs().sum(dim=-1).any())
    ]
    assert without == []
    assert lm_head.grad is None


def test_training_uses_the_drafted_tokens() -> None:
    """A target that only the drafted token tells is learnt, which heads of the hidden state alone cannot."""
    torch.manual_seed(1)
    embedding, lm_head = torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN)
    heads = make(num_blocks=2, filled=False)
    heads.start_as_pass_through(lm_head=lm_head)
    tokens = torch.randint(VOCAB, (64, HEADS))
    hidden = torch.zeros(64, HIDDEN)
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.02)
    losses = []
    for _ in range(80):
        logits = heads(hidden, embedding[tokens], lambda features: features @ lm_head.T)
        loss = sum(torch.nn.functional.cross_entropy(rows, tokens[:, d]) for d, rows in enumerate(logits))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("own", [None, VOCAB])
@pytest.mark.parametrize("matrix", [True, False])
def test_the_start_is_near_the_backbone(matrix: bool, own: int | None) -> None:
    """What a new head says is mostly what the backbone says: far more than random weights do."""
    lm_head = torch.randn(VOCAB, HIDDEN)
    hidden = torch.randn(50, HIDDEN)
    expected = hidden @ lm_head.T
    embeddings = torch.randn(50, HEADS, HIDDEN)

    @torch.no_grad()
    def agreement(heads: HydraHeads) -> list[float]:
        rows = heads(hidden, embeddings, lambda features: features @ lm_head.T)
        return [float(torch.cosine_similarity(logits, expected).mean()) for logits in rows]

    heads = make(filled=False, normalised=False, matrix_residual=matrix, own_projection=own)
    heads.start_as_pass_through(lm_head=lm_head)
    assert min(agreement(heads)) > 0.9
    assert max(agreement(make(normalised=False, matrix_residual=matrix, own_projection=own))) < 0.8
    for head in heads.heads:
        torch.nn.init.zeros_(head.input.weight)
    for logits in heads(hidden, embeddings, lambda features: features @ lm_head.T):
        torch.testing.assert_close(logits, expected, msg="without the drafted tokens it is the backbone itself")


def test_the_norm_starts_at_the_scale_of_the_hidden_states() -> None:
    heads = make(filled=False)
    heads.start_as_pass_through(hidden_rms=2.5)
    assert heads.norm is not None
    torch.testing.assert_close(heads.norm.detach(), torch.full((HIDDEN,), 2.5))


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_normalised_heads_do_not_feel_the_scale_of_an_input(scale: float) -> None:
    heads = make(own_projection=VOCAB)
    hidden, embeddings = torch.randn(4, HIDDEN), torch.randn(4, HEADS, HIDDEN)
    for one, other in zip(heads(hidden, embeddings), heads(hidden * scale, embeddings / scale), strict=True):
        torch.testing.assert_close(one, other, rtol=0.15, atol=0.05)


def test_own_projections_are_used_and_the_shared_one_is_no_part_of_the_heads() -> None:
    own = make(own_projection=VOCAB, projection_bias=True)
    assert not own.shares_projection
    shared = make()
    assert shared.shares_projection
    assert not any("projection" in name for name in shared.state_dict())
    calls = []

    def project(features: torch.Tensor) -> torch.Tensor:
        calls.append(features.shape)
        return features

    hidden, embeddings = torch.randn(2, HIDDEN), torch.randn(2, HEADS, HIDDEN)
    own(hidden, embeddings, project)
    assert calls == []
    shared(hidden, embeddings, project)
    assert calls == [(2, HIDDEN)] * HEADS
    assert (shared.num_heads, shared.hidden_size) == (HEADS, HIDDEN)


def test_half_precision_heads_compute_in_it() -> None:
    heads = make(dtype=torch.bfloat16, own_projection=VOCAB)
    hidden, embeddings = torch.randn(2, HIDDEN).bfloat16(), torch.randn(2, HEADS, HIDDEN).bfloat16()
    wide = make(own_projection=VOCAB)
    wide.load_state_dict(heads.state_dict())
    for narrow, exact in zip(heads(hidden, embeddings), wide(hidden.float(), embeddings.float()), strict=True):
        assert narrow.dtype == torch.bfloat16
        torch.testing.assert_close(narrow.float(), exact, rtol=0.1, atol=0.1)
