"""A run's figures, made up but of one piece."""

from typing import Any

from gorgon_trainer.evaluation.figures import Measurement, SamplingResult, SourceFigures, StepFigures
from gorgon_trainer.evaluation.hardware import Hardware
from gorgon_trainer.evaluation.history import HistoryRecord
from gorgon_trainer.evaluation.report import ReportInputs

OFFSETS = (2, 3, 4)
ACCURACIES = ((0.5, 0.2, 0.1, 0.05), (0.4, 0.15, 0.1, 0.05), (0.3, 0.1, 0.05, 0.04))
HARDWARE = Hardware("NVIDIA H100", 4, 80 * 2**30, "Xeon", 16, "2.11.0", "12.8")
HISTORY = [
    HistoryRecord(
        step=20 * number,
        num_positions=160_000 * number,
        loss=9.0 / number,
        head_losses=(2.0 / number, 3.0 / number, 4.0 / number),
        learning_rate=1e-3,
        positions_per_second=512_345.6,
        held_out_losses=(2.5, 3.5, 4.5) if number % 4 == 0 else (),
    )
    for number in range(1, 10)
]


def figures(num_answers: int, num_steps: int, num_accepted: int) -> StepFigures:
    """Steps that accepted one draft each, and some that accepted none."""
    return StepFigures(
        num_answers=num_answers,
        num_steps=num_steps,
        num_draft_tokens=7 * num_steps,
        acceptance_histogram=(num_steps - num_accepted, num_accepted),
    )


def measurement(max_nodes: int, accepted: int, *, sampled: bool = True) -> Measurement:
    greedy = SamplingResult(
        temperature=0.0,
        seeds=(0,),
        answers=figures(80, 1000, accepted),
        non_looping=figures(60, 1000, accepted - 100),
        sources={"head": SourceFigures(7000, accepted)},
        num_identical=79,
    )
    warm = SamplingResult(0.7, (0, 1, 2), figures(240, 1000, accepted - 50), figures(238, 1000, accepted - 60))
    return Measurement(
        max_nodes=max_nodes,
        adaptive=False,
        kernels="torch-bfloat16",
        num_prompts=80,
        num_skipped=0,
        max_tokens=256,
        num_tokens=5000,
        seconds=12.5,
        results=(greedy, warm) if sampled else (greedy,),
    )


def inputs(**values: Any) -> ReportInputs:
    full: dict[str, Any] = {
        "title": "Heads tiny@1",
        "offsets": OFFSETS,
        "accuracies": ACCURACIES,
        "history": HISTORY,
        "measurements": {
            "heads": [measurement(4, 500), measurement(32, 700)],
            "heads + lookup": [measurement(32, 900, sampled=False)],
        },
        "settings": {"family": "hydra", "learning_rate": 0.003},
        "data": {"answers": 31188},
        "seconds": {"distill": 104.3, "train": 75.0},
        "hardware": HARDWARE,
        "commands": ["gorgon train data --out data", "gorgon train heads --shards shards"],
    }
    return ReportInputs(**(full | values))
