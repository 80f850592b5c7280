"""Several folders of shards in one run: as if they were one, but for how often the packs of each come.

So a small folder of what a large one lacks is gone through many times while the large one goes on.
"""

from collections.abc import Sequence

from gorgon_protocol.errors import DataError, TrainingError
from gorgon_trainer.dataset import JoinedPacks, PackedDataset
from gorgon_trainer.shards import ShardIndex, ShardSet, Split
from gorgon_trainer.train_config import TrainConfig


class ShardMixture:
    """Shard folders that answer for one backbone, in one quantisation."""

    def __init__(self, folders: Sequence[ShardSet]) -> None:
        """Raises `DataError` where their answers are of different backbones, or a folder is given twice."""
        assert folders, "no shards"
        self.folders = tuple(folders)
        first = self.folders[0]
        for number, other in enumerate(self.folders[1:], 1):
            for what, theirs, ours in (
                ("backbone", other.index.backbone.identity[:12], first.index.backbone.identity[:12]),
                ("quantization", other.index.quantization, first.index.quantization),
                ("vocab_size", other.index.vocab_size, first.index.vocab_size),
            ):
                if theirs != ours:
                    raise DataError(
                        f"{other.folder}: cannot be mixed with {first.folder}: {what} {theirs}, not {ours}: distil "
                        "both with the same backbone"
                    )
            same = [one for one in self.folders[:number] if one.index.fingerprint == other.index.fingerprint]
            if same:
                raise DataError(
                    f"{other.folder}: holds the same answers as {same[0].folder}: give each once, and --shares to "
                    "have some more often"
                )

    @property
    def index(self) -> ShardIndex:
        """Of the first folder: whose backbone, quantisation and vocabulary are those of all."""
        return self.folders[0].index

    @property
    def fingerprint(self) -> str | list[str]:
        """What a run is resumed by: of one folder its own."""
        fingerprints = [folder.index.fingerprint for folder in self.folders]
        return fingerprints[0] if len(fingerprints) == 1 else fingerprints

    @property
    def name(self) -> str:
        return ", ".join(str(folder.folder) for folder in self.folders)

    def num_sequences(self, split: Split) -> int:
        return sum(folder.num_sequences(split) for folder in self.folders)

    def num_tokens(self, split: Split) -> int:
        return sum(folder.num_tokens(split) for folder in self.folders)

    def num_targets(self, split: Split) -> int:
        return sum(folder.num_targets(split) for folder in self.folders)

    def check_shares(self, shares: Sequence[float] | None) -> None:
        """Raises `TrainingError` where there is not one share a folder."""
        if shares is not None and len(shares) != len(self.folders):
            raise TrainingError(
                f"{len(shares)} shares for {len(self.folders)} shard folders: give one number for each --shards"
            )

    def packed(self, split: Split, config: TrainConfig) -> JoinedPacks:
        """The folders' sequences in packs, each folder's apart. Raises `DataError` for one without answers."""
        for folder in self.folders:
            if not folder.num_targets(split):
                raise DataError(
                    f"{folder.folder}: the {split} split holds no answers: distil more data into another folder"
                )
        return JoinedPacks(
            [
                PackedDataset(
                    folder.sequences(split), pack_length=config.pack_length, offsets=config.offsets, seed=config.seed
                )
                for folder in self.folders
            ]
        )
