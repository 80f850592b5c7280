"""A small model inside a large one's matrices: the large one's cost, the small one's tokens.

The real weights of Llama-3-8B are gated. So the matrices have *exactly* its shapes, and inside them lies a small model
(SmolLM2-135M) such that the whole computes *exactly* what the small one computes:

- hidden dimension c -> c; norm weights times sqrt(c / C), eps times c / C, as the mean square runs over zeros too;
- layer l -> l, the layers that are left over add nothing (their o and down are zero);
- the query heads of a group stay a group: head g r + i -> g R + i; the groups that are left over compute junk that o
  multiplies by zero;
- rotary dimension i of d -> i D / d for the first half, D / 2 + (i - d / 2) D / d for the second, which turn by the
  same angles; q times sqrt(D / d), as scores are scaled by D^-1/2; value dimensions keep their places;
- intermediate dimension i -> i, token t -> t; the tokens that are left over get a bias that masks their logits.

Zero is what has to be: embedding columns behind c, o and down rows behind c, o columns of unused heads and value
dimensions, down columns behind i, q and k rows of unused rotary dimensions in used heads. Everything else is random
junk, so that nothing can be skipped or compressed. In NF4 the blocks of 64 along the input stay whole: codes and scales
are the small model's own, zeros are blocks whose scale is zero.

Letters: small ones of the small model, capitals of the large one: c, C hidden size, d, D head dimension, r, R query
heads a group, i, I intermediate size, v, V vocabulary.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gorgon_engine.heads.eagle import EagleHead
from gorgon_engine.models.config import BackboneConfig
from gorgon_engine.models.linear import DenseLinear, Linear
from gorgon_engine.models.loading import BackboneWeights, LayerWeights
from gorgon_engine.models.nf4 import BLOCK_SIZE, Nf4Linear, Nf4Tensor
from gorgon_engine.models.rope import RotaryEmbedding
from gorgon_protocol.errors import ModelError

MASKED = -1e30  # a bias, not an infinity: sampling subtracts logits from each other


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model is lifted to."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int


LLAMA_3_8B = Shape(
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
)


def _require(fits: bool, why: str) -> None:
    if not fits:
        raise ModelError(f"the model cannot be lifted: {why}")


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the small model's dimensions lie in the large one's."""

    rotary: Tensor  # [d] -> of D
    query_heads: Tensor  # [h] -> of H
    kv_heads: Tensor  # [g] -> of G
    target: Shape
    head_dim: int

    @classmethod
    def of(cls, num_heads: int, num_kv_heads: int, head_dim: int, target: Shape) -> "_Places":
        group, target_group = num_heads // num_kv_heads, target.num_heads // target.num_kv_heads
        _require(group <= target_group, "the large model's groups are smaller")
        _require(num_kv_heads <= target.num_kv_heads, "the large model has fewer groups")
        _require(target.head_dim % head_dim == 0, "rotary dimensions cannot be spread")
        half, spread = torch.arange(head_dim // 2), target.head_dim // head_dim
        heads = torch.arange(num_heads)
        return cls(
            rotary=torch.cat([half * spread, target.head_dim // 2 + half * spread]),
            query_heads=heads // group * target_group + heads % group,
            kv_heads=torch.arange(num_kv_heads),
            target=target,
            head_dim=head_dim,
        )

    def qkv_rows(self) -> Tensor:
        """[(h + 2 g) d] -> of (H + 2 G) D."""
        size, target = self.target.head_dim, self.target
        queries = self.query_heads[:, None] * size + self.rotary
        keys = (target.num_heads + self.kv_heads)[:, None] * size + self.rotary
        values = (target.num_heads + target.num_kv_heads + self.kv_heads)[:, None] * size + torch.arange(self.head_dim)
        return torch.cat([part.flatten() for part in (queries, keys, values)])

    def dead_qkv_rows(self) -> Tensor:
        """The q and k rows of used heads that must be zero: their products would enter used scores."""
        size = self.target.head_dim
        unused = torch.ones(size, dtype=torch.bool)
        unused[self.rotary] = False
        rest = torch.arange(size)[unused]
        heads = torch.cat([self.query_heads, self.target.num_heads + self.kv_heads])
        return (heads[:, None] * size + rest).flatten()

    def o_columns(self) -> Tensor:
        """[h d] -> of H D."""
        return (self.query_heads[:, None] * self.target.head_dim + torch.arange(self.head_dim)).flatten()


class _MaskedHead(DenseLinear):
    """An lm_head whose bias masks tokens and does nothing else: a selection without them needs none, and drafting with
    it costs what it costs in a model that has none."""

    def select_outputs(self, rows: Tensor) -> DenseLinear:
        selected = super().select_outputs(rows)
        assert selected.bias is not None
        return selected if bool(selected.bias.any()) else DenseLinear(selected.weight)


_NONE = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class _Matrix:
    """Where one small matrix goes: [out, in] of the large one, and which of the rest is zero instead of junk."""

    out_features: int
    in_features: int
    rows: Tensor  # [small out]
    columns: Tensor  # [small in]
    zero_rows: Tensor = _NONE
    zero_columns: Tensor = _NONE
    scaled_rows: int = 0  # the first small rows times `scale`
    scale: float = 1.0

    def to(self, device: torch.device) -> "_Matrix":
        parts = {name: getattr(self, name).to(device) for name in ("rows", "columns", "zero_rows", "zero_columns")}
        return replace(self, **parts)

    def scales(self, like: Tensor) -> Tensor:
        """[small out, 1]"""
        scales = torch.ones(self.rows.numel(), 1, dtype=like.dtype, device=like.device)
        scales[: self.scaled_rows] = self.scale
        return scales


def _rest(total: int, used: Tensor) -> Tensor:
    free = torch.ones(total, dtype=torch.bool)
    free[used] = False
    return free.nonzero().flatten()


class Lift:
    """From a model of one shape to a larger one; random junk from `generator`, which lives on the weights' device."""

    def __init__(self, small: BackboneConfig, target: Shape, generator: torch.Generator) -> None:
        self.small = small
        self.target = target
        self.generator = generator
        self._hidden = torch.arange(small.hidden_size)
        self._intermediate = torch.arange(small.intermediate_size)
        self._vocabulary = torch.arange(small.vocab_size)
        self._places = _Places.of(small.num_heads, small.num_kv_heads, small.head_dim, target)
        self._norm_scale = math.sqrt(small.hidden_size / target.hidden_size)
        self.config = replace(
            small,
            hidden_size=target.hidden_size,
            intermediate_size=target.intermediate_size,
            num_layers=target.num_layers,
            num_heads=target.num_heads,
            num_kv_heads=target.num_kv_heads,
            head_dim=target.head_dim,
            vocab_size=target.vocab_size,
            rms_norm_eps=small.rms_norm_eps * small.hidden_size / target.hidden_size,
            tie_word_embeddings=False,
            sliding_windows=(0,) * target.num_layers,
            rope=replace(small.rope, head_dim=target.head_dim),
        )

    def backbone(self, small: BackboneWeights) -> BackboneWeights:
        """The whole backbone. Its linears are of the small one's kind: NF4 or dense. Raises `ModelError`."""
        config, target = small.config, self.target
        _require(not any(config.sliding_windows), "it has sliding windows")
        _require(not config.has_query_key_norms, "it has norms of queries and keys")
        for name in ("hidden_size", "intermediate_size", "num_layers", "vocab_size"):
            _require(getattr(config, name) <= getattr(target, name), f"its {name} is the larger one")
        device = small.embedding.device
        embedding = torch.zeros(
            self.target.vocab_size, self.target.hidden_size, dtype=small.embedding.dtype, device=device
        )
        embedding[: small.embedding.shape[0], : small.embedding.shape[1]] = small.embedding
        layers = [self._layer(layer) for layer in small.layers]
        while len(layers) < self.target.num_layers:
            layers.append(self._identity(layers[-1]))
        return BackboneWeights(
            config=self.config,
            embedding=embedding,
            layers=tuple(layers),
            final_norm=self._norm(small.final_norm),
            lm_head=self._lm_head(small.lm_head),
            rope=RotaryEmbedding(self.config.rope, small.rope.device),
            folder=small.folder,
        )

    def eagle(self, small: EagleHead) -> EagleHead:
        """The draft head likewise, dense."""
        shape = small.shape
        target = self.target
        lifted = EagleHead(
            replace(
                shape,
                hidden_size=target.hidden_size,
                num_query_heads=target.num_heads,
                num_kv_heads=target.num_kv_heads,
                head_dim=target.head_dim,
                intermediate_size=target.intermediate_size,
                norm_eps=shape.norm_eps * shape.hidden_size / target.hidden_size,
            ),
            dtype=small.norm.dtype,
            device=small.norm.device,
        )
        places = _Places.of(shape.num_query_heads, shape.num_kv_heads, shape.head_dim, target)
        intermediate = torch.arange(shape.intermediate_size)
        both = torch.cat([self._hidden, target.hidden_size + self._hidden])
        fc = _Matrix(
            out_features=target.hidden_size,
            in_features=2 * target.hidden_size,
            rows=self._hidden,
            columns=both,
            zero_rows=_rest(target.hidden_size, self._hidden),
        )
        matrices = {
            "fc": fc,
            "qkv": self._qkv(places),
            "o": self._o(places),
            "gate_up": self._gate_up(intermediate),
            "down": self._down(intermediate),
        }
        with torch.no_grad():
            for name in ("feature_norm", "embedding_norm", "attention_norm", "mlp_norm", "norm"):
                getattr(lifted, name).copy_(self._norm(getattr(small, name)))
            for name, matrix in matrices.items():
                getattr(lifted, name).weight.copy_(self._dense(getattr(small, name).weight, matrix))
        return lifted

    def _layer(self, small: LayerWeights) -> LayerWeights:
        return LayerWeights(
            input_norm=self._norm(small.input_norm),
            post_norm=self._norm(small.post_norm),
            q_norm=None,
            k_norm=None,
            qkv=self._linear(small.qkv, self._qkv(self._places)),
            o=self._linear(small.o, self._o(self._places)),
            gate_up=self._linear(small.gate_up, self._gate_up(self._intermediate)),
            down=self._linear(small.down, self._down(self._intermediate)),
            sliding_window=0,
        )

    def _identity(self, layer: LayerWeights) -> LayerWeights:
        """A layer of its own memory that adds nothing."""
        return replace(
            layer,
            qkv=_copy(layer.qkv),
            gate_up=_copy(layer.gate_up),
            o=_copy(layer.o, scale=0.0),
            down=_copy(layer.down, scale=0.0),
        )

    def _norm(self, small: Tensor) -> Tensor:
        lifted = torch.ones(self.target.hidden_size, dtype=small.dtype, device=small.device)
        # In double: the product is rounded once.
        lifted[: small.shape[0]] = (small.detach().double() * self._norm_scale).to(small.dtype)
        return lifted

    def _qkv(self, places: _Places) -> _Matrix:
        target = self.target
        return _Matrix(
            out_features=(target.num_heads + 2 * target.num_kv_heads) * target.head_dim,
            in_features=target.hidden_size,
            rows=places.qkv_rows(),
            columns=self._hidden,
            zero_rows=places.dead_qkv_rows(),
            scaled_rows=places.query_heads.numel() * places.head_dim,
            scale=math.sqrt(target.head_dim / places.head_dim),
        )

    def _o(self, places: _Places) -> _Matrix:
        width, columns = self.target.num_heads * self.target.head_dim, places.o_columns()
        return _Matrix(
            out_features=self.target.hidden_size,
            in_features=width,
            rows=self._hidden,
            columns=columns,
            zero_rows=_rest(self.target.hidden_size, self._hidden),
            zero_columns=_rest(width, columns),
        )

    def _gate_up(self, intermediate: Tensor) -> _Matrix:
        return _Matrix(
            out_features=2 * self.target.intermediate_size,
            in_features=self.target.hidden_size,
            rows=torch.cat([intermediate, self.target.intermediate_size + intermediate]),
            columns=self._hidden,
        )

    def _down(self, intermediate: Tensor) -> _Matrix:
        return _Matrix(
            out_features=self.target.hidden_size,
            in_features=self.target.intermediate_size,
            rows=self._hidden,
            columns=intermediate,
            zero_rows=_rest(self.target.hidden_size, self._hidden),
            zero_columns=_rest(self.target.intermediate_size, intermediate),
        )

    def _lm_head(self, small: Linear) -> DenseLinear:
        assert isinstance(small, DenseLinear)
        vocabulary = self._vocabulary
        matrix = _Matrix(self.target.vocab_size, self.target.hidden_size, vocabulary, self._hidden)
        weight = self._dense(small.weight, matrix)
        bias = torch.full((self.target.vocab_size,), MASKED, dtype=weight.dtype, device=weight.device)
        bias[: vocabulary.numel()] = 0.0 if small.bias is None else small.bias
        return DenseLinear(weight, bias) if small.bias is not None else _MaskedHead(weight, bias)

    def _linear(self, small: Linear, matrix: _Matrix) -> Linear:
        if isinstance(small, Nf4Linear):
            assert small.bias is None
            return Nf4Linear(self._nf4(small.weight, matrix))
        assert isinstance(small, DenseLinear), type(small)
        assert small.bias is None
        return DenseLinear(self._dense(small.weight, matrix))

    def _dense(self, small: Tensor, matrix: _Matrix) -> Tensor:
        matrix = matrix.to(small.device)
        shape = (matrix.out_features, matrix.in_features)
        small = small.detach()
        lifted = torch.empty(shape, dtype=small.dtype, device=small.device)
        lifted.normal_(std=float(small.float().std()), generator=self.generator)
        lifted[matrix.zero_rows] = 0.0
        lifted[:, matrix.zero_columns] = 0.0
        lifted[matrix.rows[:, None], matrix.columns] = (small.float() * matrix.scales(small.float())).to(small.dtype)
        return lifted

    def _nf4(self, small: Nf4Tensor, matrix: _Matrix) -> Nf4Tensor:
        device = small.packed.device
        matrix = matrix.to(device)
        num_blocks = matrix.in_features // BLOCK_SIZE
        packed = torch.randint(
            0, 256, (matrix.out_features, num_blocks, BLOCK_SIZE // 2),
            dtype=torch.uint8, device=device, generator=self.generator,
        )  # fmt: skip
        absmax = torch.rand(matrix.out_features, num_blocks, device=device, generator=self.generator)
        absmax = (0.5 + absmax) * small.absmax.mean()
        blocks = _blocks(matrix.columns)
        absmax[matrix.zero_rows] = 0.0
        absmax[:, _blocks(matrix.zero_columns)] = 0.0
        shape = (small.out_features, small.in_features // BLOCK_SIZE)
        packed[matrix.rows[:, None], blocks] = small.packed.view(*shape, BLOCK_SIZE // 2)
        absmax[matrix.rows[:, None], blocks] = small.absmax.view(shape) * matrix.scales(small.absmax)
        return Nf4Tensor(packed.flatten(), absmax.flatten(), small.code, matrix.out_features, matrix.in_features)


def _blocks(columns: Tensor) -> Tensor:
    """The blocks that whole runs of columns make up."""
    runs = columns.view(-1, BLOCK_SIZE)
    assert bool((runs == runs[:, :1] + torch.arange(BLOCK_SIZE, device=columns.device)).all()), "a block is cut"
    assert bool((runs[:, 0] % BLOCK_SIZE == 0).all()), "blocks are shifted"
    return runs[:, 0] // BLOCK_SIZE


def _copy(linear: Linear, *, scale: float = 1.0) -> Linear:
    if isinstance(linear, Nf4Linear):
        weight = linear.weight
        return Nf4Linear(replace(weight, packed=weight.packed.clone(), absmax=weight.absmax * scale))
    assert isinstance(linear, DenseLinear)
    return DenseLinear(linear.weight * scale)
