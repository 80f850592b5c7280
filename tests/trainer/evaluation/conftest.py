"""A tiny random model with a tokenizer, on kernels whose rows never depend on each other."""

from pathlib import Path

import pytest
import torch

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.backbone.select import BackboneOptions, load_backbone
from gorgon_engine.tokenizer import Tokenizer
from support.models import tiny_llama
from support.vocabularies import CHATML, byte_level_bpe, save

FP32 = BackboneOptions(dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("evaluation") / "tiny", vocab_size=352, hidden_size=64)
    return save(byte_level_bpe(), folder, bos="<|endoftext|>", eos="<|im_end|>", chat_template=CHATML)


@pytest.fixture(scope="session")
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny)


@pytest.fixture(scope="session")
def backbone(tiny: Path) -> Backbone:
    return load_backbone(tiny, FP32)[0]
