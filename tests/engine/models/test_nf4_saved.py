"""Folders saved in 4 bits by bitsandbytes, read back: the dequantised weights are its own, bit for bit."""

import json

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file

from gorgon_engine.models.config import BackboneConfig, SavedQuantization
from gorgon_engine.models.linear import DenseLinear, Int8Linear
from gorgon_engine.models.loading import load_weights
from gorgon_engine.models.nf4 import Nf4Linear
from gorgon_engine.models.weights import WeightReader
from gorgon_protocol.errors import ModelError

FORMS = [(False, torch.uint8), (True, torch.uint8), (False, torch.bfloat16), (True, torch.float32)]


def dequantized(module: bnb.nn.Linear4bit) -> torch.Tensor:
    return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)


@pytest.mark.parametrize(("double", "storage"), FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_weights_are_bitsandbytes_own(tiny_nf4, double, storage, dtype):
    model, folder = tiny_nf4(double=double, storage=storage, dtype=dtype)
    assert BackboneConfig.from_folder(folder).saved_quantization == SavedQuantization(
        double, str(storage).removeprefix("torch.")
    )
    weights = load_weights(folder, quantization="nf4", dtype=dtype)
    for theirs, ours in zip(model.model.layers, weights.layers, strict=True):
        attention, mlp = theirs.self_attn, theirs.mlp
        for linear, modules in (
            (ours.qkv, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (ours.o, (attention.o_proj,)),
            (ours.gate_up, (mlp.gate_proj, mlp.up_proj)),
            (ours.down, (mlp.down_proj,)),
        ):
            assert isinstance(linear, Nf4Linear)
            assert torch.equal(linear.dequantize(dtype), torch.cat([dequantized(module) for module in modules]))
        assert torch.equal(
            ours.qkv.bias, torch.cat([m.bias for m in (attention.q_proj, attention.k_proj, attention.v_proj)])
        )
    assert isinstance(weights.lm_head, DenseLinear)
    assert torch.equal(weights.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("double", [False, True])
def test_a_saved_layer_computes_what_bitsandbytes_computes(tiny_nf4, double):
    model, folder = tiny_nf4(double=double)
    weights = load_weights(folder, quantization="nf4", dtype=torch.bfloat16)
    torch.manual_seed(5)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model.model.layers[0].self_attn.o_proj(x)
    torch.testing.assert_close(weights.layers[0].o(x), expected)


def test_a_saved_folder_also_loads_dense_and_in_int8(tiny_nf4):
    model, folder = tiny_nf4(double=True)
    expected = dequantized(model.model.layers[1].mlp.down_proj)
    dense = load_weights(folder, quantization="none", dtype=torch.bfloat16).layers[1].down
    assert isinstance(dense, DenseLinear)
    assert torch.equal(dense.weight, expected)
    int8 = load_weights(folder, quantization="int8").layers[1].down
    assert isinstance(int8, Int8Linear)
    assert (int8.dequantize() - expected.float()).abs().max() <= expected.float().abs().max() / 127


def test_linears_that_were_left_unquantised_stay_so(tiny_nf4):
    model, folder = tiny_nf4(double=False, skip=("lm_head", "k_proj", "down_proj"))
    layer = load_weights(folder, quantization="nf4", dtype=torch.bfloat16).layers[0]
    attention = model.model.layers[0].self_attn
    assert isinstance(layer.qkv, DenseLinear)  # q and v are in 4 bits, k is not: fused dense, as good as it was
    assert torch.equal(
        layer.qkv.weight,
        torch.cat([dequantized(attention.q_proj), attention.k_proj.weight, dequantized(attention.v_proj)]),
    )
    assert isinstance(layer.down, DenseLinear)
    assert isinstance(layer.gate_up, Nf4Linear)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (".absmax", None, "lacks model.layers.0.mlp.up_proj.weight.absmax"),
        (".quant_map", None, "lacks model.layers.0.mlp.up_proj.weight.quant_map"),
        (".absmax", lambda t: t[:-1], "expected 4096 and 128"),
        ("", lambda t: t[:-1], "expected 4096 and 128"),
        (".quant_state.bitsandbytes__nf4", lambda t: t[:-2], "not valid JSON"),
        (".quant_state.bitsandbytes__nf4", {"blocksize": 128}, "blocks of 128"),
        (".quant_state.bitsandbytes__nf4", {"shape": [64, 128]}, "shape [64, 128], expected [128, 64]"),
    ],
)
def test_damage_is_named(tiny_nf4, part, change, message):
    _, folder = tiny_nf4(double=False)
    path, name = folder / "model.safetensors", f"model.layers.0.mlp.up_proj.weight{part}"
    tensors = load_file(path)
    if change is None:
        del tensors[name]
    elif isinstance(change, dict):
        state = json.loads(bytes(tensors[name].tolist())) | change
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    else:
        tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, path)
    reader = WeightReader(folder, BackboneConfig.from_folder(folder))
    with pytest.raises(ModelError) as caught:
        reader.nf4("model.layers.0.mlp.up_proj.weight")
    assert message in str(caught.value)
    assert "model.layers.0.mlp.up_proj.weight" in str(caught.value)


def test_damaged_double_quantisation_is_named(tiny_nf4):
    _, folder = tiny_nf4(double=True)
    path, name = folder / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(path)
    tensors[f"{name}.nested_absmax"] = tensors[f"{name}.nested_absmax"][:0]
    save_file(tensors, path)
    reader = WeightReader(folder, BackboneConfig.from_folder(folder))
    with pytest.raises(ModelError, match="double-quantised scales cannot be read"):
        reader.nf4(name)
