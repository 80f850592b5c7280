"""Other projects' layouts: what they compute is what we compute, and what is written comes back the same bits."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trainer.interop.conftest import (
    HIDDEN,
    HYDRA_CONFIG,
    MEDUSA_CONFIG,
    VLLM_CONFIG,
    WriteForeign,
    hydra,
    hydra_tensors,
    medusa,
    medusa_tensors,
    save_checkpoint,
    vllm_tensors,
)

from gorgon_engine.heads.checkpoint import LoadedHeads, read_heads
from gorgon_engine.heads.families import DraftHeads
from gorgon_engine.heads.hydra import HydraHeads
from gorgon_engine.heads.medusa import MedusaHeads
from gorgon_protocol.errors import HeadsError
from gorgon_trainer.interop.convert import ExportFormat, ImportFormat, ImportResult, export_heads, import_heads
from gorgon_trainer.interop.foreign import Backbone
from support.models import VOCAB

VOCABULARY = torch.tensor([3, 8, 20, 21, 40, 66])


def do_import(source: Path, out: Path, backbone: Backbone, **options: Any) -> tuple[ImportResult, LoadedHeads]:
    result = import_heads(source, out, backbone=backbone, name="imported", **options)
    return result, read_heads(out)


def logits_of(loaded: LoadedHeads, backbone: Backbone, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """hidden [P, C], tokens [P, K] -> [P, K, V'], in float32."""
    lm_head = backbone.lm_head().float()
    if loaded.draft_vocabulary is not None:
        lm_head = lm_head[loaded.draft_vocabulary]
    heads = loaded.heads.float()

    def shared(features: torch.Tensor) -> torch.Tensor:
        return features @ lm_head.T

    with torch.no_grad():
        if isinstance(heads, MedusaHeads):
            return heads(hidden, shared)
        return torch.stack(heads(hidden, backbone.embedding().float()[tokens], shared), dim=1)


def inputs(num_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    return torch.randn(4, HIDDEN), torch.randint(VOCAB, (4, num_heads))


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


@pytest.mark.parametrize("file", ["medusa_lm_head.safetensors", "medusa_lm_head.pt"])
@pytest.mark.parametrize(("own", "num_layers"), [(True, 1), (False, 1), (True, 3)])
def test_medusa_files_compute_the_same_here(
    write_foreign: WriteForeign, tmp_path: Path, backbone: Backbone, own: bool, num_layers: int, file: str
) -> None:
    tensors = medusa_tensors(own=own, num_layers=num_layers)
    config = MEDUSA_CONFIG | {"medusa_num_layers": num_layers} | ({} if own else {"version": "2"})
    result, loaded = do_import(write_foreign(config, tensors, file), tmp_path / "out", backbone)
    assert result.format is ImportFormat.MEDUSA
    assert result.manifest.offsets == (2, 3, 4, 5, 6), "their first head guesses what follows the next token"
    assert result.manifest.projection == ("own" if own else "shared")
    hidden, tokens = inputs(5)
    for i, logits in enumerate(logits_of(loaded, backbone, hidden, tokens).unbind(1)):
        x = hidden
        for j in range(num_layers):
            x = x + silu(x @ tensors[f"{i}.{j}.linear.weight"].T + tensors[f"{i}.{j}.linear.bias"])
        projection = tensors[f"{i}.{num_layers}.weight"] if own else backbone.lm_head()
        torch.testing.assert_close(logits, x @ projection.T)


@pytest.mark.parametrize("prefix", ["", "medusa_heads."])
@pytest.mark.parametrize("rows", ["picked", "whole", "all"])
def test_vllm_files_compute_the_same_here(
    write_foreign: WriteForeign, tmp_path: Path, backbone: Backbone, rows: str, prefix: str
) -> None:
    """picked: projections with the rows of the token map; whole: of all tokens, from which it picks; all: no map."""
    shuffled = VOCABULARY[[4, 0, 5, 2, 1, 3]]
    tensors = vllm_tensors(rows=shuffled.numel() if rows == "picked" else VOCAB)
    foreign, config = dict(tensors), dict(VLLM_CONFIG)
    if rows != "all":
        foreign["token_map"] = shuffled
        config["truncated_vocab_size"] = shuffled.numel()
    source = write_foreign(config, {prefix + name: t for name, t in foreign.items()}, "model.safetensors")
    result, loaded = do_import(source, tmp_path / "out", backbone)
    assert result.format is ImportFormat.VLLM_MEDUSA
    assert result.notices == ()
    assert result.manifest.offsets == (2, 3, 4)
    if rows == "all":
        assert loaded.draft_vocabulary is None
    else:
        assert loaded.draft_vocabulary is not None
        assert torch.equal(loaded.draft_vocabulary, VOCABULARY), "in ascending order"
    hidden, tokens = inputs(3)
    for i, logits in enumerate(logits_of(loaded, backbone, hidden, tokens).unbind(1)):
        x = hidden
        for j in range(2):
            x = x + silu(x @ tensors[f"blocks.{i}.layers.{j}.weight"].T + tensors[f"blocks.{i}.layers.{j}.bias"])
        projection = tensors[f"lm_heads.{i}.weight"]
        if rows == "whole":
            projection = projection[shuffled]
        expected = torch.full((4, VOCAB), -torch.inf)
        expected[:, shuffled if rows != "all" else slice(None)] = x @ projection.T
        actual = torch.full((4, VOCAB), -torch.inf)
        actual[:, slice(None) if loaded.draft_vocabulary is None else loaded.draft_vocabulary] = logits
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("embedding", [True, False])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_hydra_files_compute_the_same_here(
    write_foreign: WriteForeign, tmp_path: Path, backbone: Backbone, num_layers: int, embedding: bool
) -> None:
    tensors = hydra_tensors(num_layers=num_layers)
    foreign = tensors | ({"input_embed_fn.weight": backbone.embedding().half()} if embedding else {})
    config = HYDRA_CONFIG | {"hydra_num_layers": num_layers}
    result, loaded = do_import(write_foreign(config, foreign, "hydra_lm_head.pt"), tmp_path / "out", backbone)
    assert result.format is ImportFormat.HYDRA
    assert result.manifest.residual == "matrix"
    assert result.manifest.projection_bias
    hidden, tokens = inputs(3)
    embedded = backbone.embedding()[tokens]  # [P, K, C]
    for i, logits in enumerate(logits_of(loaded, backbone, hidden, tokens).unbind(1)):
        x = torch.cat([hidden, *embedded[:, : i + 1].unbind(1)], dim=-1)
        first, *later = (f"hydra_mlp.{i}.{j}" for j in range(num_layers))
        x = (x @ tensors[f"{first}.res_connection.weight"].T + tensors[f"{first}.res_connection.bias"]) + silu(
            x @ tensors[f"{first}.linear.weight"].T + tensors[f"{first}.linear.bias"]
        )
        for name in later:
            x = x + silu(x @ tensors[f"{name}.linear.weight"].T + tensors[f"{name}.linear.bias"])
        expected = x @ tensors[f"hydra_lm_head.{i}.weight"].T + tensors[f"hydra_lm_head.{i}.bias"]
        torch.testing.assert_close(logits, expected)


def tensors_of(heads: DraftHeads) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in heads.named_parameters()}


def round_trip(
    tmp_path: Path, heads: DraftHeads, backbone: Backbone, format: ExportFormat, vocabulary: torch.Tensor | None = None
) -> LoadedHeads:
    """The heads after export and import: checked to be the same bits and to give the same logits."""
    written = save_checkpoint(tmp_path / "first", heads, backbone, vocabulary=vocabulary)
    export_heads(tmp_path / "first", tmp_path / "foreign", format=format, backbone=backbone)
    result, again = do_import(tmp_path / "foreign", tmp_path / "second", backbone)
    kept = {"name", "version", "training", "files"}
    assert result.manifest.model_dump(exclude=kept) == written.model_dump(exclude=kept)
    before, after = tensors_of(heads), tensors_of(again.heads)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    assert (again.draft_vocabulary is None) == (vocabulary is None)
    assert vocabulary is None or torch.equal(vocabulary, again.draft_vocabulary)
    hidden, tokens = inputs(heads.num_heads)
    first = logits_of(read_heads(tmp_path / "first"), backbone, hidden, tokens)
    assert torch.equal(first, logits_of(again, backbone, hidden, tokens))
    return again


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("num_blocks", [1, 3])
@pytest.mark.parametrize(
    ("format", "own"),
    [
        (ExportFormat.MEDUSA_V1, True),
        (ExportFormat.MEDUSA_V1, False),
        (ExportFormat.MEDUSA_V2, False),
        (ExportFormat.VLLM_MEDUSA, True),
        (ExportFormat.VLLM_MEDUSA, False),
    ],
)
def test_medusa_heads_come_back(
    tmp_path: Path, backbone: Backbone, format: ExportFormat, own: bool, num_blocks: int, dtype: str
) -> None:
    round_trip(tmp_path, medusa(num_blocks=num_blocks, rows=VOCAB if own else None, dtype=dtype), backbone, format)


@pytest.mark.parametrize("own", [True, False])
def test_a_draft_vocabulary_comes_back(tmp_path: Path, backbone: Backbone, own: bool) -> None:
    heads = medusa(rows=VOCABULARY.numel() if own else None)
    round_trip(tmp_path, heads, backbone, ExportFormat.VLLM_MEDUSA, VOCABULARY)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("num_blocks", [1, 3])
@pytest.mark.parametrize(
    "shape",
    [
        {"matrix_residual": True, "own_projection": VOCAB, "projection_bias": True},
        {"matrix_residual": True, "own_projection": VOCAB},
        {"matrix_residual": True},
        {},
    ],
)
def test_hydra_heads_come_back(
    tmp_path: Path, backbone: Backbone, shape: dict[str, Any], num_blocks: int, dtype: str
) -> None:
    round_trip(tmp_path, hydra(num_blocks=num_blocks, dtype=dtype, **shape), backbone, ExportFormat.HYDRA)


@pytest.mark.parametrize("format", [ExportFormat.MEDUSA_V1, ExportFormat.VLLM_MEDUSA])
def test_the_head_of_offset_1_is_left_out(tmp_path: Path, backbone: Backbone, format: ExportFormat) -> None:
    heads = medusa(num_heads=4, rows=VOCAB)
    save_checkpoint(tmp_path / "first", heads, backbone, offsets=(1, 2, 3, 4))
    (notice,) = export_heads(tmp_path / "first", tmp_path / "foreign", format=format)
    assert notice == f"the head of offset 1 is left out: {format} begins at offset 2"
    result, again = do_import(tmp_path / "foreign", tmp_path / "second", backbone)
    assert result.manifest.offsets == (2, 3, 4)
    assert all(torch.equal(tensor[1:], tensors_of(again.heads)[name]) for name, tensor in tensors_of(heads).items())


def test_what_is_exported_has_the_names_that_others_read(tmp_path: Path, backbone: Backbone) -> None:
    save_checkpoint(tmp_path / "own", medusa(num_heads=1, rows=VOCAB), backbone)
    save_checkpoint(tmp_path / "shared", medusa(num_heads=1), backbone)
    no_bias = medusa(num_heads=2)
    torch.nn.init.zeros_(no_bias.bias)
    save_checkpoint(tmp_path / "no-bias", no_bias, backbone)
    save_checkpoint(tmp_path / "hydra", hydra(num_heads=1, num_blocks=3), backbone)

    def export(name: str, format: ExportFormat) -> tuple[dict[str, Any], set[str]]:
        out = tmp_path / f"{name}-{format}"
        export_heads(tmp_path / name, out, format=format, backbone=backbone)
        (weights,) = (path for path in out.iterdir() if path.name != "config.json")
        read = load_file(weights) if weights.suffix == ".safetensors" else torch.load(weights, weights_only=True)
        return json.loads((out / "config.json").read_text()), {weights.name, *read}

    linear = {"medusa_lm_head.safetensors", "0.0.linear.weight", "0.0.linear.bias"}
    config, names = export("own", ExportFormat.MEDUSA_V1)
    assert names == linear | {"0.1.weight"}
    assert config == {
        "medusa_num_heads": 1,
        "medusa_num_layers": 1,
        "base_model_name_or_path": "Tiny",
        "version": "1",
    }, "TGI takes a config with `architectures` for another kind of speculator"
    config, names = export("shared", ExportFormat.MEDUSA_V2)
    assert (config["version"], names) == ("2", linear)
    config, names = export("own", ExportFormat.VLLM_MEDUSA)
    block = {"model.safetensors", "blocks.0.layers.0.weight"}
    assert names == block | {"blocks.0.layers.0.bias", "lm_heads.0.weight"}
    assert config["model_type"] == "medusa"
    assert (config["medusa_fc_bias"], config["original_lm_head"]) == (True, False), "vLLM drops biases without the flag"
    assert (config["num_heads"], config["num_hidden_layers"], config["truncated_vocab_size"]) == (1, 1, VOCAB)
    config, names = export("no-bias", ExportFormat.VLLM_MEDUSA)
    assert names == block | {"blocks.1.layers.0.weight", "lm_heads.0.weight"}
    assert (config["medusa_fc_bias"], config["original_lm_head"]) == (False, True)
    config, names = export("hydra", ExportFormat.HYDRA)
    parts = ("mlp.0.0.linear", "mlp.0.0.res_connection", "mlp.0.1.linear", "mlp.0.2.linear", "lm_head.0")
    assert names == {"hydra_lm_head.pt"} | {f"hydra_{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert (config["hydra_head_arch"], config["grounded_heads"], config["hydra_num_layers"]) == ("mlp", True, 3)


def test_a_projection_that_is_the_backbones_is_shared(
    write_foreign: WriteForeign, tmp_path: Path, backbone: Backbone
) -> None:
    tensors = medusa_tensors(num_heads=2)
    for i in range(2):
        tensors[f"{i}.1.weight"] = backbone.lm_head().clone()
    source = write_foreign(MEDUSA_CONFIG | {"medusa_num_heads": 2}, tensors, "medusa_lm_head.pt")
    assert do_import(source, tmp_path / "out", backbone)[0].manifest.projection == "shared"


def test_vllm_heads_with_one_projection_that_is_not_the_backbones(
    write_foreign: WriteForeign, tmp_path: Path, backbone: Backbone
) -> None:
    tensors = vllm_tensors()
    del tensors["lm_heads.1.weight"], tensors["lm_heads.2.weight"]
    source = write_foreign(VLLM_CONFIG | {"original_lm_head": True}, tensors, "model.safetensors")
    result, loaded = do_import(source, tmp_path / "out", backbone)
    assert "not this backbone's lm_head" in result.notices[0]
    projection = tensors_of(loaded.heads)["projection"]
    assert all(torch.equal(rows, tensors["lm_heads.0.weight"]) for rows in projection)


def test_the_tensors_count_and_not_the_config(write_foreign: WriteForeign, tmp_path: Path, backbone: Backbone) -> None:
    source = write_foreign(MEDUSA_CONFIG | {"medusa_num_heads": 2}, medusa_tensors(), "medusa_lm_head.pt")
    result, _ = do_import(source, tmp_path / "out", backbone)
    assert result.manifest.num_heads == 5
    assert result.notices[0] == "its config counts 2 heads, the tensors are of 5: the tensors decide"
    assert "trained on org/tiny" in result.notices[1]
    assert result.manifest.training is not None
    assert result.manifest.training.settings == {"imported_from": "medusa", "base_model": "org/tiny"}


@pytest.mark.parametrize("zero", [True, False])
def test_biases_that_vllm_would_drop_are_used_and_told(
    write_foreign: WriteForeign, tmp_path: Path, backbone: Backbone, zero: bool
) -> None:
    tensors = vllm_tensors()
    if zero:
        tensors = {name: torch.zeros_like(t) if name.endswith("bias") else t for name, t in tensors.items()}
    config = {name: value for name, value in VLLM_CONFIG.items() if name != "medusa_fc_bias"}
    result, loaded = do_import(write_foreign(config, tensors, "model.safetensors"), tmp_path / "out", backbone)
    assert [("medusa_fc_bias" in notice) for notice in result.notices] == ([] if zero else [True])
    assert torch.equal(tensors_of(loaded.heads)["bias"][1, 1], tensors["blocks.1.layers.1.bias"])


def test_files_of_mixed_precision_are_widened(write_foreign: WriteForeign, tmp_path: Path, backbone: Backbone) -> None:
    tensors = medusa_tensors(num_heads=1, own=False)
    tensors = {name: t.half() if name.endswith("weight") else t.bfloat16() for name, t in tensors.items()}
    source = write_foreign(MEDUSA_CONFIG, tensors, "medusa_lm_head.pt")
    result, loaded = do_import(source, tmp_path / "out", backbone)
    assert result.manifest.dtype == "float32"
    assert torch.equal(tensors_of(loaded.heads)["weight"][0, 0], tensors["0.0.linear.weight"].float())


def test_hydra_shares_the_repeated_block_in_its_file(tmp_path: Path, backbone: Backbone) -> None:
    save_checkpoint(tmp_path / "first", hydra(num_blocks=4), backbone)
    export_heads(tmp_path / "first", tmp_path / "out", format=ExportFormat.HYDRA, backbone=backbone)
    tensors = torch.load(tmp_path / "out" / "hydra_lm_head.pt", weights_only=True)
    places = {tensors[f"hydra_mlp.0.{j}.linear.weight"].data_ptr() for j in (1, 2, 3)}
    assert len(places) == 1


def export_refusal(tmp_path: Path, heads: DraftHeads, backbone: Backbone, format: ExportFormat, **options: Any) -> str:
    given = options.pop("given", None)
    save_checkpoint(tmp_path / "first", heads, backbone, **options)
    with pytest.raises(HeadsError) as raised:
        export_heads(tmp_path / "first", tmp_path / "out", format=format, backbone=given)
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    assert "\n" not in str(raised.value)
    assert str(tmp_path / "first") in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("make", "format", "message"),
    [
        (lambda: hydra(normalised=True), ExportFormat.HYDRA, "normalise their inputs"),
        (lambda: hydra(equal_blocks=False), ExportFormat.HYDRA, "blocks of head 0 differ, and Hydra repeats one"),
        (hydra, ExportFormat.HYDRA, "share their backbone's: give the model$"),
        (hydra, ExportFormat.VLLM_MEDUSA, "its heads are of the family hydra"),
        (medusa, ExportFormat.HYDRA, "its heads are of the family medusa"),
        (medusa, ExportFormat.MEDUSA_V1, "give the model, or use medusa-v2"),
        (medusa, ExportFormat.VLLM_MEDUSA, "give the model, or use medusa-v2"),
        (lambda: medusa(rows=VOCAB), ExportFormat.MEDUSA_V2, "projections of their own: use medusa-v1"),
    ],
)
def test_what_a_layout_cannot_say_is_not_exported(
    tmp_path: Path, backbone: Backbone, make: Any, format: ExportFormat, message: str
) -> None:
    refusal = export_refusal(tmp_path, make(), backbone, format)
    assert f"not exported as {format}: " in refusal
    assert re.search(message, refusal)


def test_more_that_is_not_exported(tmp_path: Path, backbone: Backbone, other_backbone: Backbone) -> None:
    (tmp_path / "a").mkdir()
    refusal = export_refusal(tmp_path / "a", medusa(), backbone, ExportFormat.MEDUSA_V2, offsets=(1, 2, 4))
    assert "its offsets [1, 2, 4] are not 2, 3, ... without a gap" in refusal
    (tmp_path / "b").mkdir()
    refusal = export_refusal(tmp_path / "b", medusa(), backbone, ExportFormat.MEDUSA_V2, vocabulary=VOCABULARY)
    assert "a part of the vocabulary, which only vllm-medusa can say" in refusal
    (tmp_path / "c").mkdir()
    refusal = export_refusal(tmp_path / "c", medusa(), backbone, ExportFormat.MEDUSA_V1, given=other_backbone)
    assert "heads of another backbone" in refusal
    (tmp_path / "d").mkdir()
    with pytest.raises(HeadsError, match="exists already"):
        export_heads(tmp_path / "c" / "first", tmp_path / "d", format=ExportFormat.MEDUSA_V2)


def test_blocks_that_the_original_program_would_repeat_are_told(tmp_path: Path, backbone: Backbone) -> None:
    save_checkpoint(tmp_path / "first", medusa(num_blocks=2), backbone)
    notices = export_heads(tmp_path / "first", tmp_path / "out", format=ExportFormat.MEDUSA_V2)
    assert any("repeats the last block" in notice for notice in notices)
    assert any("one block a head only" in notice for notice in notices)


def test_imported_heads_are_of_the_family_that_serves_them(tmp_path: Path, backbone: Backbone) -> None:
    assert isinstance(round_trip(tmp_path, hydra(), backbone, ExportFormat.HYDRA).heads, HydraHeads)
