import json

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from gorgon_engine.models.catalog import CATALOG
from gorgon_engine.models.config import BackboneConfig
from gorgon_engine.models.gguf_import import import_gguf
from gorgon_engine.models.weights import WeightReader
from gorgon_protocol.errors import ModelError
from support.vocabularies import byte_level_bpe


@pytest.fixture
def imported(tmp_path, write_gguf):
    def convert(**options):
        folder = tmp_path / "model"
        folder.mkdir()
        written = write_gguf(tmp_path / "tiny.gguf", **options)
        import_gguf(tmp_path / "tiny.gguf", folder)
        return folder, {name: torch.from_numpy(array) for name, array in written.items()}

    return convert


def test_unquantised_weights_come_back_as_they_were(imported):
    folder, written = imported(kind=GGMLQuantizationType.F32)
    read = load_file(folder / "model.safetensors")
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        assert torch.equal(read[name], tensor.bfloat16()), name


@pytest.mark.parametrize(("kind", "step"), [(GGMLQuantizationType.Q8_0, 2 / 255), (GGMLQuantizationType.Q4_1, 1 / 15)])
def test_quantised_weights_come_back_within_half_a_step(imported, kind, step):
    folder, written = imported(kind=kind)
    for name, tensor in load_file(folder / "model.safetensors").items():
        spread = written[name].max() - written[name].min()
        assert (tensor - written[name]).abs().max() <= step * spread, name


def test_config_and_tokenizer_are_those_of_the_file(imported, chat_template):
    folder, _ = imported()
    config = BackboneConfig.from_folder(folder)
    WeightReader(folder, config)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.max_positions) == (4, 2, 16, 128)
    assert config.rope.parameters["rope_theta"] == 12345.0
    assert config.rms_norm_eps == 1e-5
    assert config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    expected = byte_level_bpe()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == chat_template
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    for text in ("the cat  sat   on 12  345 mats", "naïve 猫 🐈\n\n", "<|im_start|>user</|im_end|>"):
        assert tokenizer.encode(text, add_special_tokens=False) == expected.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    LlamaForCausalLM.from_pretrained(folder)  # transformers finds everything it needs


def test_other_architectures_and_damaged_files_are_refused(tmp_path, write_gguf):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, architecture="gpt2")
    with pytest.raises(ModelError, match="architecture 'gpt2' is not supported"):
        import_gguf(path, tmp_path)
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ModelError, match="not a readable GGUF file"):
        import_gguf(path, tmp_path)
    path.write_bytes(b"not a model at all" * 10)
    with pytest.raises(ModelError, match="not a readable GGUF file"):
        import_gguf(path, tmp_path)


def test_the_bundled_model_is_whole(smollm2):
    config = BackboneConfig.from_folder(smollm2)
    WeightReader(smollm2, config)
    assert (config.hidden_size, config.num_layers, config.vocab_size, config.max_positions) == (576, 30, 49152, 8192)
    settings = json.loads((smollm2 / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert CATALOG["smollm2"].sha256 in (smollm2 / "README.md").read_text()
    assert "Apache License" in (smollm2 / "LICENSE").read_text()


def test_the_bundled_model_knows_the_capital_of_france(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        best = model(**tokens).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"
