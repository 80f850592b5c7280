"""The budget against brute force over all budgets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gorgon_engine.tree.cost_model import CostModel


def test_between_and_beyond_the_measured_points() -> None:
    model = CostModel(rows=(1, 4, 8), seconds=(1.0, 1.6, 4.0))
    assert model.step_seconds(1) == 1.0
    assert model.step_seconds(2) == 1.2
    assert model.step_seconds(6) == 2.8
    assert model.step_seconds(10) == pytest.approx(5.2)


def test_worthless_guesses_mean_plain_decoding() -> None:
    model = CostModel(rows=(1, 2, 4), seconds=(1.0, 1.1, 1.3))
    assert model.choose_nodes([[0.01, 0.01, 0.0]], max_nodes=4) == [1]
    assert model.choose_nodes([[0.9, 0.8, 0.0]], max_nodes=4) == [3]
    assert model.choose_nodes([[0.9, 0.8, 0.7]], max_nodes=2) == [2]


def test_rows_go_where_acceptance_is_likeliest() -> None:
    model = CostModel(rows=(2, 4, 8), seconds=(1.0, 1.05, 3.0))
    assert model.choose_nodes([[0.9, 0.8, 0.7], [0.1, 0.1, 0.1]], max_nodes=8) == [3, 1]


@given(
    probs=st.lists(st.floats(0.001, 1.0), min_size=0, max_size=12),
    increments=st.lists(st.floats(0.0, 1.0), min_size=12, max_size=12),
    draft=st.floats(0.0, 0.5),
)
def test_one_sequence_gets_the_best_rate(probs: list[float], increments: list[float], draft: float) -> None:
    probs = sorted(probs, reverse=True)
    seconds = [1.0]
    for increment in increments:
        seconds.append(seconds[-1] + increment)
    model = CostModel(rows=tuple(range(1, 14)), seconds=tuple(seconds), draft_seconds=draft)

    def rate(nodes: int) -> float:
        return (1.0 + sum(probs[: nodes - 1])) / (seconds[nodes - 1] + (draft if nodes > 1 else 0.0))

    (chosen,) = model.choose_nodes([probs], max_nodes=13)
    assert rate(chosen) >= max(rate(n) for n in range(1, len(probs) + 2)) - 1e-9
