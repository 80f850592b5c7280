"""The rotary embedding of a backbone as its config describes it, old or new spelling, made uniform and checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from gorgon_engine.models.fields import Fields
from gorgon_protocol.errors import ModelError

# Fields that transformers' frequency function of the type reads: (required, optional).
_FIELDS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (("factor",), ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
    "longrope": (("short_factor", "long_factor"), ("factor", "attention_factor")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
}
_WITH_ORIGINAL_LENGTH = ("yarn", "longrope", "llama3")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """`rope_type` and what its frequencies depend on.

    `parameters` holds transformers' standard names (`rope_theta`, `factor`, `original_max_position_embeddings`, ...);
    treat it as read-only.
    """

    rope_type: str = "default"
    head_dim: int = 64
    max_positions: int = 2048
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"rope_theta": 10000.0})

    @property
    def depends_on_length(self) -> bool:
        """Whether a position's angles depend on how long its sequence is."""
        return self.rope_type in ("dynamic", "longrope")

    @classmethod
    def from_fields(cls, fields: Fields, *, head_dim: int, max_positions: int) -> Self:
        """Read `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before). Raises `ModelError`."""
        raw = fields.get("rope_scaling", None) or fields.get("rope_parameters", {})
        if not isinstance(raw, Mapping) or any(isinstance(value, Mapping) for value in raw.values()):
            raise ModelError(f"{fields.source}: rotary parameters other than one set for all layers are not supported")
        scaling = Fields(raw, f"{fields.source}: rope parameters")
        rope_type = scaling.get("rope_type", scaling.get("type", "default"))
        if rope_type not in _FIELDS:
            raise ModelError(
                f"{fields.source}: RoPE type {rope_type!r} is not supported; supported: {', '.join(_FIELDS)}"
            )
        for source in (fields, scaling):
            if source.positive_float("partial_rotary_factor", 1.0) != 1.0:
                raise ModelError(f"{source.source}: partial_rotary_factor other than 1 is not supported")
        theta = scaling.positive_float("rope_theta", fields.positive_float("rope_theta", 10000.0))
        parameters: dict[str, Any] = {"rope_type": rope_type, "rope_theta": theta}
        required, optional = _FIELDS[rope_type]
        for name in required:
            parameters[name] = _parameter(scaling, name, head_dim)
        for name in optional:
            if scaling.get(name, None) is not None:
                parameters[name] = _parameter(scaling, name, head_dim)
        if rope_type in _WITH_ORIGINAL_LENGTH:
            # A value beside the rope parameters wins: Phi-3's spelling, and transformers' rule.
            own = scaling.positive_int("original_max_position_embeddings", max_positions)
            parameters["original_max_position_embeddings"] = fields.positive_int(
                "original_max_position_embeddings", own
            )
        if rope_type == "dynamic" and head_dim == 2:
            raise ModelError(f"{fields.source}: dynamic RoPE needs a head_dim above 2")
        return cls(rope_type, head_dim, max_positions, parameters)


def _parameter(scaling: Fields, name: str, head_dim: int) -> Any:
    if name == "truncate":
        return scaling.boolean(name, True)
    if name not in ("short_factor", "long_factor"):
        return scaling.positive_float(name)
    values = scaling.get(name, None)
    if (
        not isinstance(values, list)
        or len(values) != head_dim // 2
        or not all(isinstance(value, int | float) and not isinstance(value, bool) and value > 0 for value in values)
    ):
        raise ModelError(f"{scaling.source}: {name} must be a list of {head_dim // 2} positive numbers")
    return values
