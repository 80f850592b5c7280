"""What the pictures show: the very figures that were given."""

import io
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from trainer.evaluation.inputs import ACCURACIES, HISTORY, OFFSETS, measurement

from gorgon_trainer.evaluation import plots
from gorgon_trainer.evaluation.history import HistoryRecord


def drawn(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """Label -> (x, y) of every line with a label of its own."""
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    return {
        str(line.get_label()): ([float(x) for x in line.get_xdata()], [float(y) for y in line.get_ydata()])  # type: ignore[union-attr]
        for line in lines
    }


def legend(axes: Axes) -> list[str]:
    shown = axes.get_legend()
    return [] if shown is None else [text.get_text() for text in shown.get_texts()]


def test_losses_in_training_and_held_out() -> None:
    (axes,) = plots.loss_curves(HISTORY, OFFSETS).axes
    assert legend(axes) == ["offset 2", "offset 3", "offset 4", "training", "held-out"]
    x, y = drawn(axes)["offset 3"]
    assert x == pytest.approx([record.num_positions / 1e6 for record in HISTORY])
    assert y == [record.head_losses[1] for record in HISTORY]
    held_out = [line for line in axes.get_lines() if str(line.get_label()).startswith("_")]
    assert [list(line.get_ydata()) for line in held_out] == [[2.5, 2.5], [3.5, 3.5], [4.5, 4.5]]  # type: ignore[arg-type]
    for line, head in zip(held_out, ("offset 2", "offset 3", "offset 4"), strict=True):
        (own,) = (one for one in axes.get_lines() if one.get_label() == head)
        assert line.get_color() == own.get_color()


def test_long_runs_are_drawn_with_few_points() -> None:
    history = [HistoryRecord(step=n, num_positions=1000 * n, loss=1.0, head_losses=(float(n),)) for n in range(1, 5001)]
    (axes,) = plots.loss_curves(history, (2,)).axes
    x, y = drawn(axes)["offset 2"]
    assert 200 < len(x) <= 300
    assert sum(y) / len(y) == pytest.approx(2500.5, rel=0.01)
    assert legend(axes) == ["offset 2"]


def test_accuracies_by_rank_and_within_the_first() -> None:
    single, among = plots.head_accuracy(ACCURACIES, OFFSETS).axes
    assert drawn(single)["offset 2"] == ([1, 2, 3, 4], [0.5, 0.2, 0.1, 0.05])
    assert drawn(among)["offset 2"][1] == pytest.approx([0.5, 0.7, 0.8, 0.85])
    assert legend(single) == ["offset 2", "offset 3", "offset 4"]


def test_predicted_and_measured_lengths_by_nodes() -> None:
    series = {"heads": [measurement(32, 700), measurement(4, 500)], "both": [measurement(32, 900, sampled=False)]}
    (axes,) = plots.acceptance_lengths({4: 1.4, 32: 1.9}, series).axes
    assert drawn(axes) == {
        "predicted (fixed tree of the heads)": ([4, 32], [1.4, 1.9]),
        "heads, greedy": ([4, 32], [1.5, 1.7]),
        "heads, T=0.7": ([4, 32], [1.45, 1.65]),
        "both, greedy": ([32], [1.9]),
    }
    assert [tick for tick in axes.get_xticks() if 4 <= tick <= 32] == [4, 32]


def test_acceptance_by_depth() -> None:
    (axes,) = plots.acceptance_by_depth({"heads": measurement(32, 700)}).axes
    assert drawn(axes) == {"heads, greedy, 32 nodes": ([1], [0.7]), "heads, T=0.7, 32 nodes": ([1], [0.65])}


def test_more_drafters_than_colours_are_all_drawn() -> None:
    (axes,) = plots.acceptance_by_depth({f"kind {n}": measurement(32, 700, sampled=False) for n in range(9)}).axes
    assert len(drawn(axes)) == 9


@pytest.mark.parametrize(
    "figure",
    [
        pytest.param(lambda: plots.loss_curves(HISTORY, OFFSETS), id="loss"),
        pytest.param(lambda: plots.head_accuracy([(0.5,)], (2,)), id="one head, one rank"),
        pytest.param(lambda: plots.acceptance_lengths({}, {}), id="nothing"),
        pytest.param(lambda: plots.acceptance_lengths({1: 1.0}, {}), id="one point"),
    ],
)
def test_png_is_a_picture_and_always_the_same(figure: Any) -> None:
    first, second = (plots.as_png(made) for made in (figure(), figure()))
    assert isinstance(figure(), Figure)
    assert first == second
    pixels = np.asarray(imread(io.BytesIO(first)))  # [height, width, RGBA]
    assert pixels.shape[1] >= 1000
    assert len(np.unique(pixels[:, :, :3].reshape(-1, 3), axis=0)) > 10
