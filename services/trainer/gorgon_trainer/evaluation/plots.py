"""The report's pictures. Nothing here touches pyplot or any other global state: a figure is a value.

Colours: a head's is its place on one scale, from near offsets to far ones; a drafter's comes from a palette that stays
distinct for colour-blind readers (Okabe and Ito, 2008). Dashes always mean the same within one picture.
"""

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from gorgon_trainer.evaluation.figures import Measurement
from gorgon_trainer.evaluation.history import HistoryRecord

_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_INK, _MUTED, _GRID = "#222222", "#767676", "#E4E4E4"
_DPI = 150
_HELD_OUT: dict[str, Any] = {"linewidth": 1.2, "linestyle": (0, (3, 2)), "marker": "o", "markersize": 4}
_MAX_POINTS = 300  # of a curve: more only paints over itself


def loss_curves(history: Sequence[HistoryRecord], offsets: Sequence[int]) -> Figure:
    """Every head's loss, training and held-out, against the positions trained on."""
    figure, axes = _figure()
    held_out = [record for record in history if record.held_out_losses]
    unit, name = (1e6, "million") if history[-1].num_positions >= 1e6 else (1e3, "thousand")
    for number, (offset, color) in enumerate(zip(offsets, _head_colors(len(offsets)), strict=True)):
        trained = [record for record in history if number < len(record.head_losses)]
        points = [(record.num_positions / unit, record.head_losses[number]) for record in trained]
        axes.plot(*_columns(_thinned(points)), color=color, linewidth=1.6, label=f"offset {offset}")
        points = [(record.num_positions / unit, record.held_out_losses[number]) for record in held_out]
        axes.plot(*_columns(points), color=color, **_HELD_OUT)
    axes.set(title="Loss of every head", xlabel=f"{name} positions trained on", ylabel="loss (nats)")
    axes.margins(x=0.01)
    heads = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    styles = [
        Line2D([], [], color=_MUTED, linewidth=1.6, label="training"),
        Line2D([], [], color=_MUTED, label="held-out", **_HELD_OUT),
    ]
    _legend(axes, [*heads, *styles] if held_out else heads)
    return figure


def head_accuracy(accuracies: Sequence[Sequence[float]], offsets: Sequence[int]) -> Figure:
    """How often each choice of a head is the right token, and how often it is among the first ones."""
    figure = _blank(width=9.0)
    single, among = figure.subplots(1, 2)
    ranks = range(1, 1 + len(accuracies[0]))
    for row, offset, color in zip(accuracies, offsets, _head_colors(len(offsets)), strict=True):
        style = {"color": color, "linewidth": 1.6, "marker": "o", "markersize": 4, "label": f"offset {offset}"}
        single.plot(ranks, row, **style)
        among.plot(ranks, [sum(row[:rank]) for rank in ranks], **style)
    for axes, title, label in (
        (single, "Right with this choice", "choice of the head"),
        (among, "Right within the first choices", "number of choices"),
    ):
        _style(axes)
        axes.set(title=title, xlabel=label, ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    single.set_ylabel("share of held-out positions")
    _legend(single)
    return figure


def acceptance_lengths(predicted: Mapping[int, float], measurements: Mapping[str, Sequence[Measurement]]) -> Figure:
    """Tokens a step against the size of the tree, as the accuracies promise it and as it was measured."""
    figure, axes = _figure()
    nodes = sorted({*predicted, *(one.max_nodes for series in measurements.values() for one in series)})
    if predicted:
        axes.plot(
            *_columns(sorted(predicted.items())), color=_MUTED, linewidth=1.6, linestyle=":", marker="D", markersize=4,
            label="predicted (fixed tree of the heads)",
        )  # fmt: skip
    for (name, series), color in zip(measurements.items(), cycle(_PALETTE), strict=False):
        for greedy in (True, False):
            points, label = _lengths(series, greedy)
            if points:
                axes.plot(*_columns(points), color=color, label=f"{name}, {label}", **_sampling_style(greedy))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(nodes))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(title="Tokens per verification step", xlabel="nodes of the tree, root included", ylabel="tokens per step")
    _legend(axes)
    return figure


def acceptance_by_depth(measurements: Mapping[str, Measurement]) -> Figure:
    """The share of steps that accepted at least so many drafts."""
    figure, axes = _figure()
    for (name, measurement), color in zip(measurements.items(), cycle(_PALETTE), strict=False):
        for greedy in (True, False):
            result = measurement.result(greedy=greedy)
            if result is not None:
                shares = result.answers.acceptance_by_depth
                label = f"{name}, {result.name}, {measurement.max_nodes} nodes"
                axes.plot(range(1, 1 + len(shares)), shares, color=color, label=label, **_sampling_style(greedy))
    axes.set(title="How deep trees are accepted", xlabel="depth", ylabel="share of steps accepting so deep")
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _legend(axes)
    return figure


def as_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without a date and a program's version in it, the same figures give the same file.
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _lengths(series: Sequence[Measurement], greedy: bool) -> tuple[list[tuple[float, float]], str]:
    """(nodes, tokens a step) of one sampling, and the sampling's name."""
    points: list[tuple[float, float]] = []
    label = ""
    for measurement in sorted(series, key=lambda one: one.max_nodes):
        result = measurement.result(greedy=greedy)
        length = None if result is None else result.answers.mean_acceptance_length
        if result is not None and length is not None:
            points.append((measurement.max_nodes, length))
            label = result.name
    return points, label


def _sampling_style(greedy: bool) -> dict[str, Any]:
    return {
        "linewidth": 1.8,
        "linestyle": "-" if greedy else (0, (4, 2)),
        "marker": "o" if greedy else "s",
        "markersize": 5 if greedy else 4.5,
    }


def _head_colors(count: int) -> list[tuple[float, float, float, float]]:
    scale = matplotlib.colormaps["viridis"]
    return [scale(0.08 + 0.78 * head / max(count - 1, 1)) for head in range(count)]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of neighbouring points, so that at most `_MAX_POINTS` are left."""
    size = -(-len(points) // _MAX_POINTS)
    groups = [points[at : at + size] for at in range(0, len(points), size)] if points else []
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _figure() -> tuple[Figure, Axes]:
    figure = _blank(width=7.2)
    axes = figure.subplots()
    _style(axes)
    return figure, axes


def _blank(width: float) -> Figure:
    return Figure(figsize=(width, 4.4), dpi=_DPI, layout="constrained", facecolor="white")


def _style(axes: Axes) -> None:
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, labelcolor=_INK, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_MUTED)


def _legend(axes: Axes, handles: Sequence[Line2D] | None = None) -> None:
    """Of the given lines, or of all; none where nothing was drawn."""
    handles = axes.get_lines() if handles is None else handles
    if handles:
        axes.legend(handles=list(handles), frameon=False, fontsize=9, labelcolor=_INK, handlelength=3.2)
