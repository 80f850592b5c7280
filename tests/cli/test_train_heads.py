"""`gorgon train heads`: from options to a checkpoint, in the family's own settings."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.conftest import Gorgon
from cli.test_errors import one_line

from gorgon_engine.heads.checkpoint import verify_heads
from gorgon_engine.models.identity import backbone_identity
from gorgon_protocol.manifest import BackboneReference
from gorgon_trainer.shards import SPLITS, ShardIndex, ShardWriter, TokenSequence

SETTINGS = (
    "--max-steps", "3", "--eval-every", "3", "--pack-length", "32", "--packs-per-batch", "2", "--warmup-steps", "1",
    "--num-heads", "2", "--draft-vocab-size", "50", "--device", "cpu",
)  # fmt: skip


@pytest.fixture
def shards(tiny: Path, tmp_path: Path) -> Path:
    """Random answers in the words of the tiny model."""
    reference = BackboneReference(identity=backbone_identity(tiny), name="Tiny")
    index = ShardIndex(backbone=reference, quantization="int8", vocab_size=352, data_sha256="ab" * 32)
    writer = ShardWriter(tmp_path / "shards", index)
    generator = torch.Generator().manual_seed(0)
    for split, count in zip(SPLITS, (24, 4), strict=True):
        rows = torch.randint(3, 352, (count, 16), generator=generator).tolist()
        writer.write(split, 0, [TokenSequence.from_lists(row, [0] * 4 + [1] * 12) for row in rows])
    return tmp_path / "shards"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), {"family": "hydra", "num_blocks": 4, "loss": "cross-entropy", "dropout": 0.0}),
        (("--family", "medusa", "--num-blocks", "1", "--dropout", "0.1"), {"family": "medusa", "num_blocks": 1,
                                                                          "dropout": 0.1}),
        (("--family", "eagle"), {"family": "eagle", "num_blocks": 1, "loss": "kl", "unroll": 1,
                                 "feature_loss_weight": 10.0}),
        (("--family", "eagle", "--loss", "cross-entropy", "--unroll", "2", "--feature-loss-weight", "0"),
         {"loss": "cross-entropy", "unroll": 2, "feature_loss_weight": 0.0}),
    ],
)  # fmt: skip
def test_options_become_settings(
    gorgon: Gorgon, tiny: Path, shards: Path, tmp_path: Path, options: tuple[str, ...], expected: dict[str, Any]
) -> None:
    out = tmp_path / "run"
    status, printed, err = gorgon(
        "train", "heads", "--shards", shards, "--out", out, "--model", tiny, *SETTINGS, *options
    )
    assert (status, printed) == (0, f"{out / 'heads@1'}\n"), err
    manifest = verify_heads(out / "heads@1")
    assert manifest.training is not None
    assert manifest.training.settings.items() >= expected.items()
    assert json.loads(manifest.to_json())["draft_vocab_size"] == 50
    status, printed, _ = gorgon("generate", "--model", tiny, "--heads", out / "heads@1", "--drafter", "heads",
                                "--prompt", "the cat", "--max-tokens", "8")  # fmt: skip
    assert status == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--family", "eagle", "--num-blocks", "2"), "an eagle head is one layer: num_blocks must be 1: got 2"),
        (("--family", "eagle", "--unroll", "3"), "unroll must be between 1 and num_heads 2: got 3"),
        (("--family", "eagle", "--own-projection"), "an eagle head predicts what the backbone's projection reads"),
        (("--dropout", "1"), "dropout must be a share from 0"),
    ],
)
def test_what_cannot_be_trained_is_one_line(
    gorgon: Gorgon, tiny: Path, shards: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "run"
    status, printed, err = gorgon(
        "train", "heads", "--shards", shards, "--out", out, "--model", tiny, *SETTINGS, *options
    )
    assert (status, printed) == (1, "")
    assert message in one_line(err)
    assert not out.exists()


@pytest.fixture
def other_shards(tiny: Path, shards: Path, tmp_path: Path) -> Path:
    index = ShardIndex.read(shards).model_copy(update={"data_sha256": "cd" * 32})
    writer = ShardWriter(tmp_path / "other", index)
    generator = torch.Generator().manual_seed(1)
    for split, count in zip(SPLITS, (6, 2), strict=True):
        rows = torch.randint(3, 352, (count, 16), generator=generator).tolist()
        writer.write(split, 0, [TokenSequence.from_lists(row, [0] * 4 + [1] * 12) for row in rows])
    return tmp_path / "other"


def test_several_folders_are_mixed(
    gorgon: Gorgon, tiny: Path, shards: Path, other_shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = ("train", "heads", "--shards", shards, "--shards", other_shards, "--shares", "1,3", "--out", out,
               "--model", tiny, *SETTINGS)  # fmt: skip
    status, printed, err = gorgon(*command)
    assert (status, printed) == (0, f"{out / 'heads@1'}\n"), err
    training = verify_heads(out / "heads@1").training
    assert training is not None
    assert training.settings["shares"] == "1.0,3.0"
    assert training.figures["train_sequences"] == 30
    assert training.data.endswith("; 24 + 6 in folders of their own, mixed 1.0,3.0")


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ("1", "1 shares for 2 shard folders: give one number for each --shards"),
        ("1,0", "shares must be above 0 and finite: got 1.0, 0.0"),
        ("a,b", "numbers with commas between: got 'a,b'"),
    ],
)
def test_shares_that_cannot_be_are_one_line(
    gorgon: Gorgon, tiny: Path, shards: Path, other_shards: Path, tmp_path: Path, shares: str, message: str
) -> None:
    out = tmp_path / "run"
    status, printed, err = gorgon("train", "heads", "--shards", shards, "--shards", other_shards, "--shares", shares,
                                  "--out", out, "--model", tiny, *SETTINGS)  # fmt: skip
    assert status != 0
    assert printed == ""
    assert message in err
    assert not out.exists()
