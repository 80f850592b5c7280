"""What tests of the trainer share: shards that can be learned, a backbone that dies, and processes of their own."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.backbone.select import BackboneOptions, Kernels, load_backbone
from gorgon_protocol.manifest import BackboneReference
from gorgon_trainer.objective import FrozenBackbone, Loss
from gorgon_trainer.shards import ShardIndex, ShardSet, ShardWriter, TokenSequence
from gorgon_trainer.train_config import TrainConfig
from gorgon_trainer.training import STATE_FILE, TrainResult, train
from gorgon_trainer.vocabulary import lm_head_weight

VOCAB = 67
REFERENCE = BackboneReference(identity="ab" * 32, name="tiny")
CYCLE = (17, 4, 41, 9, 23, 60, 12, 35, 5, 50, 28)  # what follows what in `cycle_sequence`

# Small enough for a test, large enough that every part of a run takes place: 12 batches an epoch.
CONFIG = TrainConfig(
    family="hydra",
    num_heads=2,
    num_blocks=2,
    learning_rate=1e-2,
    warmup_steps=2,
    pack_length=32,
    packs_per_batch=2,
    max_steps=12,
    eval_every=3,
    save_every=4,
    loss=Loss.CROSS_ENTROPY,
)


def load_fp32(folder: Path, kernels: Kernels = Kernels.NATIVE) -> Backbone:
    return load_backbone(folder, BackboneOptions(dtype=torch.float32, kernels=kernels, device="cpu"))[0]


def cycle_sequence(start: int, length: int = 16, prompt: int = 2) -> TokenSequence:
    """A walk along `CYCLE`: each token names the one after it."""
    tokens = [CYCLE[(start + step) % len(CYCLE)] for step in range(length)]
    return TokenSequence.from_lists(tokens, [step >= prompt for step in range(length)])


def make_shards(
    folder: Path,
    train: Sequence[TokenSequence],
    heldout: Sequence[TokenSequence],
    *,
    data_sha256: str = "cd" * 32,
    vocab_size: int = VOCAB,
) -> ShardSet:
    """One shard a split, none for a split without sequences."""
    index = ShardIndex(backbone=REFERENCE, quantization="none", vocab_size=vocab_size, data_sha256=data_sha256)
    writer = ShardWriter(folder, index)
    if train:
        writer.write("train", 0, train)
    if heldout:
        writer.write("heldout", 0, heldout)
    return ShardSet.open(folder)


def make_cycles(folder: Path, *, data_sha256: str = "cd" * 32) -> ShardSet:
    """Shards whose every next token is certain: 48 sequences to train on, 6 held out."""
    train, heldout = ([cycle_sequence(start) for start in range(count)] for count in (48, 6))
    return make_shards(folder, train, heldout, data_sha256=data_sha256)


def frozen_of(backbone: Backbone, draft_vocabulary: Tensor | None = None) -> FrozenBackbone:
    return FrozenBackbone(
        embed=backbone.embed,
        lm_head=lm_head_weight(backbone, draft_vocabulary),
        draft_vocabulary=draft_vocabulary,
        vocab_size=backbone.config.vocab_size,
    )


def run_training(
    shards: ShardSet,
    folder: Path,
    backbone: Backbone,
    config: TrainConfig = CONFIG,
    *,
    initial: Path | None = None,
    **changes: Any,
) -> TrainResult:
    return train(
        shards,
        folder,
        backbone=backbone,
        config=replace(config, **changes),
        initial=initial,
        accelerator=Accelerator(cpu=True),
        progress=False,
    )


def weights(result: TrainResult) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in result.heads.named_parameters()}


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def state_of(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / STATE_FILE, weights_only=True)
    return state


class MortalBackbone:
    """A backbone whose process is killed at the first forward pass for which `when` holds."""

    def __init__(self, backbone: Backbone, when: Callable[[], bool]) -> None:
        self._backbone = backbone
        self._when = when

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def forward(self, *args: Any, **options: Any) -> Any:
        if self._when():
            os.kill(os.getpid(), signal.SIGKILL)
        return self._backbone.forward(*args, **options)


def mortal(backbone: Backbone, when: Callable[[], bool]) -> Backbone:
    return cast(Backbone, MortalBackbone(backbone, when))


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def run_killed(script: str) -> None:
    """Run a script in a process of its own, which has to end by its own SIGKILL."""
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


CAN_MOUNT = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0


def run_on_small_disk(folder: Path, kilobytes: int, script: str) -> str:
    """What a script prints in a process whose `folder`/disk, and nobody else's, is a disk of its own."""
    (folder / "disk").mkdir()
    shell = f'mount -t tmpfs -o size={kilobytes}k tmpfs disk && exec {sys.executable} -c "$SCRIPT"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", shell],
        cwd=folder,
        env=environment() | {"SCRIPT": script},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
