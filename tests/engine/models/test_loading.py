import pytest
import torch

from gorgon_engine.models.linear import DenseLinear, Int8Linear, LinearRole
from gorgon_engine.models.loading import load_weights
from gorgon_engine.models.nf4 import Nf4Linear
from gorgon_protocol.errors import ModelError, ModelNotFoundError

FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"tie_word_embeddings": True},
}


def rows(*modules):
    weight = torch.cat([module.weight for module in modules])
    return weight, None if modules[0].bias is None else torch.cat([module.bias for module in modules])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_every_family_is_where_it_belongs(tiny, family):
    model, folder = tiny(family, **FAMILIES[family])
    weights = load_weights(folder, dtype=torch.float32)
    assert torch.equal(weights.embedding, model.model.embed_tokens.weight)
    assert torch.equal(weights.final_norm, model.model.norm.weight)
    assert torch.equal(weights.lm_head.weight, model.lm_head.weight)
    if family == "qwen3":
        assert weights.lm_head.weight is weights.embedding  # tied weights are held once
    expected_windows = {"mistral": [16, 16], "qwen2": [0, 8]}.get(family, [0, 0])
    assert [layer.sliding_window for layer in weights.layers] == expected_windows
    for theirs, ours in zip(model.model.layers, weights.layers, strict=True):
        attention, mlp = theirs.self_attn, theirs.mlp
        assert torch.equal(ours.input_norm, theirs.input_layernorm.weight)
        assert torch.equal(ours.post_norm, theirs.post_attention_layernorm.weight)
        if family == "qwen3":
            assert torch.equal(ours.q_norm, attention.q_norm.weight)
            assert torch.equal(ours.k_norm, attention.k_norm.weight)
        else:
            assert ours.q_norm is None
            assert ours.k_norm is None
        for linear, modules in (
            (ours.qkv, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (ours.o, (attention.o_proj,)),
            (ours.gate_up, (mlp.gate_proj, mlp.up_proj)),
            (ours.down, (mlp.down_proj,)),
        ):
            weight, bias = rows(*modules)
            assert torch.equal(linear.weight, weight)
            assert (linear.bias is None) == (bias is None)
            if bias is not None:
                assert torch.equal(linear.bias, bias)


def test_dtypes_are_those_asked_for(tiny):
    _, folder = tiny("llama", attention_bias=True)
    weights = load_weights(folder, dtype=torch.bfloat16, norm_dtype=torch.float32)
    layer = weights.layers[0]
    assert weights.embedding.dtype == layer.qkv.weight.dtype == layer.qkv.bias.dtype == torch.bfloat16
    assert layer.input_norm.dtype == weights.final_norm.dtype == torch.float32
    assert load_weights(folder, dtype=torch.bfloat16).final_norm.dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [False, True])
def test_nf4_keeps_the_lm_head_and_int8_does_not(tiny, tied):
    model, folder = tiny("llama", tie_word_embeddings=tied)
    nf4 = load_weights(folder, quantization="nf4", dtype=torch.float32)
    assert all(isinstance(linear, Nf4Linear) for linear in (nf4.layers[0].qkv, nf4.layers[1].down))
    assert torch.equal(nf4.lm_head.weight, model.lm_head.weight)
    int8 = load_weights(folder, quantization="int8", dtype=torch.float32)
    assert all(isinstance(linear, Int8Linear) for linear in (int8.layers[0].qkv, int8.lm_head))
    expected = Int8Linear.quantize(model.lm_head.weight.detach())
    assert torch.equal(int8.lm_head.quantized, expected.quantized)
    assert torch.equal(int8.embedding, model.model.embed_tokens.weight)


def test_another_packing_gets_every_matrix_once_and_in_order(tiny):
    model, folder = tiny("qwen2", tie_word_embeddings=True)
    seen = []

    def make(weight, bias, role):
        seen.append((role, tuple(weight.shape), bias is not None))
        return DenseLinear(weight.clone(), bias)

    weights = load_weights(folder, make_linear=make)
    layer = [
        (LinearRole.QKV, (128, 64), True),
        (LinearRole.O, (64, 64), False),
        (LinearRole.GATE_UP, (256, 64), False),
        (LinearRole.DOWN, (64, 128), False),
    ]
    assert seen == [(LinearRole.LM_HEAD, (96, 64), False), *layer, *layer]
    assert torch.equal(weights.lm_head.weight, model.lm_head.weight)


def test_results_do_not_hang_on_the_files(tiny):
    model, folder = tiny("llama")
    weights = load_weights(folder, dtype=torch.float32)
    path = folder / "model.safetensors"
    with path.open("r+b") as file:  # in place: what a view of the mapped file would see
        file.write(b"\0" * path.stat().st_size)
    assert torch.equal(weights.embedding, model.model.embed_tokens.weight)
    assert torch.equal(weights.layers[0].o.weight, model.model.layers[0].self_attn.o_proj.weight)
    assert torch.equal(weights.lm_head.weight, model.lm_head.weight)


def test_refusals(tiny, tmp_path):
    _, folder = tiny("llama")
    with pytest.raises(ModelNotFoundError):
        load_weights(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="'int3' is not known: choose one of none, nf4, int8"):
        load_weights(folder, quantization="int3")
    with pytest.raises(ModelError, match="int8 runs on CPUs only"):
        load_weights(folder, quantization="int8", device="meta")


def test_nf4_needs_sizes_that_fill_its_blocks(tiny):
    _, folder = tiny("llama", hidden_size=96)
    with pytest.raises(ModelError, match="multiple of 64, not 96"):
        load_weights(folder, quantization="nf4")


def test_biases_are_all_there_or_none(tiny):
    from safetensors.torch import load_file, save_file

    _, folder = tiny("qwen2")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.self_attn\.k_proj\.bias is missing"):
        load_weights(folder)
