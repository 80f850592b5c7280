"""The lifted benchmark at a tiny size: only the sizes change on a GPU."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import lifted_parts
import pytest
import torch
from lifted import run_parts
from lifted_bench import Bar, Bench, Options, Section
from lifted_model import dequantize_nf4, in_float32, load_nf4, with_random_layers
from lifting import Lift, Shape
from transformers import LlamaConfig, LlamaForCausalLM

from gorgon_engine.heads.checkpoint import save_heads
from gorgon_engine.heads.eagle import EagleShape
from gorgon_engine.heads.families import family_fields
from gorgon_engine.models.identity import backbone_identity
from gorgon_engine.models.linear import DenseLinear
from gorgon_engine.models.loading import BackboneWeights
from gorgon_engine.models.nf4 import Nf4Linear, Nf4Tensor
from gorgon_protocol.errors import ModelError
from gorgon_protocol.manifest import BackboneReference, HeadsManifest
from support.eagle import make_head
from support.vocabularies import CHATML, byte_level_bpe, save

CPU = torch.device("cpu")
VOCAB = 352
LARGE = Shape(
    hidden_size=256, intermediate_size=448, num_layers=3, num_heads=8, num_kv_heads=2, head_dim=128, vocab_size=400
)
OPTIONS = Options(
    limit=2,
    tokens=10,
    seconds=600.0,
    context=1024,
    long_context=256,
    step_nodes=(1, 4),
    control_nodes=(1, 4),
    batches=(2,),
    rounds=1,
    check_prompts=2,
    check_tokens=40,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Products are too small to share, and torch's waiting threads would take the others' time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=192,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=VOCAB,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    place = tmp_path_factory.mktemp("lifted") / "small"
    LlamaForCausalLM(config).save_pretrained(place)
    return save(byte_level_bpe(), place, bos="<|endoftext|>", eos="<|im_end|>", chat_template=CHATML)


@pytest.fixture(scope="module")
def heads(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    head = make_head(EagleShape(192, 3, 1, 64, 128, num_heads=2))
    manifest = HeadsManifest(
        name="tiny",
        version="1",
        backbone=BackboneReference(identity=backbone_identity(folder), name="small"),
        vocab_size=VOCAB,
        offsets=(2, 3),
        draft_vocab_size=100,
        dtype="float32",
        quantization="nf4",
        **family_fields(head),
    )
    place = tmp_path_factory.mktemp("heads") / "tiny@1"
    save_heads(place, head, manifest, draft_vocabulary=torch.arange(100) * 3)
    return place


@pytest.fixture(scope="module")
def bench(folder: Path, heads: Path) -> Bench:
    return Bench(folder, LARGE, device=CPU, heads=heads)


@pytest.fixture(scope="module")
def sections(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Section]:
    """Of every part, in one run."""
    path = tmp_path_factory.mktemp("report") / "lifted.json"
    done, broken = run_parts(bench, OPTIONS, list(lifted_parts.PARTS), path)
    assert not broken
    report = json.loads(path.read_text())
    assert [part["name"] for part in report["parts"]] == list(lifted_parts.PARTS)
    assert report["hardware"].startswith("CPU")
    return {section.name: section for section in done}


def test_dequantised_as_bitsandbytes_does_it() -> None:
    weight = Nf4Tensor.quantize(torch.randn(96, 192, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(dequantize_nf4(weight), weight.dequantize(), rtol=0, atol=0)


def linears(weights: BackboneWeights) -> list[Nf4Linear]:
    found = [getattr(layer, name) for layer in weights.layers for name in ("qkv", "o", "gate_up", "down")]
    assert all(isinstance(linear, Nf4Linear) for linear in found)
    return found


def test_the_weights_are_made_alike_each_time(bench: Bench) -> None:
    for one, other in zip(linears(bench.lifted()), linears(bench.lifted()), strict=True):
        assert torch.equal(one.weight.packed, other.weight.packed)
        assert torch.equal(one.weight.absmax, other.weight.absmax)


def test_the_control_holds_no_zeros_and_explodes_nowhere(bench: Bench) -> None:
    control = with_random_layers(bench.lifted(), torch.Generator().manual_seed(1))
    for linear in linears(control):
        dense = dequantize_nf4(linear.weight)
        assert not bool((dense == 0).all(dim=1).any())
        assert not bool((dense == 0).all(dim=0).any())
        assert 0.7 < float(dense.std()) * math.sqrt(linear.in_features) < 1.4


def test_float32_weights_are_the_quantised_ones(bench: Bench) -> None:
    wide = in_float32(bench.small)
    assert isinstance(wide.layers[0].down, DenseLinear)
    theirs = linears(bench.small)[3].dequantize()
    torch.testing.assert_close(wide.layers[0].down.weight, theirs, rtol=0, atol=0)


def test_heads_are_lifted_with_their_vocabulary(bench: Bench) -> None:
    assert [drafter.name for drafter in bench.parts.drafters] == ["head", "lookup"]
    assert bench.parts.heads is not None
    assert bench.parts.heads.name == "tiny"
    assert bench.parts.backbone.config.hidden_size == LARGE.hidden_size


def test_checks_say_that_the_large_model_is_the_small_one(sections: dict[str, Section]) -> None:
    data = sections["checks"].data
    assert data["identical"] == data["num_prompts"] == 2
    assert data["agreement"] > 0.95  # here float32 as well, through another product
    assert all(bar.is_met for bar in sections["checks"].bars)


def test_checks_find_a_model_that_is_another(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lifted wrongly shows: here two query heads have changed places."""
    weights = bench.lifted()
    qkv = weights.layers[0].qkv
    assert isinstance(qkv, Nf4Linear)
    packed = qkv.weight.packed.view(qkv.out_features, -1).clone()
    packed[:256] = packed[:256].roll(128, dims=0)
    wrong = Nf4Linear(replace(qkv.weight, packed=packed.flatten()))
    layers = (replace(weights.layers[0], qkv=wrong), *weights.layers[1:])
    monkeypatch.setattr(bench, "lifted", lambda: replace(weights, layers=layers))
    section = lifted_parts.check(bench, OPTIONS)
    assert section.data["identical"] < 2
    assert not all(bar.is_met for bar in section.bars)


def test_one_stream(sections: dict[str, Section]) -> None:
    section = sections["one"]
    assert [row["temperature"] for row in section.data["rows"]] == [0.0, 0.7]
    for row in section.data["rows"]:
        assert row["num_prompts"] == 2
        assert row["tokens_per_step"] >= 1.0
        assert row["plain"]["tokens_per_second"] > 0.0
        assert row["identical"] + len(row["differences"]) == 2
        assert all(difference["margin"] < 1e-3 for difference in row["differences"])
    names = [bar.name for bar in section.bars]
    assert "plain tokens/s, one stream" in names
    assert "speculative / plain, one stream, T=0.7" in names
    assert len(section.data["calibration"]["steps_by_rows"]) > 2


def test_steps_verify_as_many_nodes_as_they_say(sections: dict[str, Section]) -> None:
    rows = sections["steps"].data["rows"]
    assert {nodes: row["verified"] for nodes, row in rows.items()} == {1: 1, 4: 4}
    assert rows[1]["ratio"] == 1.0
    assert rows[1]["tokens_per_step"] == 1.0


def test_the_control_is_measured_beside(sections: dict[str, Section]) -> None:
    rows = sections["control"].data["rows"]
    assert set(rows) == {1, 4}
    assert all(row["ratio"] == row["random"] / row["lifted"] for row in rows.values())


def test_batches(sections: dict[str, Section]) -> None:
    rows = sections["batches"].data["rows"]
    assert {t: [row["streams"] for row in found] for t, found in rows.items()} == {"0.0": [2], "0.7": [2]}
    assert all(row["on"] > 0.0 for found in rows.values() for row in found)
    assert len(sections["batches"].bars) == 2


def test_memory_runs_sequences_that_fill_the_context(sections: dict[str, Section]) -> None:
    rows = sections["memory"].data["rows"]
    assert [row["fits"] for row in rows] == [True, True]
    assert [row["serving"] for row in rows] == [None, None]  # a CPU's peak is not told


def test_a_part_that_breaks_costs_no_other(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(bench: Bench, options: Options) -> Section:
        raise RuntimeError("a kernel is wrong")

    def whole(bench: Bench, options: Options) -> Section:
        return Section("memory", "Peak memory of the GPU", ["all fits"], {})

    monkeypatch.setitem(lifted_parts.PARTS, "checks", broken)
    monkeypatch.setitem(lifted_parts.PARTS, "memory", whole)
    done, names = run_parts(bench, OPTIONS, ["checks", "memory"], tmp_path / "report.json")
    assert names == ["checks"]
    assert [section.name for section in done] == ["memory"]
    said = capsys.readouterr()
    assert "a kernel is wrong" in said.err
    assert "Peak memory of the GPU\nall fits" in said.out
    assert json.loads((tmp_path / "report.json").read_text())["broken"] == ["checks"]


@pytest.mark.parametrize(
    ("bar", "is_met"),
    [
        (Bar("speed", 2.2, 2.2), True),
        (Bar("speed", 2.19, 2.2), False),
        (Bar("time", 1.35, 1.35, at_least=False), True),
        (Bar("time", 1.36, 1.35, at_least=False), False),
    ],
)
def test_bars(bar: Bar, is_met: bool) -> None:
    assert bar.is_met is is_met
    assert bar.line().endswith("met" if is_met else "MISSED")


def test_a_model_with_biases_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, head_dim=64, vocab_size=50,
        attention_bias=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="its qkv has a bias"):
        load_nf4(tmp_path, device=CPU, dtype=torch.float32)


def test_a_model_that_is_larger_is_refused(bench: Bench) -> None:
    with pytest.raises(ModelError, match="groups are smaller"):
        Lift(bench.small.config, replace(LARGE, num_heads=4), torch.Generator())
