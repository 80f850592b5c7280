"""Foreign folders that are not what they say: one clear line each, and nothing written."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from trainer.interop.conftest import (
    HIDDEN,
    HYDRA_CONFIG,
    MEDUSA_CONFIG,
    VLLM_CONFIG,
    WriteForeign,
    hydra_tensors,
    medusa_tensors,
    vllm_tensors,
)

from gorgon_protocol.errors import HeadsError
from gorgon_trainer.interop.convert import ImportFormat, import_heads
from gorgon_trainer.interop.foreign import Backbone
from support.models import VOCAB

Tensors = dict[str, torch.Tensor]
Change = Callable[[dict[str, Any], Tensors], object]


def refusal(source: Path, backbone: Backbone, **options: Any) -> str:
    out = source.parent / "out"
    with pytest.raises(HeadsError) as raised:
        import_heads(source, out, backbone=backbone, name="imported", **options)
    assert [path.name for path in source.parent.iterdir() if path != source] == []
    message = str(raised.value)
    assert "\n" not in message
    assert str(source) in message
    return message


def refused(write: WriteForeign, kind: str, change: Change, backbone: Backbone) -> str:
    config, tensors, file = {
        "medusa": (dict(MEDUSA_CONFIG), medusa_tensors(num_heads=2), "medusa_lm_head.safetensors"),
        "vllm": (dict(VLLM_CONFIG), vllm_tensors(), "model.safetensors"),
        "hydra": (dict(HYDRA_CONFIG), hydra_tensors(), "hydra_lm_head.pt"),
    }[kind]
    change(config, tensors)
    return refusal(write(config, tensors, file), backbone)


def rename(tensors: Tensors, old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: t.pop("1.0.linear.bias"), "tensor 1.0.linear.bias is missing"),
        (lambda c, t: t.pop("1.1.weight"), "tensor 1.1.weight is missing"),
        (lambda c, t: rename(t, "1.0.linear.weight", "2.0.linear.weight"), "tensor 1.0.linear.weight is missing"),
        (
            lambda c, t: [t.pop(name) for name in list(t) if name.startswith("0.")],
            "tensors (1.0.linear.bias, 1.0.linear.weight, 1.1.weight, ...) are not of the layout medusa",
        ),
        (
            lambda c, t: t.update({"0.5.linear.weight": t["0.0.linear.weight"].clone()}),
            "its layers are numbered [0, 5]",
        ),
        (
            lambda c, t: t.update({"model.norm.weight": torch.ones(HIDDEN)}),
            "1 tensors have no place in this layout (model.norm.weight)",
        ),
        (lambda c, t: t.update({"0.1.weight": torch.ones(VOCAB + 1, HIDDEN)}), f"[{VOCAB + 1}, {HIDDEN}], this"),
        (lambda c, t: t.update({"0.0.linear.weight": torch.ones(32, 32)}), "has shape [32, 32], this backbone needs"),
        (
            lambda c, t: t.update({"0.0.linear.bias": torch.ones(HIDDEN, dtype=torch.int32)}),
            "is torch.int32: heads are",
        ),
        (lambda c, t: t["0.0.linear.bias"].fill_(torch.nan), "0.0.linear.bias holds values that are not finite"),
        (lambda c, t: c.update(version="2"), "has projections of its own, but its config says version '2'"),
        (
            lambda c, t: [c.update(version="1"), t.pop("0.1.weight"), t.pop("1.1.weight")],
            "has no projections of its own, but its config says version '1'",
        ),
    ],
)
def test_medusa_files(write_foreign: WriteForeign, backbone: Backbone, change: Change, message: str) -> None:
    assert message in refused(write_foreign, "medusa", change, backbone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: t.pop("blocks.1.layers.0.bias"), "tensor blocks.1.layers.0.bias is missing"),
        (lambda c, t: t.pop("lm_heads.2.weight"), "tensor lm_heads.2.weight is missing"),
        (lambda c, t: c.update(hidden_size=4096), f"hidden_size in its config is 4096, of Tiny {HIDDEN}"),
        (lambda c, t: c.update(vocab_size=32001), f"vocab_size in its config is 32001, of Tiny {VOCAB}"),
        (lambda c, t: c.update(logit_scale=0.5), "logit_scale 0.5 is not supported"),
        (lambda c, t: c.update(original_lm_head=True), "says original_lm_head, but the heads' projections differ"),
        (lambda c, t: c.update(truncated_vocab_size=10), "truncated_vocab_size is 10 and token_map is missing"),
        (
            lambda c, t: [c.update(truncated_vocab_size=10), t.update(token_map=torch.arange(9))],
            "token_map has 9 tokens, truncated_vocab_size is 10",
        ),
        (
            lambda c, t: [c.update(truncated_vocab_size=2), t.update(token_map=torch.tensor([5, 5]))],
            f"token_map must be different token ids below {VOCAB}",
        ),
        (
            lambda c, t: [c.update(truncated_vocab_size=2), t.update(token_map=torch.tensor([0, VOCAB]))],
            f"token_map must be different token ids below {VOCAB}",
        ),
        (
            lambda c, t: [c.update(truncated_vocab_size=2), t.update(token_map=torch.tensor([0.0, 1.0]))],
            "token_map is torch.float32 [2], not a list of token ids",
        ),
        (
            lambda c, t: t.update({"lm_heads.0.weight": torch.ones(10, HIDDEN)}),
            f"a projection has 10 rows, the tokens to draft are {VOCAB}",
        ),
        (
            lambda c, t: t.update({"medusa_heads.lm_heads.0.weight": torch.ones(VOCAB, HIDDEN)}),
            "holds tensors twice, with and without medusa_heads.",
        ),
        (lambda c, t: t.update({"lm_heads.3.weight": torch.ones(VOCAB, HIDDEN)}), "no place in this layout"),
    ],
)
def test_vllm_files(write_foreign: WriteForeign, backbone: Backbone, change: Change, message: str) -> None:
    assert message in refused(write_foreign, "vllm", change, backbone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: t.pop("hydra_mlp.2.0.res_connection.weight"), "hydra_mlp.2.0.res_connection.weight is missing"),
        (lambda c, t: t.pop("hydra_lm_head.0.bias"), "tensor hydra_lm_head.0.bias is missing"),
        (lambda c, t: c.update(hydra_head_arch="prefix-mlp"), "architecture 'prefix-mlp' is not supported, only mlp"),
        (lambda c, t: c.update(hydra_head_arch="eagle-attn"), "architecture 'eagle-attn' is not supported, only mlp"),
        (lambda c, t: c.update(grounded_heads=False), "its heads are not grounded"),
        (lambda c, t: c.update(hidden_state_offset=2), "an inner layer (hidden_state_offset 2)"),
        (
            lambda c, t: t.update({"hydra_mlp.1.2.linear.bias": torch.ones(HIDDEN)}),
            "layers 1 and 2 of head 1 differ, and Hydra repeats one",
        ),
        (
            lambda c, t: t.update({"hydra_mlp.0.0.linear.weight": torch.ones(HIDDEN, HIDDEN)}),
            f"this backbone needs [{HIDDEN}, {2 * HIDDEN}]",
        ),
        (
            lambda c, t: t.update({"input_embed_fn.weight": torch.randn(VOCAB, HIDDEN)}),
            "its input_embed_fn.weight is not the embedding of Tiny: another backbone",
        ),
        (lambda c, t: t.update({"prefix.weight": torch.ones(1)}), "no place in this layout (prefix.weight)"),
    ],
)
def test_hydra_files(write_foreign: WriteForeign, backbone: Backbone, change: Change, message: str) -> None:
    assert message in refused(write_foreign, "hydra", change, backbone)


class _Runs:
    """A pickle that runs a command when it is read carelessly."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("plain_pickle", [True, False])
@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "hydra_lm_head.pt", "pytorch_model.bin"])
def test_a_pickle_that_wants_to_run_code(tmp_path: Path, backbone: Backbone, file: str, plain_pickle: bool) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    content = {"0.0.linear.weight": _Runs(f"touch {tmp_path / 'ran'}")}
    if plain_pickle:
        (folder / file).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, folder / file)
    assert "only plain tensors are taken from a pickle" in refusal(folder, backbone)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds no tensors by name"),
        ({}, "holds no tensors by name"),
        ({"0.0.linear.weight": 3}, "'0.0.linear.weight' is int, not a plain tensor"),
        ({"0.0.linear.weight": [torch.ones(1)]}, "is list, not a plain tensor"),
        ({1: torch.ones(1)}, "'1' is Tensor, not a plain tensor by name"),
        ({"state_dict": {"0.0.linear.weight": torch.ones(1)}}, "'state_dict' is dict, not a plain tensor"),
        ({"0.0.linear.weight": torch.ones(2, 2).to_sparse()}, "not a plain tensor by name"),
    ],
)
def test_pickles_of_other_things(tmp_path: Path, backbone: Backbone, content: Any, message: str) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.save(content, folder / "medusa_lm_head.pt")
    assert message in refusal(folder, backbone)


@pytest.mark.parametrize("content", [b"", b"not a file of tensors", b"PK\x03\x04 not a zip either", "cut"])
@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "medusa_lm_head.safetensors", "hydra_lm_head.pt"])
def test_damaged_files(tmp_path: Path, backbone: Backbone, file: str, content: bytes | str) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    if isinstance(content, str):
        save = save_file if file.endswith("safetensors") else torch.save
        save(medusa_tensors(), folder / file)
        content = (folder / file).read_bytes()[:2000]
    (folder / file).write_bytes(content)
    assert file in refusal(folder, backbone)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no config.json"),
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no heads of a known layout"),
    ],
)
def test_folders_without_heads(tmp_path: Path, backbone: Backbone, content: str | None, message: str) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    if content is not None:
        (folder / "config.json").write_text(content)
    assert message in refusal(folder, backbone)


def test_what_is_not_there(tmp_path: Path, backbone: Backbone) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere", backbone)


def test_another_layout_than_the_one_named(write_foreign: WriteForeign, backbone: Backbone) -> None:
    source = write_foreign(MEDUSA_CONFIG, medusa_tensors(), "medusa_lm_head.safetensors")
    assert "expected hydra: hydra_lm_head.pt" in refusal(source, backbone, format=ImportFormat.HYDRA)
    assert "are not of the layout vllm-medusa" in refusal(source, backbone, format=ImportFormat.VLLM_MEDUSA)
    (source / "medusa_lm_head.safetensors").rename(source / "hydra_lm_head.safetensors")
    assert "are not of the layout hydra" in refusal(source, backbone)


def test_a_whole_model_is_no_heads_checkpoint(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(HeadsError, match="no heads of a known layout"):
        import_heads(backbone.folder, tmp_path / "out", backbone=backbone, name="imported")


@pytest.mark.parametrize("values", [{"name": "../up"}, {"version": ""}])
def test_names_that_cannot_be_folders(write_foreign: WriteForeign, backbone: Backbone, values: dict[str, str]) -> None:
    source = write_foreign(MEDUSA_CONFIG, medusa_tensors(), "medusa_lm_head.safetensors")
    out = source.parent / "out"
    with pytest.raises(HeadsError, match=f"{next(iter(values))}: String should match"):
        import_heads(source, out, **({"backbone": backbone, "name": "imported"} | values))
    assert not out.exists()


def test_nothing_is_overwritten(write_foreign: WriteForeign, backbone: Backbone, tmp_path: Path) -> None:
    source = write_foreign(MEDUSA_CONFIG, medusa_tensors(), "medusa_lm_head.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text(json.dumps("kept"))
    with pytest.raises(HeadsError, match="exists already"):
        import_heads(source, tmp_path / "out", backbone=backbone, name="imported")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
