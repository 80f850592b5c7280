"""Tiny models with random weights, made by transformers and saved as it saves them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

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
                )
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
