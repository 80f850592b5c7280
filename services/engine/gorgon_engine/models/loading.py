"""From a model folder to the weights that a forward pass runs on, one matrix at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor

from gorgon_engine.models.config import BackboneConfig
from gorgon_engine.models.identity import backbone_identity
from gorgon_engine.models.linear import DenseLinear, Int8Linear, Linear, LinearRole, MakeLinear
from gorgon_engine.models.nf4 import Nf4Linear, Nf4Tensor
from gorgon_engine.models.rope import RotaryEmbedding
from gorgon_engine.models.weights import WeightReader
from gorgon_protocol.errors import ModelError


class Quantization(StrEnum):
    """How the linears are held. Embeddings and norms never are quantised; the lm_head only in int8."""

    NONE = "none"
    NF4 = "nf4"
    INT8 = "int8"


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One block. Letters: C hidden size, D head dimension, H query heads, G KV heads, I intermediate size."""

    input_norm: Tensor  # [C]
    post_norm: Tensor  # [C], before the MLP
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    qkv: Linear  # C -> (H + 2 G) D: rows of q, then k, then v
    o: Linear  # H D -> C
    gate_up: Linear  # C -> 2 I: rows of gate, then up
    down: Linear  # I -> C
    sliding_window: int  # 0 = none


@dataclass(frozen=True, slots=True)
class BackboneWeights:
    """A whole backbone on one device."""

    config: BackboneConfig
    embedding: Tensor  # [V, C]
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor  # [C]
    lm_head: Linear  # C -> V
    rope: RotaryEmbedding
    folder: Path

    @property
    def identity(self) -> str:
        """`backbone_identity` of the folder: what draft heads are bound to. Seconds the first time, then cached."""
        return backbone_identity(self.folder)


def load_weights(
    folder: Path,
    *,
    quantization: str = "none",
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    norm_dtype: torch.dtype | None = None,
    make_linear: MakeLinear | None = None,
) -> BackboneWeights:
    """Read, check and convert the weights of a Hugging Face folder.

    quantization: `none`, `nf4` or `int8` (CPU only). A folder saved in NF4 loads under each: as it is under `nf4`
    (its unquantised linears stay so), else dequantised first.
    dtype: of embeddings, lm_head, biases and dense linears. norm_dtype: of the norms, `dtype` if not given.
    make_linear: builds each linear in place of the default of `quantization`, for kernels with a packing of their own.
    Beside the result, at most one fused matrix is held. Raises `ModelError` for folders that are missing, broken or
    not supported.
    """
    config = BackboneConfig.from_folder(folder)
    reader = WeightReader(folder, config)
    device = torch.device(device)
    kind = _quantization(quantization, device)
    loader = _Loader(
        reader=reader,
        device=device,
        dtype=dtype,
        norm_dtype=norm_dtype or dtype,
        make_linear=make_linear or default_make_linear(kind, dtype=dtype, device=device),
        keep_nf4=kind is Quantization.NF4 and make_linear is None,
    )
    embedding = loader.tensor("model.embed_tokens.weight", dtype)
    tied = config.tie_word_embeddings
    if tied and make_linear is None and kind is not Quantization.INT8:
        lm_head: Linear = DenseLinear(embedding)  # shared, not copied
    else:
        name = "model.embed_tokens" if tied else "lm_head"
        lm_head = loader.linear([name], LinearRole.LM_HEAD)
    return BackboneWeights(
        config=config,
        embedding=embedding,
        layers=tuple(loader.layer(config, index) for index in range(config.num_layers)),
        final_norm=loader.tensor("model.norm.weight", loader.norm_dtype),
        lm_head=lm_head,
        rope=RotaryEmbedding(config.rope, device),
        folder=folder,
    )


def default_make_linear(kind: Quantization, *, dtype: torch.dtype, device: torch.device) -> MakeLinear:
    """What torch and bitsandbytes run on `device`."""

    def make(weight: Tensor, bias: Tensor | None, role: LinearRole) -> Linear:
        if kind is Quantization.INT8:
            return Int8Linear.quantize(weight, bias)
        bias = None if bias is None else bias.to(device, dtype, copy=True)
        weight = weight.to(device)
        if kind is Quantization.NF4 and role is not LinearRole.LM_HEAD:
            return Nf4Linear.quantize(weight, bias)
        return DenseLinear(weight.to(dtype, copy=True), bias)

    return make


@dataclass(frozen=True, slots=True)
class _Loader:
    reader: WeightReader
    device: torch.device
    dtype: torch.dtype
    norm_dtype: torch.dtype
    make_linear: MakeLinear
    keep_nf4: bool

    def layer(self, config: BackboneConfig, index: int) -> LayerWeights:
        prefix = f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        norms = config.has_query_key_norms
        return LayerWeights(
            input_norm=self.tensor(f"{prefix}.input_layernorm.weight", self.norm_dtype),
            post_norm=self.tensor(f"{prefix}.post_attention_layernorm.weight", self.norm_dtype),
            q_norm=self.tensor(f"{attention}.q_norm.weight", self.norm_dtype) if norms else None,
            k_norm=self.tensor(f"{attention}.k_norm.weight", self.norm_dtype) if norms else None,
            qkv=self.linear([f"{attention}.{part}_proj" for part in "qkv"], LinearRole.QKV),
            o=self.linear([f"{attention}.o_proj"], LinearRole.O),
            gate_up=self.linear([f"{mlp}.gate_proj", f"{mlp}.up_proj"], LinearRole.GATE_UP),
            down=self.linear([f"{mlp}.down_proj"], LinearRole.DOWN),
            sliding_window=config.sliding_windows[index],
        )

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        # A copy even where nothing changes: a view would fault its pages in during the first step, and change under
        # us if the file were replaced.
        return self.reader.dense(name).to(self.device, dtype, copy=True)

    def linear(self, modules: Sequence[str], role: LinearRole) -> Linear:
        """One linear out of the rows of several modules."""
        names = [f"{module}.weight" for module in modules]
        bias = self._bias(modules)
        saved = [self.reader.is_nf4(name) for name in names]
        if self.keep_nf4 and all(saved):
            weight = Nf4Tensor.concat([self.reader.nf4(name).to(self.device) for name in names])
            return Nf4Linear(weight, None if bias is None else bias.to(self.device, self.dtype, copy=True))
        parts = [self.reader.dense(name) for name in names]
        fused = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.keep_nf4 and self.reader.has_nf4:
            # Whoever saved this folder in 4 bits left these matrices out, as their quality needs it.
            dense_bias = None if bias is None else bias.to(self.device, self.dtype, copy=True)
            return DenseLinear(fused.to(self.device, self.dtype, copy=True), dense_bias)
        return self.make_linear(fused, bias, role)

    def _bias(self, modules: Sequence[str]) -> Tensor | None:
        """The modules' biases [out], None if none has one."""
        present = [f"{module}.bias" in self.reader for module in modules]
        if not any(present):
            return None
        if not all(present):
            missing = modules[present.index(False)]
            raise ModelError(f"{self.reader.folder}: tensor {missing}.bias is missing, its siblings have one")
        return torch.cat([self.reader.dense(f"{module}.bias") for module in modules])


def _quantization(name: str, device: torch.device) -> Quantization:
    try:
        kind = Quantization(name)
    except ValueError:
        known = ", ".join(Quantization)
        raise ModelError(f"quantization {name!r} is not known: choose one of {known}") from None
    if kind is Quantization.INT8 and device.type != "cpu":
        raise ModelError(f"int8 runs on CPUs only, not on {device}: choose nf4 or none")
    return kind
