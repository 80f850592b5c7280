"""The likeliest tokens of a distribution, against a sort of the whole of it."""

import pytest
import torch

from gorgon_engine.drafters.choices import top, top_log_probs


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("vocab_size", [63, 64, 640, 700, 6400])
@pytest.mark.parametrize("count", [1, 10, 70])
def test_the_largest_of_many_values_are_found(vocab_size: int, count: int) -> None:
    """Distinct values, so that the order is one; the largest ones now all in one block, now scattered."""
    values = torch.randperm(6 * vocab_size, generator=torch.Generator().manual_seed(vocab_size)).view(6, -1).float()
    values[0] = values[0].sort().values
    values[5, : vocab_size // 2] = -torch.inf
    best, places = top(values, count)
    expected = values.topk(min(count, vocab_size), dim=1)
    assert torch.equal(best, expected.values)
    assert torch.equal(values.gather(1, places), best)


def test_equal_values_are_found_at_different_places() -> None:
    values = torch.zeros(2, 640)
    values[1, 100:103] = 1.0
    best, places = top(values, 5)
    assert torch.equal(best, values.topk(5, dim=1).values)
    assert torch.equal(values.gather(1, places), best)
    assert all(len(set(row)) == 5 for row in places.tolist())


@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 640), (2, 1, 3, 65)])
@pytest.mark.parametrize("count", [1, 4, 200])
def test_choices_are_the_first_of_a_sorted_log_softmax(shape: tuple[int, ...], count: int) -> None:
    logits = random_logits(*shape)
    log_probs, tokens = top_log_probs(logits, count)
    ordered = torch.log_softmax(logits, dim=-1).sort(dim=-1, descending=True)
    kept = min(count, shape[-1])
    assert log_probs.shape == tokens.shape == (*shape[:-1], kept)
    assert (log_probs.dtype, tokens.dtype) == (torch.float32, torch.int64)
    assert torch.equal(tokens, ordered.indices[..., :kept])
    torch.testing.assert_close(log_probs, ordered.values[..., :kept])


def test_what_is_left_out_still_counts() -> None:
    """A probability is one among all tokens, not among those that were chosen."""
    log_probs, _ = top_log_probs(torch.zeros(1, 50), 5)
    torch.testing.assert_close(log_probs.exp(), torch.full((1, 5), 1 / 50))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_of_other_precisions_are_taken(dtype: torch.dtype) -> None:
    logits = random_logits(3, 5, 40).to(dtype)
    log_probs, tokens = top_log_probs(logits, 6)
    assert log_probs.dtype == torch.float32
    expected = torch.log_softmax(logits.float(), dim=2).gather(2, tokens)
    torch.testing.assert_close(log_probs, expected)
    assert torch.equal(log_probs, log_probs.sort(dim=2, descending=True).values)


def test_views_are_read_as_they_are() -> None:
    whole = random_logits(6, 5, 40)
    for view in (whole[::2], whole[:, 1:3], whole.transpose(0, 1), whole[..., 3:20], whole[:1].expand(4, -1, -1)):
        for got, expected in zip(top_log_probs(view, 3), top_log_probs(view.contiguous(), 3), strict=True):
            assert torch.equal(got, expected)


def test_tokens_that_cannot_be_have_no_probability() -> None:
    logits = torch.full((2, 10), -torch.inf)
    logits[:, 3] = 1.0
    log_probs, tokens = top_log_probs(logits, 4)
    assert tokens[:, 0].tolist() == [3, 3]
    assert log_probs[:, 0].tolist() == [0.0, 0.0]
    assert (log_probs[:, 1:] == -torch.inf).all()
