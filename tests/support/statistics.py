"""Goodness of fit of drawn tokens."""

import torch
from scipy import stats

_MIN_EXPECTED = 8.0


def chi_square_pvalue(tokens: torch.Tensor, probs: torch.Tensor) -> float:
    """Pearson's test of drawn tokens [n] against probs [V].

    Tokens are taken in descending order of probability and pooled until a cell expects enough draws.
    """
    observed = torch.bincount(tokens, minlength=probs.shape[0]).double()
    expected = probs.double() * tokens.shape[0]
    order = torch.argsort(expected, descending=True)
    cell = torch.zeros_like(order)
    number, filled = 0, 0.0
    for place, value in enumerate(expected[order].tolist()):
        cell[place] = number
        filled += value
        if filled >= _MIN_EXPECTED:
            number, filled = number + 1, 0.0
    # What is left over is too little for a cell of its own.
    cell = cell.clamp(max=max(number - 1, 0))
    cells_observed = torch.zeros(number, dtype=torch.float64).scatter_add_(0, cell, observed[order])
    cells_expected = torch.zeros(number, dtype=torch.float64).scatter_add_(0, cell, expected[order])
    assert number >= 2, "too few draws for a test"
    return float(stats.chisquare(cells_observed.numpy(), cells_expected.numpy(), sum_check=False).pvalue)
