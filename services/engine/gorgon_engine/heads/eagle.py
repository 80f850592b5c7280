"""The EAGLE head (2401.15077, section 3): one decoder layer that goes on in the backbone's feature space.

    x_t         = W [norm(feature_t), norm(e(token_{t+1}))]
    feature_t+1 = norm(layer(x_t))            causal attention with RoPE and grouped queries, SwiGLU MLP, RMSNorms

feature_t is the backbone's hidden state at position t, token_{t+1} the token behind it. The predicted feature is read
by the backbone's own lm_head. Depth 1 of the tree is one step of the layer behind the last true feature; depth d + 1
reads the feature that depth d predicted, and the token drafted from it.

Attention reaches all positions whose true features are known (the *prefix*), and the steps of the own path behind them.
Since there is one layer, the keys and values of a position follow from its inputs alone: true features need no
attention to be remembered.

Letters: B sequences, N places of a sequence that are continued, M positions of the prefix, W continuations (paths) of
a place, J steps of a path so far, H query heads, G KV heads, R = H / G, D head dimension, C hidden size, V tokens that
can be drafted.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

Projection = Callable[[Tensor], Tensor]  # [..., C] -> [..., V]

NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class EagleShape:
    """What the weights' shapes follow from, and the angles of the rotary embeddings."""

    hidden_size: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float = 10000.0
    num_heads: int = 4  # depths that it drafts, in the words of the other families
    norm_eps: float = NORM_EPS

    @property
    def head_counts(self) -> tuple[int, int, int]:
        """Of queries, keys and values."""
        return self.num_query_heads, self.num_kv_heads, self.num_kv_heads


@dataclass(frozen=True, slots=True, eq=False)
class Angles:
    """Of rotary embeddings."""

    cos: Tensor  # [B, N, D/2] float32
    sin: Tensor  # [B, N, D/2] float32

    def up_to(self, place: int) -> "Angles":
        """Of the places before one."""
        return Angles(self.cos[:, :place], self.sin[:, :place])

    def at(self, place: int) -> "Angles":
        """Of one place alone, N = 1."""
        return Angles(self.cos[:, place : place + 1], self.sin[:, place : place + 1])


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """The keys and values of true features, and which of them each place may see."""

    keys: Tensor  # [B, G, M, D]
    values: Tensor  # [B, G, M, D]
    mask: Tensor  # [B, N, M] bool, at least one position a place


@dataclass(frozen=True, slots=True, eq=False)
class Paths:
    """W continuations of every place: the feature predicted last, the keys and values of the steps behind the first."""

    features: Tensor  # [B, N, W, C]
    keys: Tensor  # [B, N, W, J, G, D]
    values: Tensor  # [B, N, W, J, G, D]

    def select(self, parents: Tensor) -> "Paths":
        """The paths to go on with: parents [B, N, W'] -> W' of them."""

        def pick(values: Tensor) -> Tensor:
            index = parents.reshape(*parents.shape, *[1] * (values.ndim - 3))
            return values.gather(2, index.expand(*parents.shape, *values.shape[3:]))

        return Paths(pick(self.features), pick(self.keys), pick(self.values))


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What the layer makes of its inputs before it attends."""

    x: Tensor  # [B, N, W, C]
    query: Tensor  # [B, N, W, H, D]
    keys: Tensor  # [B, N, W, G, D]
    values: Tensor  # [B, N, W, G, D]

    def at(self, place: int) -> "Rows":
        """Of one place alone, N = 1."""
        here = slice(place, place + 1)
        return Rows(self.x[:, here], self.query[:, here], self.keys[:, here], self.values[:, here])


class EagleHead(nn.Module):
    """One layer for all depths. Trainable; no state beside weights."""

    fc: nn.Module
    qkv: nn.Module
    o: nn.Module
    gate_up: nn.Module
    down: nn.Module

    def __init__(
        self,
        shape: EagleShape,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Random weights; `start_as_pass_through` makes them those that training starts with."""
        super().__init__()
        assert shape.num_heads >= 1, shape
        assert shape.num_query_heads % shape.num_kv_heads == 0, shape
        assert shape.head_dim % 2 == 0, shape
        self.shape = shape
        size, width = shape.hidden_size, shape.head_dim

        def matrix(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, dtype=dtype, device=device)

        def gain() -> nn.Parameter:
            return nn.Parameter(torch.ones(size, dtype=dtype, device=device))

        self.feature_norm, self.embedding_norm = gain(), gain()
        self.attention_norm, self.mlp_norm, self.norm = gain(), gain(), gain()
        self.dropout = nn.Dropout(0.0)  # of both inputs; training may set another share
        self.fc = matrix(2 * size, size)
        self.qkv = matrix(size, sum(shape.head_counts) * width)
        self.o = matrix(shape.num_query_heads * width, size)
        self.gate_up = matrix(size, 2 * shape.intermediate_size)
        self.down = matrix(shape.intermediate_size, size)

    @property
    def num_heads(self) -> int:
        return self.shape.num_heads

    @property
    def hidden_size(self) -> int:
        return self.shape.hidden_size

    @property
    def shares_projection(self) -> bool:
        return True

    @torch.no_grad()
    def start_as_pass_through(self, *, hidden_rms: float = 1.0) -> None:
        """Start by repeating the feature. hidden_rms: root mean square of the backbone's hidden states, the scale that
        its projection is used to."""
        for part in (self.fc, self.qkv, self.gate_up):
            assert isinstance(part, nn.Linear)
            nn.init.normal_(part.weight, std=0.5 * part.in_features**-0.5)
        for part in (self.o, self.down):
            assert isinstance(part, nn.Linear)
            nn.init.zeros_(part.weight)
        assert isinstance(self.fc, nn.Linear)
        self.fc.weight[:, : self.hidden_size].zero_().fill_diagonal_(1.0)
        self.norm.fill_(hidden_rms)

    def angles(self, positions: Tensor) -> Angles:
        """Of positions [B, N], which are those of the features that a step reads."""
        steps = torch.arange(0, self.shape.head_dim, 2, device=positions.device) / self.shape.head_dim
        angles = (positions[:, :, None] * self.shape.rope_theta**-steps).double()  # as in models/rope.py
        return Angles(angles.cos().float(), angles.sin().float())

    def rows(self, features: Tensor, embeddings: Tensor, angles: Angles) -> Rows:
        """The layer up to its attention: features [B, N, W, C], embeddings [B, N, W, C] of the tokens behind them."""
        parts = [self._normed(features, self.feature_norm), self._normed(embeddings, self.embedding_norm)]
        x = self.fc(self.dropout(torch.cat([part.to(features.dtype) for part in parts], dim=3)))
        counts = self.shape.head_counts
        wide = self.qkv(self._normed(x, self.attention_norm)).unflatten(3, (sum(counts), self.shape.head_dim))
        # Queries and keys are turned in one go.
        turned, values = wide.split([sum(counts[:2]), counts[2]], dim=3)
        query, keys = _rotated(turned, angles).split(counts[:2], dim=3)
        return Rows(x, query, keys, values)

    def begin(self, rows: Rows, prefix: Prefix) -> Paths:
        """The first step of every place, whose true features are in `prefix` already, its own one included.

        rows: of the places, W = 1. -> the one path of each, J = 0.
        """
        no_steps = rows.keys[:, :, :, None][:, :, :, :0]
        whole_texts = rows.query.shape[1] > 1  # as in training, where memory for every score would not do
        attended = _attend_fused(rows.query, prefix) if whole_texts else _attend(rows.query, prefix, no_steps, no_steps)
        return Paths(self._outputs(rows.x, attended), no_steps, no_steps)

    def extend(self, prefix: Prefix, paths: Paths, embeddings: Tensor, angles: Angles) -> Paths:
        """One step more of every path. embeddings [B, N, W, C] of the token drafted behind each; angles of the
        positions of the features that the paths end with."""
        rows = self.rows(paths.features, embeddings, angles)
        keys = torch.cat([paths.keys, rows.keys[:, :, :, None]], dim=3)
        values = torch.cat([paths.values, rows.values[:, :, :, None]], dim=3)
        return Paths(self._outputs(rows.x, _attend(rows.query, prefix, keys, values)), keys, values)

    def _outputs(self, x: Tensor, attended: Tensor) -> Tensor:
        """x [B, N, W, C], attended [B, N, W, H D] -> the predicted features [B, N, W, C]."""
        x = x + self.o(attended)
        gate, up = self.gate_up(self._normed(x, self.mlp_norm)).chunk(2, dim=3)
        return self._normed(x + self.down(silu(gate) * up), self.norm)

    def _normed(self, x: Tensor, gain: Tensor) -> Tensor:
        return rms_norm(x, (self.hidden_size,), gain.to(x.dtype), eps=self.shape.norm_eps)


def _rotated(x: Tensor, angles: Angles) -> Tensor:
    """RoPE (2104.09864) over pairs (i, i + D/2) of x [B, N, W, H, D]."""
    cos, sin = (part.to(x.dtype)[:, :, None, None] for part in (angles.cos, angles.sin))
    low, high = x.chunk(2, dim=4)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=4)


def _attend_fused(query: Tensor, prefix: Prefix) -> Tensor:
    """query [B, N, 1, H, D] over the prefix alone -> [B, N, 1, H D]."""
    repeats = query.shape[3] // prefix.keys.shape[1]
    # Repeated by hand: with grouped queries and a mask, GPUs have no fused kernel.
    keys, values = (part.repeat_interleave(repeats, dim=1) for part in (prefix.keys, prefix.values))
    mask = prefix.mask[:, None]
    out = scaled_dot_product_attention(query[:, :, 0].transpose(1, 2), keys, values, attn_mask=mask)  # [B, H, N, D]
    return out.transpose(1, 2)[:, :, None].flatten(3)


def _attend(query: Tensor, prefix: Prefix, keys: Tensor, values: Tensor) -> Tensor:
    """query [B, N, W, H, D] over the prefix and over the path's own steps [B, N, W, J, G, D] -> [B, N, W, H D]."""
    num_groups, num_positions, head_dim = prefix.keys.shape[1:]
    places = (query.shape[1], query.shape[2], query.shape[3] // num_groups)  # N, W, R
    grouped = (query * head_dim**-0.5).unflatten(3, (num_groups, -1)).permute(0, 3, 1, 2, 4, 5)  # [B, G, N, W, R, D]
    seen = grouped.flatten(2, 4) @ prefix.keys.transpose(2, 3)  # [B, G, N W R, M]
    seen = seen.unflatten(2, places).masked_fill(~prefix.mask[:, None, :, None, None], -torch.inf)
    own = torch.einsum("bgnwrd,bnwjgd->bgnwrj", grouped, keys)
    weights = torch.softmax(torch.cat([seen, own], dim=5).float(), dim=5).to(values.dtype)
    of_prefix, of_path = weights.split([num_positions, own.shape[5]], dim=5)
    out = (of_prefix.flatten(2, 4) @ prefix.values).unflatten(2, places)
    out = out + torch.einsum("bgnwrj,bnwjgd->bgnwrd", of_path, values)
    return out.permute(0, 2, 3, 1, 4, 5).flatten(3)
