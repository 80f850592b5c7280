"""Hydra heads (2402.05109, section 3): each head also sees the tokens drafted before it.

    u_d       = [hidden, e(t_1), ..., e(t_d)]                     the root t_1 and the drafts above this depth
    x         = residual(u_d) + SiLU(W_d u_d + b_d)
    feature_d = block_n(... block_2(x)),   block(x) = x + SiLU(W x + b)
    logits_d  = feature_d P_d^T (+ c_d)

Head d (1-based) guesses the token behind t_d, which is depth d of the tree. `residual` is the hidden state itself, or a
matrix of u_d as in the published checkpoints. *Normalised* heads divide every input by its root mean square and give
the feature a norm of its own before the projection: features and embeddings differ a hundredfold in scale.

Letters: P positions or nodes (any leading dimensions), K heads, C hidden size, V tokens that can be drafted.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Projection = Callable[[Tensor], Tensor]  # [..., C] -> [..., V]

NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class HydraShape:
    """What the weights' shapes follow from."""

    hidden_size: int
    num_heads: int = 4
    num_blocks: int = 4  # the first one reads the drafted tokens
    normalised: bool = True
    matrix_residual: bool = False
    own_projection: int | None = None  # rows of each head's own projection; None = the backbone's is shared
    projection_bias: bool = False


class HydraHead(nn.Module):
    """One head: `depth` drafted tokens beside the hidden state."""

    def __init__(self, shape: HydraShape, depth: int, *, dtype: torch.dtype, device: torch.device | str | None) -> None:
        super().__init__()
        size = shape.hidden_size

        def linear(inputs: int) -> nn.Linear:
            return nn.Linear(inputs, size, dtype=dtype, device=device)

        self.dropout = nn.Dropout(0.0)  # of the conditions; training may set another share
        self.input: nn.Module = linear((1 + depth) * size)
        self.residual: nn.Module | None = linear((1 + depth) * size) if shape.matrix_residual else None
        self.blocks = nn.ModuleList(linear(size) for _ in range(shape.num_blocks - 1))

    def forward(self, hidden: Tensor, conditions: Tensor) -> Tensor:
        """hidden [..., C], conditions [..., (1 + depth) C]: the inputs side by side -> feature [..., C]."""
        residual = hidden if self.residual is None else self.residual(conditions)
        x = residual + nn.functional.silu(self.input(self.dropout(conditions)))
        for block in self.blocks:
            x = x + nn.functional.silu(block(x))
        return x


class HydraHeads(nn.Module):
    """K heads, the d-th for depth d of the tree. Trainable; no state beside weights."""

    heads: nn.ModuleList
    norm: nn.Parameter | None  # [C], the gain before the projection
    projection: nn.Parameter | None  # [K, V, C], None where shared
    projection_bias: nn.Parameter | None  # [K, V]

    def __init__(
        self,
        shape: HydraShape,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Random weights; `start_as_pass_through` makes them those that training starts with."""
        super().__init__()
        assert shape.num_heads >= 1, shape
        assert shape.num_blocks >= 1, shape
        self.shape = shape
        self.heads = nn.ModuleList(
            HydraHead(shape, depth, dtype=dtype, device=device) for depth in range(1, shape.num_heads + 1)
        )
        rows, size = shape.own_projection, shape.hidden_size

        def parameter(*dims: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(dims, dtype=dtype, device=device))

        self.norm = nn.Parameter(torch.ones(size, dtype=dtype, device=device)) if shape.normalised else None
        self.projection = None if rows is None else parameter(shape.num_heads, rows, size)
        self.projection_bias = parameter(shape.num_heads, rows) if rows and shape.projection_bias else None

    @property
    def num_heads(self) -> int:
        return self.shape.num_heads

    @property
    def hidden_size(self) -> int:
        return self.shape.hidden_size

    @property
    def shares_projection(self) -> bool:
        return self.projection is None

    @torch.no_grad()
    def start_as_pass_through(self, *, hidden_rms: float = 1.0, lm_head: Tensor | None = None) -> None:
        """Start near where Medusa heads start: mostly the residual branch, its projection the backbone's.

        hidden_rms: root mean square of the backbone's hidden states, the scale that its projection is used to. lm_head:
        [V, C], for own projections.
        """
        for head in self.heads:
            assert isinstance(head, HydraHead)
            for block in head.blocks:
                assert isinstance(block, nn.Linear)
                nn.init.zeros_(block.weight)
                nn.init.zeros_(block.bias)
            # Not the first layer: the drafted tokens come in by it alone.
            assert isinstance(head.input, nn.Linear)
            nn.init.normal_(head.input.weight, std=0.5 * head.input.in_features**-0.5)
            nn.init.zeros_(head.input.bias)
            if isinstance(head.residual, nn.Linear):
                nn.init.zeros_(head.residual.weight)
                head.residual.weight[:, : self.hidden_size].fill_diagonal_(1.0)
                nn.init.zeros_(head.residual.bias)
        if self.norm is not None:
            self.norm.fill_(hidden_rms)
        if self.projection is not None and lm_head is not None:
            self.projection.copy_(lm_head.expand_as(self.projection))

    def condition(self, values: Tensor) -> Tensor:
        """A hidden state or embedding [..., C] as the heads read it."""
        if not self.shape.normalised:
            return values
        return nn.functional.rms_norm(values, (self.hidden_size,), eps=NORM_EPS)

    def features(self, depth: int, hidden: Tensor, conditions: Tensor) -> Tensor:
        """What the projection of head `depth` (from 1) reads.

        hidden [..., C]: as the backbone gave it. conditions [..., (1 + depth) C]: `condition` of the hidden state and
        of the embeddings of t_1..t_depth, side by side. -> [..., C]
        """
        # Normalised heads add to the normalised hidden state: what they learn has one scale everywhere.
        base = conditions[..., : self.hidden_size] if self.shape.normalised else hidden
        feature: Tensor = self.heads[depth - 1](base, conditions)
        if self.norm is None:
            return feature
        return nn.functional.rms_norm(feature, (self.hidden_size,), self.norm.to(feature.dtype), eps=NORM_EPS)

    def project(self, depth: int, features: Tensor, shared: Projection | None = None) -> Tensor:
        """features [..., C] of head `depth` -> logits [..., V]. `shared`: the backbone's, for heads that share it."""
        if self.projection is None:
            assert shared is not None, "heads without projections of their own need the backbone's"
            return shared(features)
        bias = None if self.projection_bias is None else self.projection_bias[depth - 1]
        return nn.functional.linear(features, self.projection[depth - 1], bias)

    def forward(self, hidden: Tensor, embeddings: Tensor, shared: Projection | None = None) -> list[Tensor]:
        """All heads at once with the drafted tokens given, as in training.

        hidden [..., C]; embeddings [..., K, C] of t_1..t_K -> logits of every depth, K times [..., V].
        """
        conditions = torch.cat([self.condition(hidden)[..., None, :], self.condition(embeddings)], dim=-2)
        return [
            self.project(depth, self.features(depth, hidden, conditions[..., : depth + 1, :].flatten(-2)), shared)
            for depth in range(1, self.num_heads + 1)
        ]
