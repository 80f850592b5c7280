"""The budget against brute force over all budgets."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gorgon_engine.tree.cost_model import CostModel, Curve, Price


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


def test_sequences_of_a_batch_cost_what_was_measured_of_them() -> None:
    plain = Curve((1, 2, 8), (1.0, 1.5, 3.0))
    model = CostModel(rows=(1, 8, 16), seconds=(1.0, 2.4, 4.0), plain=plain)
    assert model.plain_seconds(8) == 3.0
    assert model.step_seconds(8, 8) == 3.0
    assert model.step_seconds(16, 8) == pytest.approx(3.0 + 4.0 - 2.4)
    assert model.step_seconds(1, 2) == 1.5, "never less than a plain step"


def test_trees_of_more_sequences_cost_more() -> None:
    model = CostModel(rows=(1, 64), seconds=(1.0, 1.0), draft_seconds=0.1, draft_seconds_each=0.05)
    assert model.tree_seconds(1) == pytest.approx(0.1)
    assert model.tree_seconds(5) == pytest.approx(0.3)
    worth = [[0.05, 0.04]]
    assert model.choose_nodes(worth, max_nodes=3) == [1], "0.09 tokens for 0.1 steps"
    assert model.choose_nodes([[0.9]] * 5, max_nodes=3) == [2] * 5


def test_the_same_guesses_that_pay_for_one_stream_do_not_for_sixteen() -> None:
    """Rows are nearly free up to 16, then each costs a sixteenth of a step."""
    model = CostModel(rows=(1, 16, 32), seconds=(1.0, 1.02, 2.02))
    guesses = [0.6, 0.3, 0.2, 0.1]
    assert model.choose_nodes([guesses], max_nodes=5) == [5]
    assert model.choose_nodes([guesses] * 16, max_nodes=5) == [1] * 16


def test_a_gain_that_is_too_small_is_none() -> None:
    model = CostModel(rows=(1, 2), seconds=(1.0, 1.0))
    assert model.choose_nodes([[0.015]], max_nodes=2) == [2]
    assert model.choose_nodes([[0.015]], max_nodes=2, least_gain=1.02) == [1]
    assert model.choose_nodes([[0.025]], max_nodes=2, least_gain=1.02) == [2]


@given(budget=st.floats(0.0, 10.0), least=st.integers(1, 20), more=st.integers(0, 60))
def test_the_longest_pass_within_a_time(budget: float, least: int, more: int) -> None:
    curve = Curve((4, 16), (1.0, 2.0))
    fitting = [count for count in range(least, least + more + 1) if curve.at(count) <= budget]
    assert curve.longest_within(budget, least=least, most=least + more) == max(fitting, default=least)


@given(
    worth=st.lists(st.lists(st.floats(0.0, 1.0), max_size=8), min_size=1, max_size=9),
    increments=st.lists(st.floats(0.0, 1.0), min_size=16, max_size=16),
    tree=st.floats(0.0, 0.5),
    each=st.floats(0.0, 0.1),
    spent=st.floats(0.0, 0.5),
    gain=st.floats(1.0, 1.1),
)
def test_nothing_is_chosen_that_does_not_pay_its_price(
    worth: list[list[float]], increments: list[float], tree: float, each: float, spent: float, gain: float
) -> None:
    seconds = tuple(itertools.accumulate(increments, initial=1.0))
    model = CostModel(rows=tuple(range(1, 18)), seconds=seconds, draft_seconds=tree, draft_seconds_each=each)
    worth = [sorted(probs, reverse=True) for probs in worth]
    nodes = model.choose_nodes(worth, max_nodes=9, spent_seconds=spent, least_gain=gain)
    price = model.price(len(worth), spent_seconds=spent, least_gain=gain)
    promised = sum(max(p - price.row, 0.0) for probs in worth for p in probs)
    if promised < price.tree - 1e-9:
        assert nodes == [1] * len(worth)


def test_the_price_of_a_row_is_that_of_the_cheapest() -> None:
    model = CostModel(rows=(1, 2, 4), seconds=(1.0, 1.5, 1.6), draft_seconds=0.25)
    assert model.price(1) == Price(row=pytest.approx(0.05), tree=pytest.approx(0.25)), "as behind the fourth"
    convex = CostModel(rows=(1, 2, 4), seconds=(1.0, 1.5, 3.0))
    assert convex.price(1).row == pytest.approx(0.5)
    assert convex.price(2, least_gain=1.1).row == pytest.approx(1.1 * 2 / 1.5 * 0.75)


@given(
    path_probs=st.lists(st.lists(st.floats(0.001, 1.0), max_size=12), min_size=1, max_size=4),
    increments=st.lists(st.floats(0.0, 1.0), min_size=6, max_size=6),
    padding=st.integers(0, 2),
    least_gain=st.floats(1.0, 1.5),
)
def test_one_width_for_all_gets_the_best_rate(
    path_probs: list[list[float]], increments: list[float], padding: int, least_gain: float
) -> None:
    path_probs = [sorted(probs, reverse=True) for probs in path_probs]
    rows = (1, 2, 4, 8, 16, 32)
    model = CostModel(rows=rows, seconds=tuple(1.0 + s for s in itertools.accumulate(increments)), draft_seconds=0.1)
    padded, widths = len(path_probs) + padding, (1, 2, 8, 12)

    def rate(width: int) -> float:
        tokens = sum(1 + sum(probs[: width - 1]) for probs in path_probs)
        if width == 1:
            return least_gain * tokens / model.step_seconds(padded, padded)
        return tokens / (model.step_seconds(padded * width, padded) + model.tree_seconds(padded))

    chosen = model.choose_width(path_probs, widths=widths, num_padded=padded, least_gain=least_gain)
    assert chosen in widths
    assert rate(chosen) == pytest.approx(max(rate(width) for width in widths))
