"""What a training run tells people: a line of JSON every few steps, TensorBoard, and Prometheus where it is asked."""

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gorgon_trainer.files import written_whole

if TYPE_CHECKING:
    from gorgon_trainer.metrics import TrainerMetrics

HISTORY_FILE = "history.jsonl"


class RunLog:
    """`history.jsonl`, TensorBoard and metrics, on one process only. What a resumed run does again is written again."""

    def __init__(
        self,
        folder: Path,
        step: int,
        *,
        on: bool,
        max_steps: int,
        saved_at: float | None = None,
        metrics: "TrainerMetrics | None" = None,
    ) -> None:
        """step: behind which the run goes on; saved_at: since when that step is on the disk, Unix time."""
        self._on = on
        self._metrics = metrics if on else None
        self._path = folder / HISTORY_FILE
        self._tensorboard: Any = None
        if not on:
            return
        if metrics is not None:
            metrics.training(step=step, max_steps=max_steps, saved_at=saved_at)
        from torch.utils.tensorboard import SummaryWriter

        kept = [record for record in read_history(folder) if record["step"] <= step]
        with written_whole(self._path) as file:
            file.writelines(json.dumps(record).encode() + b"\n" for record in kept)
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()

    def stepped(self, step: int, num_positions: int) -> None:
        """num_positions: of this step."""
        if self._metrics is not None:
            self._metrics.stepped(step, num_positions)

    def saved(self, step: int) -> None:
        if self._metrics is not None:
            self._metrics.saved(step)

    def write(self, record: dict[str, Any]) -> None:
        if not self._on:
            return
        if self._metrics is not None:
            self._metrics.logged(record)
        with self._path.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
        step = record["step"]
        for name in ("loss", "learning_rate", "positions_per_second"):
            self._tensorboard.add_scalar(name, record[name], step)
        for head, loss in enumerate(record["head_losses"]):
            self._tensorboard.add_scalar(f"head_loss/{head + 1}", loss, step)
        if "held_out" in record:
            measured = record["held_out"]
            self._tensorboard.add_scalar("held_out/acceptance_length", measured["acceptance_length"], step)
            for head, row in enumerate(measured["accuracies"]):
                self._tensorboard.add_scalar(f"held_out/top_1/{head + 1}", row[0], step)
        for number, length in enumerate(record.get("held_out_of_each", ()), 1):
            self._tensorboard.add_scalar(f"held_out/acceptance_length/{number}", length, step)


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's `history.jsonl`, none where there is no file. A last line cut off by a kill is dropped."""
    path = folder / HISTORY_FILE
    records = []
    if path.exists():
        for line in path.read_text().splitlines():
            with suppress(ValueError):
                records.append(json.loads(line))
    return records
