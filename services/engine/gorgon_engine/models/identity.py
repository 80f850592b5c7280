"""The identity of a backbone: one hash that draft heads carry and that an engine compares before it serves them.

It covers what the heads were trained against, whatever the precision it is served in: the architecture, the bytes of
the original weight files, and the tokenizer.
"""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from gorgon_engine.cache import cache_dir
from gorgon_engine.models.config import BackboneConfig
from gorgon_engine.models.weights import WeightReader
from gorgon_protocol.errors import ModelError

# The function that the model computes: not how its files are stored, nor where a generation ends. Listed, so that a new
# field of the config does not change every backbone's identity.
_ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
    "tie_word_embeddings",
    "sliding_windows",
)


def backbone_identity(folder: Path) -> str:
    """64 hex digits. Reads every weight file once; later calls find the files' checksums in the user's cache as long
    as path, size and modification time are the same.

    Raises `ModelError` for a folder that cannot be read as a model.
    """
    config = BackboneConfig.from_folder(folder)
    tokenizer = folder / "tokenizer.json"
    content = {
        "architecture": {name: getattr(config, name) for name in _ARCHITECTURE},
        "rope": dict(config.rope.parameters),
        "weights": {path.name: _cached(path, _sha256) for path in WeightReader(folder, config).paths},
        "vocabulary": _cached(tokenizer, _vocabulary_sha256) if tokenizer.is_file() else None,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _vocabulary_sha256(path: Path) -> str:
    """Which token each id stands for. Releases of `tokenizers` write the rest of the file in different ways."""
    try:
        content = json.loads(path.read_bytes())
        added = {token["content"]: token["id"] for token in content.get("added_tokens", ())}
        vocabulary = {"vocab": content["model"]["vocab"], "added": added}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: not a readable tokenizer: {error!r}") from error
    return hashlib.sha256(json.dumps(vocabulary, sort_keys=True).encode()).hexdigest()


def _cached(path: Path, digest: Callable[[Path], str]) -> str:
    path = path.resolve()
    status = path.stat()
    key = [digest.__name__, str(path), status.st_size, status.st_mtime_ns]
    entry = cache_dir() / "checksums" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    try:
        known = json.loads(entry.read_bytes())
        if known["key"] == key:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent, from another release or damaged: made again below
    value = digest(path)
    _remember(entry, {"key": key, "sha256": value})
    return value


def _remember(entry: Path, content: dict[str, object]) -> None:
    temporary = entry.with_suffix(f".{os.getpid()}.tmp")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content))
        temporary.replace(entry)
    except OSError:  # a full or read-only cache costs time at the next start, nothing else
        with suppress(OSError):
            temporary.unlink()
