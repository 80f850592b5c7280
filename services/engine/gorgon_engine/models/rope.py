"""Rotary position embeddings: cosines and sines of every position's angles, for all of transformers' scaling types.

    angle[i] = position * inv_freq[i],  i = 0 .. D/2 - 1         (rotate-half: dimension i pairs with i + D/2)

The frequencies come from transformers' own functions and are its to the bit (`dynamic` beyond the original length: to
the last place or two, as a vector's power rounds differently from a scalar's). Types whose frequencies depend on the
sequence length (`dynamic`, `longrope`) take max(prompt length, position + 1) as the length of a row: what transformers
sees when a prompt is prefilled whole and then decoded token by token. It depends on the row alone, so neither batching
nor speculation can change it.
"""

from typing import Any

import torch
from torch import Tensor

from gorgon_engine.models.rope_config import RopeConfig
from gorgon_protocol.errors import ModelError


class _FrequencyInputs:
    """What transformers' frequency functions read from a model config: importing the real ones costs two seconds."""

    def __init__(self, config: RopeConfig) -> None:
        self.rope_parameters = dict(config.parameters)
        self.head_dim = config.head_dim
        self.max_position_embeddings = config.max_positions
        # Only evaluated as the default of `getattr(config, "head_dim", hidden_size // num_attention_heads)`.
        self.hidden_size = config.head_dim
        self.num_attention_heads = 1

    def standardize_rope_params(self) -> None:
        """`RopeConfig` already is standard."""


class RotaryEmbedding:
    """Angles of one backbone's positions, on one device. D is the head dimension."""

    def __init__(self, config: RopeConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        device = torch.device(device)
        self._inv_freq, self._attention_factor = _frequencies(config, device)  # [D/2] float32
        self._long_inv_freq = self._inv_freq
        if config.rope_type == "longrope":
            beyond = config.parameters["original_max_position_embeddings"] + 1
            self._long_inv_freq, _ = _frequencies(config, device, beyond)

    @property
    def device(self) -> torch.device:
        return self._inv_freq.device

    def cos_sin(self, positions: Tensor, prompt_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of every row, scaled by the type's attention factor.

        positions: [...] integer, on this embedding's device; prompt_lengths: integer, broadcastable to it.
        Returns two float32 tensors [..., D/2]. Static-shaped, no value leaves the device.
        """
        inv_freq = self._inv_freq
        if self.config.depends_on_length:
            lengths = torch.maximum(prompt_lengths, positions + 1)[..., None]  # [..., 1]
            inv_freq = self._inv_freq_for(lengths)  # [..., D/2]
        # In double: on some CPUs the first single-precision cosine that torch takes in a process is off in the fourth
        # place, and a prompt would be prefilled with other keys than those that it is decoded with.
        angles = (positions[..., None].float() * inv_freq).double()  # [..., D/2]
        return angles.cos().float() * self._attention_factor, angles.sin().float() * self._attention_factor

    def _inv_freq_for(self, lengths: Tensor) -> Tensor:
        if self.config.rope_type == "longrope":
            beyond = lengths > self.config.parameters["original_max_position_embeddings"]
            return torch.where(beyond, self._long_inv_freq, self._inv_freq)
        grown, _ = _frequencies(self.config, self.device, lengths)
        # transformers computes the unscaled frequencies in another precision: take those, not the limit of `grown`.
        return torch.where(lengths > self.config.max_positions, grown, self._inv_freq)


def _frequencies(config: RopeConfig, device: torch.device, length: int | Tensor | None = None) -> tuple[Tensor, float]:
    """(inverse frequencies [..., D/2] float32, attention factor) at a sequence length, None = within the original."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inputs: Any = _FrequencyInputs(config)
    rope_type = config.rope_type
    if rope_type == "default":
        # transformers keeps the plain formula inside its models; linear scaling by one is the same to the bit.
        rope_type = "linear"
        inputs.rope_parameters["factor"] = 1.0
    try:
        inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](inputs, device, seq_len=length)
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ModelError(f"RoPE parameters of type {config.rope_type!r} make no sense: {error}") from error
    return inv_freq.float(), float(attention_factor)
