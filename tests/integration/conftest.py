"""A tiny model, and draft heads for it, for engines that are processes of their own."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gorgon_engine.heads.checkpoint import save_heads
from gorgon_engine.heads.families import family_fields
from gorgon_engine.heads.hydra import HydraHeads, HydraShape
from gorgon_engine.models.config import BackboneConfig
from gorgon_engine.models.identity import backbone_identity
from gorgon_protocol.manifest import BackboneReference, HeadsManifest
from support.models import tiny_llama
from support.services import RedisServer, redis_server
from support.vocabularies import CHATML, byte_level_bpe, save

MakeHeads = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose answers may be long: `ignore_eos` streams of thousands of tokens."""
    folder = tiny_llama(
        tmp_path_factory.mktemp("integration") / "tiny", vocab_size=352, hidden_size=64, max_positions=8192
    )
    return save(byte_level_bpe(), folder, bos="<|endoftext|>", eos="<|im_end|>", chat_template=CHATML)


@pytest.fixture
def make_heads(tiny: Path, tmp_path: Path) -> MakeHeads:
    """Untrained heads for the tiny model, as a checkpoint folder: what they guess is wrong, what comes out is not."""

    def make(version: str, *, seed: int = 0, **fields: Any) -> Path:
        config = BackboneConfig.from_folder(tiny)
        torch.manual_seed(seed)
        heads = HydraHeads(HydraShape(hidden_size=config.hidden_size, num_heads=2, num_blocks=1))
        values: dict[str, Any] = {
            "name": "tiny",
            "version": version,
            "backbone": BackboneReference(identity=backbone_identity(tiny), name="Tiny"),
            "vocab_size": config.vocab_size,
            "offsets": (2, 3),
            "dtype": "float32",
            "quantization": "int8",
        }
        folder = tmp_path / "checkpoints" / f"tiny@{version}"
        save_heads(folder, heads, HeadsManifest(**(values | family_fields(heads) | fields)))
        return folder

    return make


@pytest.fixture
def redis_service() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server
