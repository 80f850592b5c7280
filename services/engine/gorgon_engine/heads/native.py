"""Draft heads on the native CPU kernels: their matrices packed in the backbone's own precision.

A wrong last bit of a guess changes nothing but the guess, so int8 is as good as float32 here and reads a quarter of it.
"""

from torch import Tensor, nn

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.backbone.native_backbone import NativeBackbone
from gorgon_engine.heads.eagle import EagleHead
from gorgon_engine.heads.hydra import NORM_EPS, HydraHead, HydraHeads, Projection
from gorgon_engine.kernels.cpu import Kind, NativeLibrary, PackedLinear, load_library
from gorgon_engine.kernels.cpu.eagle import NativeEagle, NativeEagleLayer
from gorgon_engine.kernels.cpu.elementwise import add_silu, rms_norm
from gorgon_engine.kernels.cpu.hydra import NativeHydra, NativeHydraHead
from gorgon_engine.kernels.cpu.model import MAX_HEAD_DIM

_EAGLE_MATRICES = ("fc", "qkv", "o", "gate_up", "down")
_EAGLE_NORMS = ("feature_norm", "embedding_norm", "attention_norm", "mlp_norm", "norm")


class _Packed(nn.Module):
    """A linear layer of the native kernels in place of torch's."""

    def __init__(self, linear: nn.Linear, kind: Kind, library: NativeLibrary | None = None) -> None:
        super().__init__()
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.linear = PackedLinear.pack(linear.weight.detach().float(), bias, kind, library=library)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.contiguous())


class PackedHydraHeads(HydraHeads):
    """Hydra heads whose every matrix is packed: the only parameter that is left is the norm.

    A row's result depends on that row only, to the bit, and is what the native call (`in_one_call`) computes.
    """

    def __init__(self, heads: HydraHeads, kind: Kind, *, library: NativeLibrary | None = None) -> None:
        """The given heads are used up: each matrix is freed once it is packed. library: None = this machine's."""
        super().__init__(heads.shape, device="meta")
        self._library = library or load_library()
        for head in heads.heads:
            assert isinstance(head, HydraHead)
            head.input = self._packed(head.input, kind)
            head.residual = None if head.residual is None else self._packed(head.residual, kind)
            head.blocks = nn.ModuleList(self._packed(block, kind) for block in head.blocks)
        self.heads = heads.heads
        if heads.norm is not None:
            self.norm = nn.Parameter(heads.norm.detach().float(), requires_grad=False)
        self._projections = self._packed_projections(heads, kind)
        self.projection = self.projection_bias = heads.projection = heads.projection_bias = None

    def _packed(self, module: nn.Module, kind: Kind) -> _Packed:
        assert isinstance(module, nn.Linear)
        return _Packed(module, kind, self._library)

    def _packed_projections(self, heads: HydraHeads, kind: Kind) -> tuple[PackedLinear, ...] | None:
        if heads.projection is None:
            return None
        weights, biases = heads.projection.detach(), heads.projection_bias
        return tuple(
            PackedLinear.pack(weight, None if biases is None else biases[index].detach(), kind, library=self._library)
            for index, weight in enumerate(weights)
        )

    @property
    def shares_projection(self) -> bool:
        return self._projections is None

    def condition(self, values: Tensor) -> Tensor:
        return self._rms_norm(values.float().contiguous(), None) if self.shape.normalised else values

    def features(self, depth: int, hidden: Tensor, conditions: Tensor) -> Tensor:
        head = self.heads[depth - 1]
        assert isinstance(head, HydraHead)
        base = conditions[..., : self.hidden_size] if self.shape.normalised else hidden
        residual = base.contiguous() if head.residual is None else head.residual(conditions)
        x = add_silu(self._library, head.input(conditions), residual)
        for block in head.blocks:
            x = add_silu(self._library, block(x), x)
        return x if self.norm is None else self._rms_norm(x, self.norm)

    def _rms_norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return rms_norm(self._library, x, weight, NORM_EPS)

    def project(self, depth: int, features: Tensor, shared: Projection | None = None) -> Tensor:
        if self._projections is None:
            return super().project(depth, features, shared)
        return self._projections[depth - 1](features.contiguous())

    def in_one_call(
        self, *, embeddings: Tensor, shared: PackedLinear | None, draft_vocabulary: Tensor | None
    ) -> NativeHydra:
        """The heads with all that the dynamic search needs of the backbone.

        embeddings: float32 or bfloat16 [E, C]. shared: the projection to the draft vocabulary ([V] int64, the token of
        each of its rows, None = the row itself), of heads that have none of their own. Raises ValueError for what does
        not fit together.
        """
        projections = self._projections or (shared,) * self.num_heads
        return NativeHydra(
            [_native_head(head, projection) for head, projection in zip(self.heads, projections, strict=True)],
            norm=self.norm,
            norm_eps=NORM_EPS,
            embeddings=embeddings,
            vocabulary=draft_vocabulary,
        )


def _native_head(head: nn.Module, projection: PackedLinear | None) -> NativeHydraHead:
    assert isinstance(head, HydraHead)
    assert projection is not None, "heads without projections of their own need the backbone's"
    first, *blocks = (module.linear for module in (head.input, *head.blocks) if isinstance(module, _Packed))
    residual = head.residual.linear if isinstance(head.residual, _Packed) else None
    return NativeHydraHead(first, residual, tuple(blocks), projection)


def pack_for_cpu(heads: HydraHeads, backbone: Backbone) -> HydraHeads:
    """The heads packed as the backbone's matrices are, and used up, where native kernels serve it; else as they are."""
    return PackedHydraHeads(heads, backbone.kind) if isinstance(backbone, NativeBackbone) else heads


def native_hydra(heads: HydraHeads, backbone: Backbone, draft_vocabulary: Tensor | None) -> NativeHydra | None:
    """The dynamic search in one native call, for packed heads; None for others, which torch runs.

    draft_vocabulary: [V] int64, the token of each row of the heads' projections; None = all tokens.
    """
    if not isinstance(heads, PackedHydraHeads) or not isinstance(backbone, NativeBackbone):
        return None
    shared = _projection_of(backbone, draft_vocabulary) if heads.shares_projection else None
    return heads.in_one_call(embeddings=backbone.embedding, shared=shared, draft_vocabulary=draft_vocabulary)


class PackedEagleHead(EagleHead):
    """An EAGLE head whose every matrix is packed: the only parameters that are left are the norms, in float32."""

    def __init__(self, head: EagleHead, kind: Kind, *, library: NativeLibrary | None = None) -> None:
        """The given head is used up: each matrix is freed once it is packed. library: None = this machine's."""
        super().__init__(head.shape, device="meta")
        library = library or load_library()
        for name in _EAGLE_MATRICES:
            linear = getattr(head, name)
            assert isinstance(linear, nn.Linear)
            setattr(self, name, _Packed(linear, kind, library))
            delattr(head, name)
        for name in _EAGLE_NORMS:
            setattr(self, name, nn.Parameter(getattr(head, name).detach().float(), requires_grad=False))

    def in_one_call(
        self, *, embeddings: Tensor, projection: PackedLinear, draft_vocabulary: Tensor | None
    ) -> NativeEagle:
        """The head with all that the dynamic search needs of the backbone.

        embeddings: float32 or bfloat16 [E, C]. projection: to the draft vocabulary ([V] int64, the token of each of its
        rows, None = the row itself). Raises ValueError for what does not fit together.
        """
        shape = self.shape
        return NativeEagle(
            NativeEagleLayer(
                **{name: getattr(self, name).linear for name in _EAGLE_MATRICES},
                **{name: getattr(self, name) for name in _EAGLE_NORMS},
                projection=projection,
            ),
            num_heads=shape.num_query_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            max_depth=shape.num_heads,
            norm_eps=shape.norm_eps,
            embeddings=embeddings,
            vocabulary=draft_vocabulary,
        )


def pack_eagle_for_cpu(head: EagleHead, backbone: Backbone) -> EagleHead:
    """As `pack_for_cpu`."""
    return PackedEagleHead(head, backbone.kind) if isinstance(backbone, NativeBackbone) else head


def native_eagle(head: EagleHead, backbone: Backbone, draft_vocabulary: Tensor | None) -> NativeEagle | None:
    """As `native_hydra`. None for heads too wide for the native attention as well."""
    if not isinstance(head, PackedEagleHead) or not isinstance(backbone, NativeBackbone):
        return None
    if head.shape.head_dim > MAX_HEAD_DIM:
        return None
    return head.in_one_call(
        embeddings=backbone.embedding,
        projection=_projection_of(backbone, draft_vocabulary),
        draft_vocabulary=draft_vocabulary,
    )


def _projection_of(backbone: NativeBackbone, draft_vocabulary: Tensor | None) -> PackedLinear:
    return backbone.lm_head if draft_vocabulary is None else backbone.lm_head.select_outputs(draft_vocabulary)
