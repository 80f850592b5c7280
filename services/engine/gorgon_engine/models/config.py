"""The shape of a backbone, read from a Hugging Face `config.json`. No torch here: light tools read it too."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from gorgon_engine.models.fields import Fields
from gorgon_engine.models.rope_config import RopeConfig
from gorgon_protocol.errors import ModelError, ModelNotFoundError

_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class _Family:
    """What transformers assumes for a model type where `config.json` is silent (0 = none)."""

    max_positions: int
    rms_norm_eps: float = 1e-6
    num_kv_heads: int = 0  # 0: as many as query heads
    head_dim: int = 0  # 0: hidden size / heads
    sliding_window: int = 0
    windows_by_layer: bool = False
    query_key_norms: bool = False


_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(max_positions=2048),
    "mistral": _Family(max_positions=131072, num_kv_heads=8, sliding_window=4096),
    "qwen2": _Family(max_positions=32768, num_kv_heads=32, sliding_window=4096, windows_by_layer=True),
    "qwen3": _Family(
        max_positions=32768,
        num_kv_heads=32,
        head_dim=128,
        sliding_window=4096,
        windows_by_layer=True,
        query_key_norms=True,
    ),
}


@dataclass(frozen=True, slots=True)
class SavedQuantization:
    """How a folder's linears were saved: bitsandbytes NF4, the one saved form that is read."""

    double_quantized: bool
    storage_dtype: str


@dataclass(frozen=True, slots=True)
class BackboneConfig:
    """What the forward pass needs to know. Sizes in elements; `sliding_windows` has one entry a layer, 0 = none."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    sliding_windows: tuple[int, ...]
    rope: RopeConfig = field(default_factory=RopeConfig)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str | None = None  # of the checkpoint, where it says so
    saved_quantization: SavedQuantization | None = None

    @property
    def has_query_key_norms(self) -> bool:
        """RMSNorm over every query and key head before RoPE, as in Qwen3."""
        return self.model_type in _FAMILIES and _FAMILIES[self.model_type].query_key_norms

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read `config.json` and, where present, the end-of-sequence ids of `generation_config.json`.

        Raises `ModelNotFoundError` for a missing folder, `ModelError` for a missing, invalid or unsupported config.
        """
        if not folder.is_dir():
            raise ModelNotFoundError(f"{folder}: no such model folder")
        path = folder / "config.json"
        if not path.is_file():
            raise ModelError(f"{folder}: no config.json: is this a Hugging Face model folder?")
        config = _read_json(path)
        generation_path = folder / "generation_config.json"
        generation = _read_json(generation_path) if generation_path.is_file() else {}
        return cls._parse(Fields(config, path), Fields(generation, generation_path))

    @classmethod
    def from_hf(cls, config: Any) -> Self:
        """From the parsed `config.json` or a transformers config object."""
        values = config if isinstance(config, Mapping) else config.to_dict()
        return cls._parse(Fields(values, "config"), Fields({}, "generation config"))

    @classmethod
    def _parse(cls, fields: Fields, generation: Fields) -> Self:
        model_type = fields.get("model_type", None)
        if model_type not in _FAMILIES:
            raise ModelError(
                f"{fields.source}: model type {model_type!r} is not supported; supported: {', '.join(_FAMILIES)}"
            )
        family = _FAMILIES[model_type]
        activation = fields.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ModelError(f"{fields.source}: hidden_act {activation!r} is not supported, only silu")
        num_layers = fields.positive_int("num_hidden_layers")
        num_heads, num_kv_heads, head_dim = _attention_shape(fields, family)
        max_positions = fields.positive_int("max_position_embeddings", family.max_positions)
        vocab_size = fields.positive_int("vocab_size")
        eos_token_ids = dict.fromkeys(
            [*generation.token_ids("eos_token_id", vocab_size), *fields.token_ids("eos_token_id", vocab_size)]
        )
        bos_token_ids = fields.token_ids("bos_token_id", vocab_size)
        return cls(
            model_type=model_type,
            hidden_size=fields.positive_int("hidden_size"),
            intermediate_size=fields.positive_int("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            vocab_size=vocab_size,
            max_positions=max_positions,
            rms_norm_eps=fields.positive_float("rms_norm_eps", family.rms_norm_eps),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            sliding_windows=_sliding_windows(fields, family, num_layers),
            rope=RopeConfig.from_fields(fields, head_dim=head_dim, max_positions=max_positions),
            bos_token_id=bos_token_ids[0] if bos_token_ids else None,
            eos_token_ids=tuple(eos_token_ids),
            dtype=_dtype(fields),
            saved_quantization=_saved_quantization(fields),
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: not a JSON object")
    return values


def _attention_shape(fields: Fields, family: _Family) -> tuple[int, int, int]:
    """(query heads, KV heads, head dimension), checked to fit each other."""
    num_heads = fields.positive_int("num_attention_heads")
    assumed = num_heads if fields.is_null("num_key_value_heads") else family.num_kv_heads or num_heads
    num_kv_heads = fields.positive_int("num_key_value_heads", assumed)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"{fields.source}: {num_heads} attention heads are not a multiple of {num_kv_heads} key-value heads"
        )
    hidden_size = fields.positive_int("hidden_size")
    if fields.get("head_dim", None) is None and not family.head_dim and hidden_size % num_heads:
        raise ModelError(
            f"{fields.source}: hidden_size {hidden_size} is not a multiple of {num_heads} heads and head_dim is missing"
        )
    head_dim = fields.positive_int("head_dim", family.head_dim or hidden_size // num_heads)
    if head_dim % 2:
        raise ModelError(f"{fields.source}: head_dim {head_dim} is odd: rotary embeddings need an even one")
    return num_heads, num_kv_heads, head_dim


def _sliding_windows(fields: Fields, family: _Family, num_layers: int) -> tuple[int, ...]:
    """The window of every layer, as transformers resolves it for each family."""
    full = (0,) * num_layers
    if not family.sliding_window:
        return full
    used = not family.windows_by_layer or fields.boolean("use_sliding_window", False)
    window = 0
    if used and not fields.is_null("sliding_window"):
        window = fields.positive_int("sliding_window", family.sliding_window)
    if not family.windows_by_layer:
        return (window,) * num_layers
    layer_types = fields.get("layer_types", None)
    if layer_types is None:
        first = fields.non_negative_int("max_window_layers", 28)
        return tuple(window if layer >= first else 0 for layer in range(num_layers))
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise ModelError(f"{fields.source}: layer_types must name the attention of each of {num_layers} layers")
    unknown = set(map(str, layer_types)) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ModelError(f"{fields.source}: layer_types {', '.join(sorted(unknown))} are not supported")
    if "sliding_attention" in layer_types and not window:
        raise ModelError(f"{fields.source}: layer_types has sliding_attention, but no sliding_window is set")
    return tuple(window if kind == "sliding_attention" else 0 for kind in layer_types)


def _dtype(fields: Fields) -> str | None:
    value = fields.get("dtype", None) or fields.get("torch_dtype", None)
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    if name not in _DTYPES:
        raise ModelError(f"{fields.source}: dtype {name!r} is not supported; supported: {', '.join(_DTYPES)}")
    return name


def _saved_quantization(fields: Fields) -> SavedQuantization | None:
    value = fields.get("quantization_config", None)
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ModelError(f"{fields.source}: quantization_config is not an object")
    method = value.get("quant_method", "bitsandbytes" if "load_in_4bit" in value else None)
    if method != "bitsandbytes" or not value.get("load_in_4bit"):
        what = "bitsandbytes 8-bit" if method == "bitsandbytes" else method
        raise ModelError(
            f"{fields.source}: weights saved with {what} quantisation are not supported: "
            "use the original weights or a folder saved in bitsandbytes NF4"
        )
    kind = value.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' own default
    if kind != "nf4":
        raise ModelError(f"{fields.source}: bitsandbytes 4-bit type {kind!r} is not supported, only nf4")
    return SavedQuantization(
        double_quantized=bool(value.get("bnb_4bit_use_double_quant", False)),
        storage_dtype=str(value.get("bnb_4bit_quant_storage", "uint8")),
    )
