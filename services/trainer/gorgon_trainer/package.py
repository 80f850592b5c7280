"""From a finished training run to a checkpoint folder: weights, manifest, model card."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from gorgon_engine.heads.checkpoint import save_heads
from gorgon_engine.heads.families import family_fields
from gorgon_protocol.manifest import HeadsManifest, TrainingRecord
from gorgon_trainer.evaluation.predicted import recommended_tree
from gorgon_trainer.mixture import ShardMixture
from gorgon_trainer.shards import ShardSet
from gorgon_trainer.train_config import TrainConfig
from gorgon_trainer.training import TrainResult

_RECOMMENDED_NODES = 64


@dataclass(frozen=True, slots=True)
class CheckpointName:
    name: str
    version: str

    @property
    def folder(self) -> str:
        return f"{self.name}@{self.version}"


def checkpoint_manifest(
    result: TrainResult, shards: ShardSet | ShardMixture, config: TrainConfig, name: CheckpointName, *, data: str
) -> HeadsManifest:
    """What the heads of a run are: for the backbone of the shards, with the figures that training measured."""
    held_out, vocabulary = result.held_out, result.draft_vocabulary
    accuracies = [tuple(round(share, 5) for share in row) for row in held_out.accuracies]
    for_tree = [row for row, offset in zip(accuracies, config.offsets, strict=True) if offset > 1]
    figures = {
        "train_sequences": shards.num_sequences("train"),
        "train_tokens": shards.num_tokens("train"),
        "train_answer_tokens": shards.num_targets("train"),
        "train_positions": result.num_positions,
        "train_steps": result.num_steps,
        "train_seconds": round(result.seconds, 1),
        "positions_per_second": round(result.positions_per_second, 1),
        "held_out_positions": held_out.num_positions,
        "held_out_acceptance_length_32": round(held_out.acceptance_length(config.offsets), 4),
    }
    if result.peak_memory_bytes is not None:
        figures["peak_gpu_memory_gib"] = round(result.peak_memory_bytes / 2**30, 2)
    fields = family_fields(result.heads)
    return HeadsManifest.model_validate(
        {
            **fields,
            "name": name.name,
            "version": name.version,
            "backbone": shards.index.backbone,
            "vocab_size": shards.index.vocab_size,
            "offsets": config.offsets,
            "draft_vocab_size": None if vocabulary is None else vocabulary.numel(),
            "dtype": "bfloat16",
            "quantization": shards.index.quantization,
            "accuracies": tuple(accuracies),
            "recommended_tree": tuple(recommended_tree(for_tree, _RECOMMENDED_NODES)) or None,
            "training": TrainingRecord(
                data=data,
                created=datetime.now(UTC).replace(microsecond=0),
                settings={key: value for key, value in config.as_json().items() if value is not None},
                figures={key: float(value) for key, value in figures.items()},
            ),
        }
    )


def write_checkpoint(
    result: TrainResult,
    manifest: HeadsManifest,
    folder: Path,
    *,
    max_file_bytes: int | None = None,
    extra_files: dict[str, bytes] | None = None,
) -> HeadsManifest:
    """Write `<folder>/<name>@<version>`. Raises `HeadsError` where it exists or cannot be written."""
    return save_heads(
        folder / CheckpointName(manifest.name, manifest.version).folder,
        result.heads,
        manifest,
        draft_vocabulary=result.draft_vocabulary,
        max_file_bytes=max_file_bytes,
        extra_files=extra_files,
    )
