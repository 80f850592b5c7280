"""The heads that come with the program: a store inside the package."""

from pathlib import Path

from gorgon_engine.heads.checkpoint import LATEST_FILE, read_manifest, resolve_heads
from gorgon_engine.models.config import BackboneConfig
from gorgon_engine.models.identity import backbone_identity

BUNDLED_STORE = Path(__file__).parents[1] / "bundled_heads"


def bundled_heads(folder: Path, config: BackboneConfig, *, store: Path = BUNDLED_STORE) -> Path | None:
    """The checkpoint folder of the heads for the backbone in `folder`, None where none come with the program."""
    for latest in sorted(store.glob(f"*/{LATEST_FILE}")):
        checkpoint = resolve_heads(latest.parent)
        manifest = read_manifest(checkpoint)
        # The cheap comparison first: an identity reads every weight of the backbone.
        if (manifest.hidden_size, manifest.vocab_size) != (config.hidden_size, config.vocab_size):
            continue
        if manifest.backbone.identity == backbone_identity(folder):
            return checkpoint
    return None
