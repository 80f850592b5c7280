"""The identity of a backbone: one hash that draft heads carry and that an engine compares before it serves them.

It covers what the heads were trained against, whatever the precision it is served in: the architecture, the bytes of
the original weight files, and the tokenizer.
"""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from gorgon_engine.models.cache import cache_dir
from gorgon_engine.models.config import BackboneConfig
from gorgon_engine.models.weights import WeightReader

# Facts about the files or the generation, not about the function that the model computes.
_NOT_ARCHITECTURE = ("dtype", "saved_quantization", "bos_token_id", "eos_token_ids")


def backbone_identity(folder: Path) -> str:
    """64 hex digits. Reads every weight file once; later calls find the files' checksums in the user's cache as long
    as path, size and modification time are the same.

    Raises `ModelError` for a folder that cannot be read as a model.
    """
    config = BackboneConfig.from_folder(folder)
    architecture = {name: value for name, value in asdict(config).items() if name not in _NOT_ARCHITECTURE}
    files = [*WeightReader(folder, config).paths, folder / "tokenizer.json"]
    content = {
        "architecture": architecture,
        "files": {path.name: _cached_sha256(path) for path in files if path.is_file()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _cached_sha256(path: Path) -> str:
    path = path.resolve()
    status = path.stat()
    key = [str(path), status.st_size, status.st_mtime_ns]
    entry = cache_dir() / "checksums" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    try:
        known = json.loads(entry.read_bytes())
        if known["key"] == key:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent, from another release or damaged: made again below
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _remember(entry, {"key": key, "sha256": digest})
    return digest


def _remember(entry: Path, content: dict[str, object]) -> None:
    temporary = entry.with_suffix(f".{os.getpid()}.tmp")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content))
        temporary.replace(entry)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full or read-only cache costs time at the next start, nothing else
