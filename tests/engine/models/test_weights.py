import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gorgon_engine.models.config import BackboneConfig
from gorgon_engine.models.weights import WeightReader
from gorgon_protocol.errors import ModelError


def read(folder):
    return WeightReader(folder, BackboneConfig.from_folder(folder))


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(folder) -> str:
    with pytest.raises(ModelError) as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("shard_size", ["1GB", "60KB"])
def test_every_tensor_is_read_from_one_file_or_many(tiny, shard_size):
    model, folder = tiny("qwen2", shard_size=shard_size)
    assert (folder / "model.safetensors.index.json").exists() == (shard_size != "1GB")
    reader = read(folder)
    assert len(reader.paths) == (1 if shard_size == "1GB" else len(list(folder.glob("*.safetensors"))))
    for name, tensor in model.state_dict().items():
        assert torch.equal(reader.dense(name), tensor)


@pytest.mark.parametrize("cut", [0, 5, 300, -1])
def test_a_truncated_file_is_named(tiny, cut):
    _, folder = tiny()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    assert f"{path}: not a readable safetensors file" in refusal(folder)


def test_garbage_is_named(tiny):
    _, folder = tiny()
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>" * 100)
    assert "not a readable safetensors file" in refusal(folder)


def test_a_missing_tensor_is_named(tiny):
    _, folder = tiny()
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "model.layers.1.mlp.up_proj.weight is missing" in refusal(folder)


def test_a_wrong_shape_is_named_with_both_shapes(tiny, edit):
    _, folder = tiny()
    edit(folder / "config.json", intermediate_size=96)
    message = refusal(folder)
    assert "model.layers.0.mlp.gate_proj.weight has shape [128, 64], expected [96, 64]" in message
    assert "model.safetensors" in message


def test_surplus_tensors_are_refused_unless_redundant(tiny, edit):
    _, folder = tiny()
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    read(folder)
    edit(folder / "config.json", tie_word_embeddings=True)
    read(folder)
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}))
    assert "unexpected tensor model.layers.0.self_attn.q_norm.weight (1 in all)" in refusal(folder)


def test_a_missing_shard_and_a_lying_index(tiny, edit):
    _, folder = tiny(shard_size="60KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first, second = sorted(set(content["weight_map"].values()))[:2]
    name = next(name for name, shard in content["weight_map"].items() if shard == second)
    edit(index, weight_map=content["weight_map"] | {name: first})
    assert f"lacks tensor {name}" in refusal(folder)
    edit(index, weight_map=content["weight_map"])
    (folder / second).unlink()
    assert f"{folder / second}: missing" in refusal(folder)
    edit(index, weight_map={name: "../other/model.safetensors"})
    assert "outside its folder" in refusal(folder)
    index.write_text("{}")
    assert "not a valid index" in refusal(folder)


def test_old_weight_files_are_named(tiny):
    _, folder = tiny()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "it has pytorch_model.bin: convert it" in refusal(folder)
