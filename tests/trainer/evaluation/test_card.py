"""The model card says what the manifest and the figures say."""

import re
from datetime import UTC, datetime
from typing import Any

import pytest
from trainer.evaluation.inputs import OFFSETS, inputs

from gorgon_protocol.manifest import BackboneReference, DecoderLayer, FileRecord, HeadsManifest, TrainingRecord
from gorgon_trainer.evaluation.card import model_card
from gorgon_trainer.evaluation.report import ReportInputs


def manifest(**values: Any) -> HeadsManifest:
    fields: dict[str, Any] = {
        "family": "hydra",
        "name": "tiny",
        "version": "3",
        "backbone": BackboneReference(identity="ab" * 32, name="Tiny-Instruct"),
        "hidden_size": 64,
        "vocab_size": 49152,
        "num_heads": 3,
        "offsets": OFFSETS,
        "num_blocks": 4,
        "normalised": True,
        "projection": "shared",
        "draft_vocab_size": 16384,
        "dtype": "bfloat16",
        "quantization": "int8",
        "training": TrainingRecord(
            data="Answers of the backbone itself to public prompts",
            created=datetime(2025, 1, 2, tzinfo=UTC),
            settings={"decay": 1.0, "cache_features": False},
            figures={"train_positions": 6512345.0},
        ),
        "files": {"heads.safetensors": FileRecord(sha256="cd" * 32, size=15_000_000)},
    }
    return HeadsManifest(**(fields | values))


def test_everything_a_reader_asks_is_answered() -> None:
    card = model_card(manifest(), inputs())
    assert card.startswith("---\nlicense: apache-2.0\nbase_model: 'Tiny-Instruct'\n")
    headings = re.findall(r"^## (.*)$", card, re.MULTILINE)
    assert headings == ["Figures", "How to use", "Training data", "How it was made", "Limitations"]
    for said in (
        "# tiny@3: draft heads for Tiny-Instruct",
        "2402.05109",
        "share the backbone's projection",
        "the 16,384 most frequent of 49,152 tokens can be drafted",
        "| backbone | Tiny-Instruct (abababababab) |",
        "| offsets | 2, 3, 4 |",
        "| files | 15.0 MB |",
        "| licence | Apache-2.0 |",
        "| 4 | 1.90 | 1.50 |",
        "--heads tiny@3",
        "Answers of the backbone itself to public prompts.",
        "gorgon train heads --shards shards",
        "| train_positions | 6,512,345 |",
        "| cache_features | no |",
        "NVIDIA H100",
    ):
        assert said in card, said


def test_another_family_with_nothing_but_its_manifest() -> None:
    bare = manifest(
        family="medusa", normalised=False, projection="own", draft_vocab_size=None, training=None, offsets=(1, 2, 3),
        files={},
    )  # fmt: skip
    card = model_card(bare, ReportInputs(title="unused"))
    for said in ("2401.10774", "have their own projections", "all tokens can be drafted", "Not recorded."):
        assert said in card
    assert "## Figures" not in card
    assert "| files |" not in card


def test_an_eagle_head_is_called_what_it_is() -> None:
    layer = DecoderLayer(num_query_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96, rope_theta=1e4)
    card = model_card(manifest(family="eagle", normalised=False, num_blocks=1, layer=layer), inputs())
    for said in ("2401.15077", "| depths | 3 |", "| decoder layers | 1 |", "share the backbone's projection"):
        assert said in card, said


@pytest.mark.parametrize("name", ["O'Neil: a model", "[draft] #1"])
def test_the_metadata_stays_one_value_a_line(name: str) -> None:
    card = model_card(manifest(backbone=BackboneReference(identity="ab" * 32, name=name)), ReportInputs(title="x"))
    metadata = card.split("---\n")[1]
    assert [line.partition(":")[0] for line in metadata.splitlines()] == [
        "license", "base_model", "library_name", "tags",
    ]  # fmt: skip
    assert metadata.splitlines()[1].partition(": ")[2][0] in "'\""
