"""What all foreign layouts share: files read with care, tensors taken by name, the backbone that they belong to."""

import json
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gorgon_engine.heads.families import DraftHeads
from gorgon_engine.models.config import BackboneConfig
from gorgon_engine.models.identity import backbone_identity
from gorgon_engine.models.weights import WeightReader
from gorgon_protocol.errors import HeadsError
from gorgon_protocol.manifest import BackboneReference

CONFIG_FILE = "config.json"

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MAX_CONFIG_BYTES = 1 << 20


class Backbone:
    """The model that heads belong to, as far as a conversion looks at it: shapes, embedding, lm_head.

    Raises `ModelError` where its folder cannot be read.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.config = BackboneConfig.from_folder(folder)
        self.reference = BackboneReference(identity=backbone_identity(folder), name=name)
        self._reader = WeightReader(folder, self.config)

    @property
    def name(self) -> str:
        return self.reference.name

    def embedding(self) -> Tensor:
        """[V, C] as saved."""
        return self._reader.dense("model.embed_tokens.weight")

    def lm_head(self) -> Tensor:
        """[V, C] as saved."""
        return self.embedding() if self.config.tie_word_embeddings else self._reader.dense("lm_head.weight")


@dataclass(frozen=True, slots=True)
class ImportedHeads:
    heads: DraftHeads  # in the precision of the foreign file
    draft_vocabulary: Tensor | None  # [V'] int64, ascending
    notices: tuple[str, ...]  # what a person should know, one line each


@dataclass(frozen=True, slots=True)
class ExportedHeads:
    """The content of a foreign folder."""

    config: Mapping[str, Any]
    weights_file: str
    tensors: Mapping[str, Tensor]
    notices: tuple[str, ...] = ()


class ForeignTensors:
    """Tensors of a foreign checkpoint, each to be taken once: what nobody takes has no place in the layout."""

    def __init__(self, source: Path, tensors: Mapping[str, Tensor]) -> None:
        self.source = source
        self._left = dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._left

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._left)

    def matching(self, pattern: str) -> list[re.Match[str]]:
        return [match for name in self._left if (match := re.fullmatch(pattern, name))]

    def take(self, name: str, *shape: int) -> Tensor:
        """The float tensor of this name. Raises `HeadsError` where it is missing or has another shape."""
        tensor = self._pop(name)
        if tuple(tensor.shape) != shape:
            raise HeadsError(
                f"{self.source}: {name} has shape {list(tensor.shape)}, this backbone needs {list(shape)}: "
                "another backbone, or another layout?"
            )
        return self._checked(name, tensor)

    def take_rows(self, name: str, columns: int) -> Tensor:
        """A float matrix of so many columns and any number of rows. Raises `HeadsError`."""
        rows = self._left[name].shape[0] if name in self._left and self._left[name].ndim else 0
        return self.take(name, rows, columns)

    def take_token_ids(self, name: str) -> Tensor:
        """A list of integers as int64 [N]. Raises `HeadsError`."""
        tensor = self._pop(name)
        if tensor.ndim != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise HeadsError(f"{self.source}: {name} is {tensor.dtype} {list(tensor.shape)}, not a list of token ids")
        return tensor.long()

    def finish(self) -> None:
        """Raises `HeadsError` where tensors are left: the layout would not be what it was taken for."""
        if self._left:
            first = min(self._left)
            raise HeadsError(
                f"{self.source}: {len(self._left)} tensors have no place in this layout ({first}): nothing was imported"
            )

    def _pop(self, name: str) -> Tensor:
        if name not in self._left:
            raise HeadsError(f"{self.source}: tensor {name} is missing")
        return self._left.pop(name)

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.dtype not in _FLOATS:
            raise HeadsError(f"{self.source}: {name} is {tensor.dtype}: heads are float32, bfloat16 or float16")
        if not bool(torch.isfinite(tensor).all()):
            raise HeadsError(f"{self.source}: {name} holds values that are not finite")
        return tensor


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a foreign folder. Raises `HeadsError`."""
    if not folder.is_dir():
        raise HeadsError(f"{folder}: no such folder")
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise HeadsError(f"{folder}: no {CONFIG_FILE}: is this the folder of a heads checkpoint?")
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(_MAX_CONFIG_BYTES))
    except OSError as error:
        raise HeadsError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise HeadsError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise HeadsError(f"{path}: not a JSON object")
    return values


def read_tensors(paths: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of safetensors files and pickles. Raises `HeadsError`, also for a name in two files."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        for name, tensor in (_read_safetensors if path.suffix == ".safetensors" else _read_pickle)(path).items():
            if name in tensors:
                raise HeadsError(f"{path}: {name} is in another file too")
            tensors[name] = tensor
    return tensors


def count(source: Path, what: str, numbers: Iterable[str]) -> int:
    """How many things are numbered 0, 1, 2, ... without a gap. Raises `HeadsError` for none and for gaps."""
    found = sorted(set(map(int, numbers)))
    if found != list(range(len(found))) or not found:
        raise HeadsError(f"{source}: its {what} are numbered {found}: they must count from 0 without a gap")
    return len(found)


def whole_number(config: Mapping[str, Any], name: str) -> int | None:
    value = config.get(name)
    return value if type(value) is int else None


def fold_projections(projections: list[Tensor], original: Tensor) -> Tensor | None:
    """The heads' own projections [K, V, C] stacked, or None where each is the backbone's: what is shared costs nothing.

    original: [V, C], rows of the backbone's lm_head.
    """
    original = original.to(projections[0].dtype)
    if all(torch.equal(projection, original) for projection in projections):
        return None
    return torch.stack(projections)


def common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The one that holds all of them exactly: float32 where they differ."""
    dtypes = {tensor.dtype for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in list(file.keys())}
    except (SafetensorError, OSError) as error:
        raise HeadsError(f"{path}: not a readable safetensors file: {error}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what an old or odd pickle makes torch say; what matters raises
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise HeadsError(
            f"{path}: not read: it is damaged, or wants to run code, and only plain tensors are taken from a pickle: "
            "have its maker save it as safetensors"
        ) from error
    # torch's reader meets damaged files with whatever its parts happen to raise.
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise HeadsError(f"{path}: not a readable torch file: {reason}") from error
    if not isinstance(content, dict) or not content:
        raise HeadsError(f"{path}: holds no tensors by name")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout is not torch.strided:
            raise HeadsError(f"{path}: {str(name)[:80]!r} is {type(value).__name__}, not a plain tensor by name")
    return {name: value.detach() for name, value in content.items()}
