"""What a training run tells people: a line of JSON every few steps, and TensorBoard."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from gorgon_trainer.files import written_whole

HISTORY_FILE = "history.jsonl"


class RunLog:
    """`history.jsonl` and TensorBoard, on one process only. What a resumed run does again is written again."""

    def __init__(self, folder: Path, step: int, *, on: bool) -> None:
        self._on = on
        self._path = folder / HISTORY_FILE
        self._tensorboard: Any = None
        if not on:
            return
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

    def write(self, record: dict[str, Any]) -> None:
        if not self._on:
            return
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
