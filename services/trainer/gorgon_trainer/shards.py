"""Token shards: what self-distillation writes and training reads.

A folder of `{split}-{number:05d}.safetensors` beside `shards.json`, which says of what run they are. A shard holds S
sequences of T tokens in all:

    tokens     int32 [T]
    loss_mask  uint8 [T]      1 = said by the backbone (the assistant): a target of the heads
    offsets    int64 [S + 1]  sequence s is tokens[offsets[s]:offsets[s + 1]]; none is empty

Each shard carries the fingerprint of its `shards.json`, so that shards of two runs never mix. A shard appears whole or
not at all; a run that was killed goes on with the numbers that are missing.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, Self, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gorgon_protocol.errors import DataError
from gorgon_protocol.manifest import BackboneReference, Sha256
from gorgon_trainer.files import written_whole

Split = Literal["train", "heldout"]
SPLITS: Final[tuple[Split, ...]] = get_args(Split)

INDEX_FILE = "shards.json"
SCHEMA_VERSION: Final = 1
_SHARD_FILE = re.compile(r"(train|heldout)-(\d{5})\.safetensors")
_FINGERPRINT = "gorgon_shards"  # the key in a shard's metadata
_LAYOUT = {"tokens": torch.int32, "loss_mask": torch.uint8, "offsets": torch.int64}


class ShardIndex(BaseModel):
    """`shards.json`: the run that a folder's shards belong to, fixed before the first shard is written."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    schema_version: Literal[1] = SCHEMA_VERSION
    backbone: BackboneReference = Field(description="whose tokenizer the ids are of, and who gave the answers")
    quantization: Literal["none", "nf4", "int8"] = Field(description="of the backbone when it answered")
    vocab_size: int = Field(ge=1)
    data_sha256: Sha256 = Field(description="of the records that were answered")
    settings: dict[str, bool | int | float | str | None] = Field(default_factory=dict, description="the run's own")
    num_shards: dict[Split, Annotated[int, Field(ge=0)]] = Field(
        default_factory=dict, description="of each split, when the run is done"
    )

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises `DataError` in one line."""
        path = folder / INDEX_FILE
        try:
            return cls.model_validate_json(path.read_bytes(), strict=True)
        except FileNotFoundError as error:
            what = "holds no shards.json" if folder.is_dir() else "no such folder"
            raise DataError(f"{folder}: {what}: give a folder that self-distillation made") from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ": ".join(filter(None, [str(path), ".".join(map(str, first["loc"]))]))
            raise DataError(f"{where}: {first['msg']}") from error

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """One conversation or text, T tokens."""

    tokens: Tensor  # int32 [T]
    loss_mask: Tensor  # uint8 [T]

    @classmethod
    def from_lists(cls, tokens: Sequence[int], loss_mask: Sequence[int | bool]) -> Self:
        return cls(torch.tensor(tokens, dtype=torch.int32), torch.tensor(loss_mask, dtype=torch.uint8))

    def __len__(self) -> int:
        return self.tokens.numel()

    def goes_on_from(self, other: Self) -> bool:
        """Whether it begins with the other's tokens."""
        return len(self) >= len(other) and torch.equal(self.tokens[: len(other)], other.tokens)

    def with_targets_of(self, beginning: Self) -> Self:
        """With the targets of a sequence that it goes on from beside its own."""
        loss_mask = self.loss_mask.clone()
        loss_mask[: len(beginning)] |= beginning.loss_mask
        return type(self)(self.tokens, loss_mask)


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One checked shard of a folder."""

    path: Path
    split: Split
    number: int
    num_sequences: int
    num_tokens: int
    num_targets: int


class ShardWriter:
    """Writes the shards of one run, each whole or not at all.

    Several processes may write different numbers at once.
    """

    def __init__(self, folder: Path, index: ShardIndex) -> None:
        """Make the folder, or go on with one that was begun with the same index.

        Raises `DataError` where the folder is of another run or cannot be written.
        """
        self.folder = folder
        self.index = index
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / INDEX_FILE).exists():
                _check_same_run(folder, ShardIndex.read(folder), index)
            elif any(_SHARD_FILE.fullmatch(path.name) for path in folder.iterdir()):
                raise DataError(f"{folder}: holds shards without their shards.json: give another folder or empty it")
            else:
                _begin(folder, index)
        except OSError as error:
            raise DataError(f"{folder}: cannot be written: {error.strerror}") from error

    def finished(self, split: Split) -> frozenset[int]:
        """The numbers of the shards that are there: what a resumed run need not make again."""
        return frozenset(number for _, number in _shard_files(self.folder, split))

    def write(self, split: Split, number: int, sequences: Sequence[TokenSequence]) -> Path:
        """Write one shard and return its path; a shard of that number is replaced.

        Raises `DataError` where it cannot be written (a full disk), `AssertionError` for sequences that are not a
        shard's content: none of them, an empty one, ids outside the vocabulary.
        """
        assert 0 <= number <= 99_999, number
        assert sequences, "a shard holds at least one sequence"
        assert all(len(s) and s.tokens.shape == s.loss_mask.shape for s in sequences)
        lengths = torch.tensor([0, *map(len, sequences)], dtype=torch.int64)
        tensors = {
            "tokens": torch.cat([s.tokens for s in sequences]),
            "loss_mask": torch.cat([s.loss_mask for s in sequences]),
            "offsets": lengths.cumsum(0),
        }
        problem = _problem(tensors, self.index.vocab_size)
        assert problem is None, problem
        path = self.folder / f"{split}-{number:05d}.safetensors"
        try:
            with written_whole(path) as file:
                file.write(save(tensors, metadata={_FINGERPRINT: self.index.fingerprint}))
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror}") from error
        return path


class ShardSet:
    """The shards of a folder, every one checked; tokens are read when they are iterated, a shard at a time."""

    def __init__(self, folder: Path, index: ShardIndex, shards: Sequence[ShardInfo]) -> None:
        self.folder = folder
        self.index = index
        self.shards = tuple(shards)

    @classmethod
    def open(cls, folder: Path, *, partial: bool = False) -> Self:
        """Read `shards.json` and check each shard against it, contents included: reads every byte once.

        partial: take what an unfinished run has written so far. Raises `DataError` naming the file: of another run,
        damaged, ids outside the vocabulary; or saying how many shards are missing.
        """
        index = ShardIndex.read(folder)
        shards = []
        for split in SPLITS:
            files = _shard_files(folder, split)
            if not partial:
                _check_complete(folder, split, [number for _, number in files], index)
            shards += [_inspect(path, split, number, index) for path, number in files]
        if not shards:
            raise DataError(f"{folder}: no shard is written yet: run the distillation that began it again")
        return cls(folder, index, shards)

    def of(self, split: Split) -> tuple[ShardInfo, ...]:
        return tuple(shard for shard in self.shards if shard.split == split)

    def num_sequences(self, split: Split) -> int:
        return sum(shard.num_sequences for shard in self.of(split))

    def num_tokens(self, split: Split) -> int:
        return sum(shard.num_tokens for shard in self.of(split))

    def num_targets(self, split: Split) -> int:
        return sum(shard.num_targets for shard in self.of(split))

    def sequences(self, split: Split) -> Iterator[TokenSequence]:
        """In the order of shards and of sequences in them. Raises `DataError` for a shard gone or changed since."""
        for shard in self.of(split):
            tensors = _read(shard.path, self.index)
            sizes = tensors["offsets"].diff().tolist()
            pairs = zip(tensors["tokens"].split(sizes), tensors["loss_mask"].split(sizes), strict=True)
            yield from (TokenSequence(tokens, loss_mask) for tokens, loss_mask in pairs)


def _begin(folder: Path, index: ShardIndex) -> None:
    """Write `shards.json`. Of several processes that begin together one may be in another's way: then it is there."""
    try:
        with written_whole(folder / INDEX_FILE) as file:
            file.write(index.model_dump_json(indent=2).encode() + b"\n")
    except FileNotFoundError:
        _check_same_run(folder, ShardIndex.read(folder), index)


def _shard_files(folder: Path, split: Split) -> list[tuple[Path, int]]:
    matches = ((path, _SHARD_FILE.fullmatch(path.name)) for path in folder.iterdir())
    return sorted((path, int(match[2])) for path, match in matches if match and match[1] == split)


def _check_same_run(folder: Path, found: ShardIndex, wanted: ShardIndex) -> None:
    there, here = found.model_dump(), wanted.model_dump()
    different = [name for name in here if there[name] != here[name]]
    if not different:
        return
    name = different[0]
    was, now = there[name], here[name]
    if isinstance(was, Mapping):
        key = next(key for key in [*was, *now] if was.get(key) != now.get(key))
        name, was, now = f"{name}.{key}", was.get(key), now.get(key)
    raise DataError(
        f"{folder / INDEX_FILE}: the shards there are of another run: {name} was {was}, is now {now}: "
        "give another folder, or remove this one"
    )


def _check_complete(folder: Path, split: Split, numbers: Sequence[int], index: ShardIndex) -> None:
    expected = index.num_shards.get(split, max(numbers, default=-1) + 1)
    missing = sorted(set(range(expected)) - set(numbers))
    if missing:
        raise DataError(
            f"{folder}: {len(missing)} of {expected} {split} shards are missing, {missing[0]:05d} the first: run the "
            "distillation again, it goes on where it stopped"
        )
    if surplus := set(numbers) - set(range(expected)):
        raise DataError(f"{folder}: {split} shard {min(surplus):05d} is beyond the {expected} of {INDEX_FILE}")


def _inspect(path: Path, split: Split, number: int, index: ShardIndex) -> ShardInfo:
    tensors = _read(path, index)
    return ShardInfo(
        path=path,
        split=split,
        number=number,
        num_sequences=tensors["offsets"].numel() - 1,
        num_tokens=tensors["tokens"].numel(),
        num_targets=int(tensors["loss_mask"].sum(dtype=torch.int64)),
    )


def _read(path: Path, index: ShardIndex) -> dict[str, Tensor]:
    """A shard's tensors, checked. Raises `DataError` naming the file."""
    remedy = "remove it and run the distillation again"
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            if (file.metadata() or {}).get(_FINGERPRINT) != index.fingerprint:
                raise DataError(f"{path}: not a shard of the run in {INDEX_FILE}: {remedy}")
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a readable shard: {error}: {remedy}") from error
    if problem := _problem(tensors, index.vocab_size):
        raise DataError(f"{path}: damaged: {problem}: {remedy}")
    return tensors


def _problem(tensors: Mapping[str, Tensor], vocab_size: int) -> str | None:
    """What makes these tensors no shard, or None."""
    layout = {name: tensor.dtype for name, tensor in tensors.items() if tensor.ndim == 1}
    if layout != _LAYOUT:
        return f"holds { ({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}) }, not {_LAYOUT} in 1-D"
    tokens, loss_mask, offsets = tensors["tokens"], tensors["loss_mask"], tensors["offsets"]
    if loss_mask.shape != tokens.shape:
        return f"{tokens.numel()} tokens and a loss mask of {loss_mask.numel()}"
    if offsets.numel() < 2 or offsets[0] != 0 or offsets[-1] != tokens.numel() or bool((offsets.diff() <= 0).any()):
        return f"the offsets do not rise from 0 to {tokens.numel()}"
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
        return f"token ids from {int(tokens.min())} to {int(tokens.max())} in a vocabulary of {vocab_size}"
    if int(loss_mask.max()) > 1:
        return f"the loss mask holds {int(loss_mask.max())}"
    return None
