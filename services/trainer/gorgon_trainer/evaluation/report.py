"""The report of a run: Markdown with its pictures beside it. Tables first, plots after."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gorgon_protocol.errors import BadRequestError, TrainingError
from gorgon_trainer.evaluation import plots
from gorgon_trainer.evaluation.figures import Measurement, SamplingResult
from gorgon_trainer.evaluation.hardware import Hardware
from gorgon_trainer.evaluation.history import HistoryRecord, last_held_out
from gorgon_trainer.evaluation.markdown import Cell, code, document, duration, percent, section, table
from gorgon_trainer.evaluation.predicted import REPORTED_NODES, predicted_acceptance_lengths
from gorgon_trainer.files import written_whole

REPORT_FILE = "report.md"


@dataclass(frozen=True, slots=True)
class ReportInputs:
    """Plain data; what is empty is left out of the report."""

    title: str
    offsets: tuple[int, ...] = ()  # of the heads, in the order of all that has a value a head
    accuracies: tuple[tuple[float, ...], ...] = ()  # [head][rank]: shares of held-out positions
    history: Sequence[HistoryRecord] = ()
    measurements: Mapping[str, Sequence[Measurement]] = field(default_factory=dict)  # by drafters: "heads", ...
    settings: Mapping[str, Cell] = field(default_factory=dict)
    data: Mapping[str, Cell] = field(default_factory=dict)  # its volume
    seconds: Mapping[str, float] = field(default_factory=dict)  # of every stage
    hardware: Hardware | None = None
    commands: Sequence[str] = ()  # as typed, in order

    def __post_init__(self) -> None:
        count = len(self.offsets)
        wrong = [
            *(["accuracies"] if self.accuracies and len(self.accuracies) != count else []),
            *("history" for record in self.history if not 1 <= len(record.head_losses) <= count),
            *("history" for record in self.history if len(record.held_out_losses) not in (0, count)),
        ]
        if wrong:
            raise BadRequestError(f"{self.title}: {wrong[0]} is not of {count} heads, one an offset")

    @property
    def predicted(self) -> dict[int, float]:
        """Nodes -> tokens a step that the accuracies promise; empty without heads that guess beyond offset 1."""
        rows = tree_accuracies(self.accuracies, self.offsets)
        nodes = {one.max_nodes for series in self.measurements.values() for one in series}
        return predicted_acceptance_lengths(rows, sorted(nodes | set(REPORTED_NODES))) if rows else {}


def tree_accuracies(accuracies: Sequence[Sequence[float]], offsets: Sequence[int]) -> list[Sequence[float]]:
    """The rows of the heads that guess depths 1, 2, ... of a tree: offsets 2, 3, ... without a gap."""
    by_offset = dict(zip(offsets, accuracies, strict=False))
    rows: list[Sequence[float]] = []
    while (offset := len(rows) + 2) in by_offset:
        rows.append(by_offset[offset])
    return rows


def render_report(inputs: ReportInputs) -> dict[str, bytes]:
    """File name -> content: `report.md` and the pictures that it shows."""
    pictures = _pictures(inputs)
    shown = [f"![{alt}]({name})" for name, (alt, _) in pictures.items()]
    text = document(
        f"# {inputs.title}",
        section("Tokens per verification step", lengths_table(inputs)),
        section("What was measured", _measured_notes(inputs), _answers_table(inputs), _sources_table(inputs)),
        section("Accuracy of the heads", accuracy_table(inputs)),
        section("Training", _training_table(inputs), _pairs(inputs.settings, "setting")),
        section("Data", _pairs(inputs.data, "data")),
        section("Time", time_table(inputs)),
        section("Hardware", table(["", ""], inputs.hardware.rows()) if inputs.hardware else ""),
        section("Commands", code(inputs.commands) if inputs.commands else ""),
        section("Plots", *shown),
    )
    return {name: png for name, (_, png) in pictures.items()} | {REPORT_FILE: text}


def write_report(folder: Path, inputs: ReportInputs) -> Path:
    """Write the report into a folder, over an earlier one, its text last; return the path of `report.md`.

    Raises `TrainingError` where it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in render_report(inputs).items():
            with written_whole(folder / name) as file:
                file.write(content)
    except OSError as error:
        raise TrainingError(f"{folder}: the report cannot be written: {error.strerror}") from error
    return folder / REPORT_FILE


def lengths_table(inputs: ReportInputs) -> str:
    """Tokens a step by nodes: predicted, and measured for every drafter and sampling."""
    predicted = inputs.predicted
    columns = [
        (name, greedy, result.name)
        for name, series in inputs.measurements.items()
        for greedy in (True, False)
        if (result := next((r for one in series if (r := one.result(greedy=greedy)) is not None), None)) is not None
    ]
    by_nodes = {name: {one.max_nodes: one for one in series} for name, series in inputs.measurements.items()}
    nodes = sorted({*predicted, *(n for series in by_nodes.values() for n in series)})
    if not nodes:
        return ""
    header = ["nodes", *(["predicted"] if predicted else [])]
    for name, _, sampling in columns:
        header += [f"{name}, {sampling}", "not looping"]
    rows: list[list[Cell]] = []
    for number in nodes:
        row: list[Cell] = [number, *([predicted.get(number)] if predicted else [])]
        for name, greedy, _ in columns:
            measurement = by_nodes[name].get(number)
            result = None if measurement is None else measurement.result(greedy=greedy)
            row += _both_lengths(result)
        rows.append(row)
    return table(header, rows)


def accuracy_table(inputs: ReportInputs) -> str:
    """Share of held-out positions by offset and rank, and the shares within the first three and all."""
    if not inputs.accuracies:
        return ""
    num_ranks = len(inputs.accuracies[0])
    within = sorted({min(3, num_ranks), num_ranks})
    header = ["offset", *(f"rank {rank}" for rank in range(1, 1 + num_ranks)), *(f"first {n}" for n in within)]
    rows: list[list[Cell]] = [
        [offset, *map(percent, row), *(percent(sum(row[:n])) for n in within)]
        for offset, row in zip(inputs.offsets, inputs.accuracies, strict=True)
    ]
    return table(header, rows)


def time_table(inputs: ReportInputs) -> str:
    rows: list[tuple[str, str]] = [(stage, duration(seconds)) for stage, seconds in inputs.seconds.items()]
    if len(rows) > 1:
        rows.append(("together", duration(sum(inputs.seconds.values()))))
    return table(["stage", "time"], rows) if rows else ""


def _both_lengths(result: SamplingResult | None) -> list[Cell]:
    if result is None:
        return [None, None]
    return [result.answers.mean_acceptance_length, result.non_looping.mean_acceptance_length]


def _measured_notes(inputs: ReportInputs) -> str:
    if not inputs.measurements:
        return ""
    return (
        "Tokens per step are all tokens that verification steps gave over all steps, by running the engine. Nodes "
        "count the root. An answer loops where it has at least 128 tokens and its last 96 repeat with a period of at "
        "most 48. "
        "The prediction is of a fixed tree of the heads alone, from their accuracies on held-out text."
    )


def _answers_table(inputs: ReportInputs) -> str:
    rows: list[list[Cell]] = []
    for name, series in inputs.measurements.items():
        for one in series:
            for result in one.results:
                looping = result.answers.num_answers - result.non_looping.num_answers
                rows.append([
                    name, one.max_nodes, result.name, one.num_prompts, len(result.seeds), one.max_tokens,
                    result.answers.num_answers, looping, result.answers.num_steps, result.num_identical,
                    one.kernels,
                ])  # fmt: skip
    header = ["drafters", "nodes", "sampling", "prompts", "seeds", "most tokens", "answers", "looping", "steps",
              "as plain decoding", "kernels"]  # fmt: skip
    return table(header, rows) if rows else ""


def _sources_table(inputs: ReportInputs) -> str:
    rows: list[list[Cell]] = [
        [name, one.max_nodes, result.name, source, figures.num_drafted, figures.num_accepted,
         percent(figures.num_accepted / max(figures.num_drafted, 1))]
        for name, series in inputs.measurements.items()
        for one in series
        for result in one.results
        for source, figures in (result.sources or {}).items()
    ]  # fmt: skip
    return table(["drafters", "nodes", "sampling", "source", "drafted", "accepted", "share"], rows) if rows else ""


def _training_table(inputs: ReportInputs) -> str:
    if not inputs.history:
        return ""
    last, held_out = inputs.history[-1], last_held_out(inputs.history)
    rows: list[list[Cell]] = []
    for head, offset in enumerate(inputs.offsets):
        out = None if held_out is None else held_out.held_out_losses[head]
        trained = last.head_losses[head] if head < len(last.head_losses) else None
        rows.append([offset, trained, out])
    losses = table(["offset", "training loss", "held-out loss"], rows)
    speed = f", {last.positions_per_second:,.0f} positions/s" if last.positions_per_second else ""
    return f"{last.step:,} steps, {last.num_positions:,} positions{speed}.\n\n{losses}"


def _pairs(values: Mapping[str, Cell], name: str) -> str:
    return table([name, ""], values.items()) if values else ""


def _pictures(inputs: ReportInputs) -> dict[str, tuple[str, bytes]]:
    """File name -> (what it shows, PNG)."""
    pictures = {}
    if len(inputs.history) > 1:
        pictures["loss.png"] = ("Loss of every head", plots.loss_curves(inputs.history, inputs.offsets))
    if inputs.accuracies:
        figure = plots.head_accuracy(inputs.accuracies, inputs.offsets)
        pictures["accuracy.png"] = ("Accuracy per head and rank", figure)
    predicted = inputs.predicted
    if predicted or any(inputs.measurements.values()):
        figure = plots.acceptance_lengths(predicted, inputs.measurements)
        pictures["acceptance_length.png"] = ("Tokens per step against nodes", figure)
    largest = {
        name: max(series, key=lambda one: one.max_nodes) for name, series in inputs.measurements.items() if series
    }
    if largest:
        pictures["acceptance_by_depth.png"] = ("Acceptance by depth", plots.acceptance_by_depth(largest))
    return {name: (alt, plots.as_png(figure)) for name, (alt, figure) in pictures.items()}
