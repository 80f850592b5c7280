"""From a GGUF file of a Llama model to a normal Hugging Face folder: what the small bundled model is shipped as.

Quantised blocks are multiplied out to bfloat16. The rows of q and k go back from GGUF's interleaved rotary pairs
(i, i + 1) to rotate-half pairs (i, i + D/2).
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gorgon_protocol.errors import ModelError

_LAYER_TENSORS: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_TENSORS: Mapping[str, str] = {
    "token_embd": "model.embed_tokens.weight",
    "output_norm": "model.norm.weight",
    "output": "lm_head.weight",
}


def import_gguf(path: Path, folder: Path) -> None:
    """Write config, generation config, weights, tokenizer and chat template of the model at `path` into `folder`.

    The folder must exist. Raises `ModelError` for another architecture or a damaged file, `OSError` as writing does.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        shape = _Shape.read(path, metadata)
        tensors = _weights(reader, shape)
    except (ValueError, IndexError, KeyError) as error:
        raise ModelError(f"{path}: not a readable GGUF file of a Llama model: {error}") from error
    config = shape.config(tied="lm_head.weight" not in tensors)
    _write_json(folder / "config.json", config)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    _write_json(folder / "generation_config.json", {name: config[name] for name in ids})
    _write_tokenizer(path, metadata, folder)
    _write_weights(folder / "model.safetensors", tensors)


@dataclass(frozen=True, slots=True)
class _Shape:
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    rope_theta: float
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int

    @classmethod
    def read(cls, path: Path, metadata: Mapping[str, Any]) -> "_Shape":
        architecture = metadata["general.architecture"]
        if architecture != "llama":
            raise ModelError(f"{path}: GGUF architecture {architecture!r} is not supported, only llama")
        eos = int(metadata["tokenizer.ggml.eos_token_id"])
        return cls(
            hidden_size=int(metadata["llama.embedding_length"]),
            intermediate_size=int(metadata["llama.feed_forward_length"]),
            num_layers=int(metadata["llama.block_count"]),
            num_heads=int(metadata["llama.attention.head_count"]),
            num_kv_heads=int(metadata["llama.attention.head_count_kv"]),
            vocab_size=len(metadata["tokenizer.ggml.tokens"]),
            max_positions=int(metadata["llama.context_length"]),
            # Stored as float32: six digits give back the number that was meant.
            rms_norm_eps=float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
            rope_theta=float(f"{metadata['llama.rope.freq_base']:.6g}"),
            bos_token_id=int(metadata["tokenizer.ggml.bos_token_id"]),
            eos_token_id=eos,
            pad_token_id=int(metadata.get("tokenizer.ggml.padding_token_id", eos)),
        )

    def config(self, *, tied: bool) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.hidden_size // self.num_heads,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": tied,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "torch_dtype": "bfloat16",
        }


def _weights(reader: Any, shape: _Shape) -> dict[str, Tensor]:
    from gguf.quants import dequantize

    tensors: dict[str, Tensor] = {}
    for source in reader.tensors:
        name = source.name.removesuffix(".weight")
        # The reader's array is a read-only view of the file; dequantising an unquantised one would return just that.
        weight = torch.from_numpy(dequantize(source.data, source.tensor_type).copy())
        if name in _TOP_TENSORS:
            target = _TOP_TENSORS[name]
        elif name.startswith("blk."):
            _, layer, part = name.split(".")
            target = f"model.layers.{layer}.{_LAYER_TENSORS[part]}.weight"
            if part in ("attn_q", "attn_k"):
                weight = _to_rotate_half(weight, shape.num_heads if part == "attn_q" else shape.num_kv_heads)
        else:
            raise KeyError(f"unexpected tensor {source.name}")
        tensors[target] = weight.to(torch.bfloat16).contiguous()
    return tensors


def _to_rotate_half(weight: Tensor, num_heads: int) -> Tensor:
    """Rows [head, pair, half] -> [head, half, pair]."""
    rows, columns = weight.shape
    return weight.view(num_heads, rows // num_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata={"format": "pt"})
    shutil.copymode(path.with_name("config.json"), path)  # safetensors makes it readable to its owner only


# GGUF's token types: control tokens are the marks of a model's format.
_CONTROL_TOKEN = 3


def _write_tokenizer(path: Path, metadata: Mapping[str, Any], folder: Path) -> None:
    """The byte-level BPE of the file, built from its lists: transformers' own conversion differs between its versions,
    and leaves out that the smollm family splits every digit off before anything else."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if metadata.get("tokenizer.ggml.model") != "gpt2":
        raise ModelError(
            f"{path}: tokenizer {metadata.get('tokenizer.ggml.model')!r} is not supported: only gpt2 (BPE)"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if metadata.get("tokenizer.ggml.pre") == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    else:
        backend.pre_tokenizer = byte_level
    backend.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type", [])
    control = [token for token, kind in zip(tokens, types, strict=False) if kind == _CONTROL_TOKEN]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    (folder / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
    special = {
        f"{name}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(metadata["llama.context_length"]),
        **special,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    if template := metadata.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
