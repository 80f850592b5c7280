"""Draft heads on the native CPU kernels: their matrices packed in the backbone's own precision.

A wrong last bit of a guess changes nothing but the guess, so int8 is as good as float32 here and reads a quarter of it.
"""

from torch import Tensor, nn

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.backbone.native_backbone import NativeBackbone
from gorgon_engine.heads.hydra import HydraHead, HydraHeads
from gorgon_engine.kernels.cpu import Kind, PackedLinear


class _Packed(nn.Module):
    """A linear layer of the native kernels in place of torch's."""

    def __init__(self, linear: nn.Linear, kind: Kind) -> None:
        super().__init__()
        bias = None if linear.bias is None else linear.bias.detach().float()
        self._linear = PackedLinear.pack(linear.weight.detach().float(), bias, kind)

    def forward(self, x: Tensor) -> Tensor:
        return self._linear(x.contiguous())


def pack_for_cpu(heads: HydraHeads, backbone: Backbone) -> HydraHeads:
    """The heads, changed in place: their matrices packed as the backbone's, where native kernels serve it."""
    if not isinstance(backbone, NativeBackbone):
        return heads
    kind = backbone.kind

    def packed(module: nn.Module) -> nn.Module:
        assert isinstance(module, nn.Linear)
        return _Packed(module, kind)

    for head in heads.heads:
        assert isinstance(head, HydraHead)
        head.input = packed(head.input)
        head.residual = None if head.residual is None else packed(head.residual)
        head.blocks = nn.ModuleList(packed(block) for block in head.blocks)
    return heads
