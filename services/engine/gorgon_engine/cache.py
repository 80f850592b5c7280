"""Where Gorgon keeps what it can make again: fetched models, checksums, compiled kernels."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$GORGON_CACHE`, else `$XDG_CACHE_HOME/gorgon`, else `~/.cache/gorgon`. Not created."""
    if own := os.environ.get("GORGON_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "gorgon"
    return Path.home() / ".cache" / "gorgon"
