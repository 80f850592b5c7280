"""A tiny random model on kernels whose rows never depend on each other, and shards that its heads can learn."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from gorgon_engine.backbone.base import Backbone
from gorgon_trainer.shards import ShardSet
from support.models import tiny_llama
from support.training import VOCAB, load_fp32, make_cycles, run_training


@contextmanager
def single_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order, and no threads that wait for each other on a busy machine."""
    with single_thread():
        yield


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("trainer") / "small", vocab_size=VOCAB)


@pytest.fixture(scope="session")
def small_backbone(small_model: Path) -> Backbone:
    return load_fp32(small_model)


@pytest.fixture(scope="session")
def cycles(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return make_cycles(tmp_path_factory.mktemp("cycles") / "shards")


@pytest.fixture(scope="session")
def finished(cycles: ShardSet, small_backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with single_thread():
        run_training(cycles, folder, small_backbone)
    return folder
