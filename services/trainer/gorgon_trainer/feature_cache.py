"""Where the hidden states of packs come from: computed when they are needed, read back from disk, or remembered.

Computing costs a forward pass of the backbone for every epoch, keeping them 2 or 4 bytes times the hidden size for
every position (1.1 KB in bf16 for a hidden size of 576, 8 KB for 4096).

Letters: L positions a pack, C hidden size, F packs a file.
"""

import hashlib
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from gorgon_engine.backbone.base import Backbone
from gorgon_protocol.errors import DataError, TrainingError
from gorgon_trainer.dataset import JoinedPacks, PackBatch, PackedDataset, collate
from gorgon_trainer.features import hidden_states
from gorgon_trainer.files import written_whole

_PACKS_PER_FILE = 64
_KEY = "gorgon_features"
_MEMORY_SHARE = 0.8  # of what is free: the training itself needs the rest


class Features(StrEnum):
    """Where hidden states come from: a pass of the backbone for every batch, files, or the device's memory."""

    COMPUTED = "computed"
    DISK = "disk"
    MEMORY = "memory"


class FeatureSource(Protocol):
    def hidden(self, batch: PackBatch, packs: Sequence[int]) -> Tensor:
        """[P, C] on the training device. packs: the dataset's indices of the packs of which `batch` consists."""
        ...


class ComputedFeatures:
    """A forward pass of the backbone for every batch."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    def hidden(self, batch: PackBatch, packs: Sequence[int]) -> Tensor:
        return hidden_states(self._backbone, batch)


class RememberedFeatures:
    """A forward pass of the backbone for every pack once; its hidden states then stay in the device's memory."""

    def __init__(self, backbone: Backbone, dataset: PackedDataset | JoinedPacks) -> None:
        """Raises `TrainingError` where a GPU has no room for them all."""
        self._backbone = backbone
        self._pack_length = dataset.pack_length
        self._packs: dict[int, Tensor] = {}  # [L, C]
        if backbone.device.type == "cuda":
            # Over the epochs every process meets most packs, however many processes there are.
            needed = len(dataset) * dataset.pack_length * backbone.config.hidden_size * backbone.cache_dtype.itemsize
            free, _ = torch.cuda.mem_get_info(backbone.device)
            if needed > _MEMORY_SHARE * free:
                raise TrainingError(
                    f"the hidden states of {len(dataset)} packs take {needed / 2**30:.1f} GiB and the GPU has "
                    f"{free / 2**30:.1f} free: keep them on disk, or have them computed"
                )

    def hidden(self, batch: PackBatch, packs: Sequence[int]) -> Tensor:
        if any(pack not in self._packs for pack in packs):
            computed = hidden_states(self._backbone, batch).split(self._pack_length)
            for pack, hidden in zip(packs, computed, strict=True):
                self._packs.setdefault(pack, hidden.clone())
        return torch.cat([self._packs[pack] for pack in packs])


class CachedFeatures:
    """Hidden states of a whole dataset in files of several packs, made once; a killed run makes the missing files."""

    def __init__(
        self, folder: Path, dataset: PackedDataset | JoinedPacks, backbone: Backbone, *, fingerprint: str
    ) -> None:
        """fingerprint: says of which shards, packing and backbone the features are. Files of another are made again."""
        self._folder = folder
        self._dataset = dataset
        self._backbone = backbone
        self._key = hashlib.sha256(f"{fingerprint}/{dataset.pack_length}/{len(dataset)}".encode()).hexdigest()

    @property
    def num_files(self) -> int:
        return -(-len(self._dataset) // _PACKS_PER_FILE)

    def fill(self, *, progress: bool = True, rank: int = 0, world_size: int = 1) -> None:
        """Make the files that are not there yet; of several processes each makes its share. Raises `DataError`."""
        own = range(rank, self.num_files, world_size)
        missing = [number for number in own if not self._is_made(number)]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for number in tqdm(missing, desc="features", unit="file", disable=None if progress else True):
                first = number * _PACKS_PER_FILE
                packs = range(first, min(first + _PACKS_PER_FILE, len(self._dataset)))
                hidden = torch.stack(
                    [hidden_states(self._backbone, collate([self._dataset[pack]])).cpu() for pack in packs]
                )
                with written_whole(self._path(number)) as file:
                    file.write(save({"hidden": hidden}, metadata={_KEY: self._key}))
        except OSError as error:
            raise DataError(f"{self._folder}: features cannot be written: {error.strerror}") from error

    def hidden(self, batch: PackBatch, packs: Sequence[int]) -> Tensor:
        rows = []
        for pack in packs:
            path = self._path(pack // _PACKS_PER_FILE)
            try:
                with safe_open(path, framework="pt", device="cpu") as file:
                    rows.append(file.get_slice("hidden")[pack % _PACKS_PER_FILE])
            except (SafetensorError, OSError) as error:
                raise DataError(f"{path}: cannot be read: {error}: remove it and start again") from error
        return torch.cat(rows).to(self._backbone.device)

    def _path(self, number: int) -> Path:
        return self._folder / f"features-{number:05d}.safetensors"

    def _is_made(self, number: int) -> bool:
        try:
            with safe_open(self._path(number), framework="pt", device="cpu") as file:
                return bool((file.metadata() or {}).get(_KEY) == self._key)
        except (SafetensorError, OSError):
            return False
