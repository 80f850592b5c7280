"""`gorgon probe` as a person or a script calls it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.conftest import Gorgon

from gorgon_cli.probe import _quoted
from gorgon_engine.heads.checkpoint import save_heads
from gorgon_engine.heads.families import DraftHeads, family_fields
from gorgon_engine.heads.hydra import HydraHeads, HydraShape
from gorgon_engine.heads.medusa import MedusaHeads
from gorgon_engine.models.config import BackboneConfig
from gorgon_engine.models.identity import backbone_identity
from gorgon_engine.tokenizer import Tokenizer
from gorgon_protocol.manifest import BackboneReference, HeadsManifest


def publish(model: Path, place: Path, heads: DraftHeads, offsets: tuple[int, ...], **values: Any) -> Path:
    config = BackboneConfig.from_folder(model)
    fields: dict[str, Any] = {
        "name": "tiny",
        "version": "1",
        "backbone": BackboneReference(identity=backbone_identity(model), name="Tiny"),
        "vocab_size": config.vocab_size,
        "offsets": offsets,
        "dtype": "float32",
        "quantization": "int8",
    }
    save_heads(place, heads, HeadsManifest(**(fields | family_fields(heads) | values)))
    return place


def hydra(hidden_size: int) -> HydraHeads:
    torch.manual_seed(5)
    heads = HydraHeads(HydraShape(hidden_size, num_heads=2, num_blocks=2))
    heads.start_as_pass_through()
    return heads


@pytest.fixture(scope="module")
def tiny_heads(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tiny, tmp_path_factory.mktemp("store") / "tiny@1", hydra(64), (2, 3))


def test_json_names_every_head_and_its_guesses(gorgon: Gorgon, tiny: Path, tiny_heads: Path) -> None:
    status, out, err = gorgon("probe", "the cat", "--model", tiny, "--heads", tiny_heads, "--json")
    assert (status, err) == (0, "")
    heads = json.loads(out)["heads"]
    assert [(head["head"], head["offset"], head["source"]) for head in heads] == [
        (1, 1, "lm_head"), (2, 2, "head"), (3, 3, "head"),
    ]  # fmt: skip
    tokenizer = Tokenizer.from_folder(tiny)
    for head in heads:
        assert len(head["top"]) == 3
        assert [guess["text"] for guess in head["top"]] == [
            tokenizer.token_text(guess["token_id"]) for guess in head["top"]
        ]
        probabilities = [guess["probability"] for guess in head["top"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0 < sum(probabilities) <= 1


def test_the_table_says_the_same_in_aligned_columns(gorgon: Gorgon, tiny: Path, tiny_heads: Path) -> None:
    arguments = ("probe", "the cat", "--model", tiny, "--heads", tiny_heads, "--top", 2)
    heads = json.loads(gorgon(*arguments, "--json")[1])["heads"]
    status, out, err = gorgon(*arguments)
    assert (status, err) == (0, "")
    assert out.endswith("%\n")
    title, *lines = out.splitlines()
    assert title.split() == ["head", "offset", "source", "1st", "2nd"]
    assert len(lines) == len(heads)
    for line, head in zip(lines, heads, strict=True):
        assert line.split()[:3] == [str(head["head"]), str(head["offset"]), head["source"]]
        assert line.index(_quoted(head["top"][0]["text"])) == title.index("1st")
        for guess in head["top"]:
            assert _quoted(guess["text"]) in line
            assert f"{guess['probability']:.1%}" in line


def test_chat_is_another_prompt(gorgon: Gorgon, tiny: Path, tiny_heads: Path) -> None:
    arguments = ("probe", "the cat", "--model", tiny, "--heads", tiny_heads, "--json")
    plain, chat = gorgon(*arguments), gorgon(*arguments, "--chat")
    assert plain[0] == chat[0] == 0
    assert json.loads(plain[1]) != json.loads(chat[1])


def test_the_real_model_knows_the_capital(gorgon: Gorgon, smollm2: Path, tmp_path: Path) -> None:
    """Untrained heads of the seed's kind begin as copies of the lm_head."""
    medusa = MedusaHeads(BackboneConfig.from_folder(smollm2).hidden_size, num_heads=3)
    heads = publish(smollm2, tmp_path / "untrained@1", medusa, (1, 2, 3))
    status, out, err = gorgon("probe", "The capital of France is", "--model", smollm2, "--heads", heads, "--json")
    assert (status, err) == (0, "")
    probes = json.loads(out)["heads"]
    assert [(probe["head"], probe["offset"], probe["source"]) for probe in probes] == [
        (1, 1, "head"), (2, 2, "head"), (3, 3, "head"),
    ]  # fmt: skip
    for probe in probes:
        assert probe["top"][0]["text"] == " Paris"
        assert probe["top"][0]["probability"] > 0.5


def test_another_quantization_is_a_notice(gorgon: Gorgon, tiny: Path, tiny_heads: Path) -> None:
    status, out, err = gorgon(
        "probe", "the cat", "--model", tiny, "--heads", tiny_heads, "--kernels", "torch", "--dtype", "bfloat16"
    )
    assert status == 0
    assert out.count("\n") == 4
    assert err.startswith("gorgon: heads tiny@1 were trained on the backbone in int8 and it is served in its own")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["the cat"], 1, "no trained heads come with the program for {tiny}: give their folder with --heads"),
        (["the cat", "--heads", "none"], 1, "--heads none leaves nothing to probe"),
        (["the cat", "--heads", ""], 1, "--heads is empty"),
        (["the cat", "--heads", "/nowhere"], 1, "/nowhere: no such folder"),
        (["", "--heads", "{heads}"], 1, "the prompt is empty"),
        ([b"\xff", "--heads", "{heads}"], 1, "PROMPT is not UTF-8 text"),
        (["the cat", "--top", "0"], 2, "Invalid value for '--top'"),
        ([], 2, "Missing argument 'PROMPT'"),
        (["the cat", "--drafter", "none"], 2, "No such option '--drafter'"),
        (["the cat", "--max-nodes", "32"], 2, "No such option '--max-nodes'"),
    ],
)
def test_bad_input_is_one_line(
    gorgon: Gorgon, tiny: Path, tiny_heads: Path, arguments: list[Any], status: int, message: str
) -> None:
    texts = [a.decode(errors="surrogateescape") if isinstance(a, bytes) else a for a in arguments]
    ended, out, err = gorgon("probe", *(text.format(heads=tiny_heads) for text in texts), "--model", tiny)
    assert (ended, out) == (status, "")
    assert err.startswith(f"gorgon: {message.format(tiny=tiny)}")
    assert err.count("\n") == 1


def test_help_shows_what_matters_here(gorgon: Gorgon) -> None:
    status, out, _ = gorgon("probe", "--help")
    assert status == 0
    for option in ("--model", "--heads", "--quantization", "--dtype", "--device", "--kernels", "--threads", "--top"):
        assert option in out
    for option in ("--drafter", "--max-nodes", "--fixed-tree", "--context", "--draw-drafts", "--heads-tree"):
        assert option not in out


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" Paris", '" Paris"'),
        ("\n\n", r'"\n\n"'),
        ('"', r'"\""'),
        ("\\", r'"\\"'),
        ("\x1b[2J\x7f", r'"\u001b[2J\x7f"'),
        ("\u202e\u200b\xa0", r'"\u202e\u200b\xa0"'),
        ("猫é🐈", '"猫é🐈"'),
    ],
)
def test_tokens_are_shown_so_that_they_can_be_seen(text: str, shown: str) -> None:
    assert _quoted(text) == shown
