"""Reading a Hugging Face folder's safetensors: one file or a sharded index, every tensor checked before it is used."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gorgon_engine.models import nf4
from gorgon_engine.models.config import BackboneConfig
from gorgon_protocol.errors import ModelError


class WeightReader:
    """The tensors of one model folder by name. Tensors are views of the mapped file until they are converted.

    Opening it reads only the files' headers and checks all names and shapes against the config: a wrong folder fails
    in milliseconds, with one `ModelError` that names the tensor and the file.
    """

    def __init__(self, folder: Path, config: BackboneConfig) -> None:
        self.folder = folder
        self._files: dict[Path, Any] = {}
        self._paths = self._index()
        self._expected = dict(_expected_shapes(config))
        self._check()

    @property
    def paths(self) -> tuple[Path, ...]:
        """The weight files, sorted."""
        return tuple(sorted(set(self._paths.values())))

    def __contains__(self, name: str) -> bool:
        return name in self._paths

    @property
    def has_nf4(self) -> bool:
        """Whether the folder was saved in 4 bits, at least in part."""
        return any(self.is_nf4(name) for name in self._expected)

    def is_nf4(self, name: str) -> bool:
        return nf4.saved_state_name(name, self._paths) is not None

    def dense(self, name: str) -> Tensor:
        """A tensor as saved; a 4-bit matrix dequantised to float32."""
        return self.nf4(name).dequantize() if self.is_nf4(name) else self._get(name)

    def nf4(self, name: str) -> nf4.Nf4Tensor:
        """A matrix saved in 4 bits."""
        prefix = f"{name}."
        parts = {key.removeprefix(prefix): self._get(key) for key in self._paths if key.startswith(prefix)}
        rows, columns = self._expected[name]
        return nf4.from_saved(name, self._get(name), parts, (rows, columns))

    def _get(self, name: str) -> Tensor:
        path = self._paths[name]
        try:
            return self._files[path].get_tensor(name)
        except SafetensorError as error:
            raise _unreadable(path, error) from error

    def _index(self) -> dict[str, Path]:
        """Tensor name -> file, every file opened. The index file rules; without one, `model.safetensors` does."""
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            return self._index_of_shards(index)
        path = self.folder / "model.safetensors"
        if not path.is_file():
            others = sorted(file.name for file in self.folder.glob("*.bin"))
            hint = f" (it has {others[0]}: convert it to safetensors first)" if others else ""
            raise ModelError(f"{self.folder}: no model.safetensors and no model.safetensors.index.json{hint}")
        return dict.fromkeys(self._open(path), path)

    def _index_of_shards(self, index: Path) -> dict[str, Path]:
        try:
            weight_map = json.loads(index.read_bytes())["weight_map"]
            shards = {name: self.folder / shard for name, shard in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: not a valid index of weights: {error!r}") from error
        for path in sorted(set(shards.values())):
            if path.parent != self.folder:
                raise ModelError(f"{index}: names a file outside its folder: {path}")
            names = self._open(path)
            absent = [name for name, shard in shards.items() if shard == path and name not in names]
            if absent:
                raise ModelError(f"{path}: lacks tensor {absent[0]}, which {index.name} says it holds")
        return shards

    def _open(self, path: Path) -> frozenset[str]:
        if not path.is_file():
            raise ModelError(f"{path}: missing: download the model again")
        try:
            self._files[path] = safe_open(path, framework="pt", device="cpu")
            return frozenset(self._files[path].keys())
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from error

    def _check(self) -> None:
        for name, shape in self._expected.items():
            if name not in self._paths:
                if not name.endswith(".bias"):
                    raise ModelError(f"{self.folder}: tensor {name} is missing from the weights")
            elif not self.is_nf4(name):  # 4-bit matrices are flat: checked as they are read
                actual = tuple(self._files[self._paths[name]].get_slice(name).get_shape())
                if actual != shape:
                    raise ModelError(f"{self._paths[name]}: {name} has shape {list(actual)}, expected {list(shape)}")
        surplus = sorted(name for name in self._paths if not self._is_known(name))
        if surplus:
            raise ModelError(
                f"{self._paths[surplus[0]]}: unexpected tensor {surplus[0]} ({len(surplus)} in all): "
                "the model computes something that its model type does not say"
            )

    def _is_known(self, name: str) -> bool:
        # Old checkpoints save the rotary frequencies, tied ones sometimes the lm_head again: both are redundant.
        if name in self._expected or name.endswith(".rotary_emb.inv_freq") or name == "lm_head.weight":
            return True
        weight, _, _ = name.partition(".weight.")
        return f"{weight}.weight" in self._expected and self.is_nf4(f"{weight}.weight")


def _expected_shapes(config: BackboneConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that a backbone may have, biases included; all others are required."""
    hidden, head_dim = config.hidden_size, config.head_dim
    queries, keys = config.num_heads * head_dim, config.num_kv_heads * head_dim
    projections = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (config.intermediate_size, hidden),
        "mlp.up_proj": (config.intermediate_size, hidden),
        "mlp.down_proj": (hidden, config.intermediate_size),
    }
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        if config.has_query_key_norms:
            yield f"{prefix}.self_attn.q_norm.weight", (head_dim,)
            yield f"{prefix}.self_attn.k_norm.weight", (head_dim,)
        for projection, shape in projections.items():
            yield f"{prefix}.{projection}.weight", shape
            yield f"{prefix}.{projection}.bias", shape[:1]
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)


def _unreadable(path: Path, error: Exception) -> ModelError:
    return ModelError(f"{path}: not a readable safetensors file, truncated or corrupt ({error}): download it again")
