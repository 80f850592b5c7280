import json
from pathlib import Path

import pytest
import transformers

from gorgon_engine.models.config import BackboneConfig
from gorgon_protocol.errors import ModelError, ModelNotFoundError

MINIMAL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "vocab_size": 100,
}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_absent_fields_mean_what_they_mean_to_transformers(family):
    theirs = getattr(transformers, f"{family.capitalize()}Config")(**MINIMAL)
    ours = BackboneConfig.from_hf(MINIMAL | {"model_type": family})
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope.parameters["rope_theta"] == theirs.rope_parameters["rope_theta"]
    assert ours.has_query_key_norms == (family == "qwen3")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3},
        {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 0},
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_windows_by_layer(family, options):
    theirs = getattr(transformers, f"{family.capitalize()}Config")(**MINIMAL, **options)
    expected = tuple(theirs.sliding_window if kind == "sliding_attention" else 0 for kind in theirs.layer_types)
    ours = BackboneConfig.from_hf(MINIMAL | {"model_type": family} | options)
    assert ours.sliding_windows == expected
    assert BackboneConfig.from_hf(theirs).sliding_windows == expected


@pytest.mark.parametrize(("value", "window"), [(..., 4096), (None, 0), (32, 32)])
def test_mistral_window_is_on_unless_null(value, window):
    fields = MINIMAL | {"model_type": "mistral"} | ({} if value is ... else {"sliding_window": value})
    assert BackboneConfig.from_hf(fields).sliding_windows == (window,) * 4


def test_a_saved_folder_reads_as_its_config(tiny):
    model, folder = tiny("llama", tie_word_embeddings=True, bos_token_id=1, eos_token_id=[2, 3], pad_token_id=0)
    config = BackboneConfig.from_folder(folder)
    assert config.tie_word_embeddings
    assert config.bos_token_id == 1
    assert set(config.eos_token_ids) == {2, 3}
    assert config.dtype == "float32"
    assert config.saved_quantization is None
    assert BackboneConfig.from_hf(model.config).rope == config.rope


def test_eos_ids_of_the_generation_config_come_first_and_are_joined(tiny, edit):
    _, folder = tiny()
    edit(folder / "config.json", eos_token_id=7)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert BackboneConfig.from_folder(folder).eos_token_ids == (9, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported; supported: llama, mistral, qwen2, qwen3"),
        ({"model_type": ...}, "model type None"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64': expected an integer"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        ({"num_key_value_heads": 3}, "4 attention heads are not a multiple of 3"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"head_dim": None, "hidden_size": 66}, "hidden_size 66 is not a multiple"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"eos_token_id": 4096}, "eos_token_id 4096 is not a token id of a vocabulary of 96"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "magic"}}, "RoPE type 'magic'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one set for all layers"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_parameters": {"rope_type": "linear", "factor": -2.0}}, "factor is -2.0"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 8}},
            "short_factor must be a list of 8",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq quantisation"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "bitsandbytes 8-bit"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "4-bit type 'fp4' is not supported",
        ),
    ],
)
def test_a_bad_field_is_named_in_one_line(tiny, edit, changes, message):
    _, folder = tiny()
    edit(folder / "config.json", **changes)
    with pytest.raises(ModelError) as caught:
        BackboneConfig.from_folder(folder)
    assert message in str(caught.value)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_layer_types_that_do_not_fit(edit):
    base = MINIMAL | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}
    for layer_types, message in (
        (["full_attention"], "each of 4 layers"),
        (["chunked_attention"] * 4, "chunked_attention are not supported"),
    ):
        with pytest.raises(ModelError, match=message):
            BackboneConfig.from_hf(base | {"layer_types": layer_types})
    with pytest.raises(ModelError, match="no sliding_window is set"):
        BackboneConfig.from_hf(base | {"layer_types": ["sliding_attention"] * 4, "sliding_window": None})


def test_missing_and_broken_files(tmp_path: Path):
    with pytest.raises(ModelNotFoundError, match="no such model folder"):
        BackboneConfig.from_folder(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"no config\.json"):
        BackboneConfig.from_folder(tmp_path)
    for content, message in (
        (b"{", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[]", "not a JSON object"),
    ):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ModelError, match=message):
            BackboneConfig.from_folder(tmp_path)
