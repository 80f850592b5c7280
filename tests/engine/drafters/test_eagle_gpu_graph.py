"""A draft of Llama-3-8B's size on a GPU that is not there: what a CUDA graph asks of it, and that its kernels compile.

Fake tensors have shapes, types and a device but no values: whatever reads a value on the host (a branch, an item, a
shape that depends on one) fails on them. The kernels' launches are recorded in place of being run.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from gorgon_engine.drafters.base import Committed, DraftContext
from gorgon_engine.drafters.beam import BeamLimits
from gorgon_engine.drafters.eagle_gpu import EagleGpuDrafter, plan_levels
from gorgon_engine.heads.eagle import EagleShape
from gorgon_engine.heads.eagle_layer import EagleLayer
from gorgon_engine.kernels.triton import nf4_gluon, tree_attention
from gorgon_engine.kernels.triton.nf4_linear import default_variant
from gorgon_engine.kernels.triton.nf4_packing import BLOCK_WORDS, PackedNf4
from gorgon_engine.kernels.triton.products import DenseProduct, Nf4Product, Product

SHAPE = EagleShape(4096, 32, 8, 128, 14336, rope_theta=500000.0, num_heads=8)
VOCAB, SAID, POSITIONS, SLOTS = 128256, 16384, 4096 + 128, 8
INDEX = Tensor.__getitem__
OWN = ("_eagle_inputs_kernel", "_eagle_keep_kernel", "_eagle_beam_kernel", "_eagle_tree_kernel")


@dataclass
class Recorder:
    """Launches: kernel, grid, and of each argument what a compiled kernel or a graph fixes."""

    launches: list[tuple[str, Any, tuple[Any, ...]]] = field(default_factory=list)
    kernels: list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def run(self, kernel: JITFunction, *args: Any, grid: Any, **options: Any) -> None:
        named = {name: value for name, value in options.items() if name != "warmup"}
        self.launches.append((kernel.__name__, grid, tuple(map(shown, (*args, *named.values())))))
        self.kernels.append((kernel, args, named))


class OnDeviceOnly(TorchDispatchMode):
    """Fails where a tensor is made on the host: it would have to be copied, which a graph cannot hold."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operation(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            assert not isinstance(tensor, Tensor) or tensor.device.type == "cuda", f"{operation} on the host"
        return made


def shown(value: object) -> object:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device.type
    base = getattr(value, "base", None)
    return (type(value).__name__, shown(base)) if isinstance(base, Tensor) else value


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    recorder = Recorder()
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **options: recorder.run(kernel, *args, **options))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(nf4_gluon, "_check_table", lambda kernel, expected: None)
    for descriptor in (nf4_gluon.TensorDescriptor, tree_attention.TensorDescriptor):  # they look at addresses
        monkeypatch.setattr(descriptor, "__post_init__", lambda self: None)
    # A torch that was built without CUDA selects on no other device by indexing.
    monkeypatch.setattr(Tensor, "__getitem__", first_of)
    with FakeTensorMode(), OnDeviceOnly():
        yield recorder


def first_of(tensor: Tensor, index: object) -> Tensor:
    if isinstance(index, int):
        return tensor.select(0, index)
    return INDEX(tensor, index)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def nf4(out_features: int, in_features: int, **options: int) -> Nf4Product:
    words = empty(out_features // 64 * (in_features // 256) * BLOCK_WORDS, dtype=torch.int32)
    code, table = empty(16, dtype=torch.float32), empty(256, dtype=torch.int32)
    packed = PackedNf4(words, code, table, out_features, in_features)
    return Nf4Product.of(packed, default_variant(words.device, torch.bfloat16), **options)


def dense(out_features: int, in_features: int, max_partials: int = 1) -> DenseProduct:
    return DenseProduct(empty(out_features, in_features))


def make_drafter(*, four_bit: bool, limits: BeamLimits, num_depths: int) -> EagleGpuDrafter:
    size, counts = SHAPE.hidden_size, SHAPE.head_counts
    make = nf4 if four_bit else dense
    products: dict[str, Product] = {
        "fc": make(size, 2 * size),
        "qkv": make(sum(counts) * SHAPE.head_dim, size),
        "o": make(size, counts[0] * SHAPE.head_dim),
        "gate_up": make(2 * SHAPE.intermediate_size, size),
        "down": make(size, SHAPE.intermediate_size),
        "projection": make(SAID, size, max_partials=1),
    }
    norms = ("feature_norm", "embedding_norm", "attention_norm", "mlp_norm", "norm")
    layer = EagleLayer(shape=SHAPE, **{name: empty(size) for name in norms}, **products)
    embedding = empty(VOCAB, size)

    def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
        shape = len(positions), SHAPE.head_dim // 2
        return empty(*shape, dtype=torch.float32), empty(*shape, dtype=torch.float32)

    drafter = EagleGpuDrafter(
        layer, angles=angles, embed=lambda tokens: embedding.index_select(0, tokens), vocab_size=SAID,
        draft_vocabulary=empty(SAID, dtype=torch.int64), limits=limits, num_depths=num_depths,
    )  # fmt: skip
    return drafter.for_slots(SLOTS, POSITIONS)


def draft(drafter: EagleGpuDrafter, *, batch: int, rows_each: int, max_nodes: int, bound: int) -> list[Tensor]:
    """What a step does: tell what was committed, then draft."""

    def integers(*shape: int) -> Tensor:
        return empty(*shape, dtype=torch.int64)

    slots = integers(batch)
    drafter.observe(
        Committed(
            slots,
            integers(batch),
            empty(batch, rows_each, SHAPE.hidden_size),
            integers(batch, rows_each),
            integers(batch),
        )
    )
    context = DraftContext(
        root_tokens=integers(batch), hidden=empty(batch, SHAPE.hidden_size), history=integers(batch, bound),
        history_lengths=integers(batch), seeds=integers(batch), slots=slots,
    )  # fmt: skip
    tree = drafter.propose(context, max_nodes)
    return [tree.tokens, tree.parents, tree.log_probs, tree.ranks]


@pytest.mark.parametrize("four_bit", [True, False])
@pytest.mark.parametrize(
    ("batch", "limits", "num_depths"),
    [(1, BeamLimits(num_choices=8, width=8), 6), (1, BeamLimits(num_choices=8, width=16), 5), (8, BeamLimits(), 4)],
)
def test_nothing_depends_on_a_value(
    recorder: Recorder, four_bit: bool, batch: int, limits: BeamLimits, num_depths: int
) -> None:
    drafter = make_drafter(four_bit=four_bit, limits=limits, num_depths=num_depths)
    sizes = {"batch": batch, "rows_each": 17, "max_nodes": 63, "bound": 2176}
    tree = draft(drafter, **sizes)
    assert all(isinstance(tensor, FakeTensor) for tensor in tree)
    assert all((tuple(tensor.shape), tensor.device.type) == ((batch, 63), "cuda") for tensor in tree)
    first = recorder.launches.copy()
    recorder.launches.clear()
    draft(drafter, **sizes)
    assert recorder.launches == first, "two steps of one size are the same launches on the same shapes"
    names = [name for name, _, _ in first]
    product = "_nf4_linear_kernel" if four_bit else "_dense_linear_kernel"
    # The layer's five and the projection, of which the root's pass has two done when it is remembered.
    assert names.count(product) == 6 * num_depths
    assert names.count("_prefix_kernel") == names.count("_eagle_beam_kernel") == num_depths
    assert names.count("_eagle_keep_kernel") == names.count("_eagle_tree_kernel") == 1


def test_a_value_on_the_host_would_have_been_noticed(recorder: Recorder) -> None:
    with pytest.raises(DataDependentOutputException):
        bool(empty(3, dtype=torch.int64).sum() > 0)
    with pytest.raises(DynamicOutputShapeException):
        torch.ops.aten.nonzero(empty(3))
    with pytest.raises(AssertionError, match="on the host"):
        torch.zeros(3)


def signature_of(
    kernel: JITFunction, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Types of a recorded launch's arguments, and its constants."""
    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32"}
    names = [parameter.name for parameter in kernel.params]
    given = dict(zip(names, args, strict=False)) | {name: value for name, value in options.items() if name in names}
    signature, constants = {}, {}
    for parameter in kernel.params:
        value = given[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            signature[parameter.name] = (
                types[value.dtype] if isinstance(value, Tensor) else "fp32" if isinstance(value, float) else "i32"
            )
    return signature, constants


def test_the_kernels_compile_for_an_h100(recorder: Recorder) -> None:
    drafter = make_drafter(four_bit=True, limits=BeamLimits(num_choices=8, width=8), num_depths=6)
    draft(drafter, batch=1, rows_each=17, max_nodes=63, bound=2176)
    compiled = set()
    for kernel, args, options in recorder.kernels:
        if kernel.__name__ not in OWN:
            continue
        signature, constants = signature_of(kernel, args, options)
        variant = (kernel.__name__, tuple(constants.items()))
        if variant in compiled:
            continue
        compiled.add(variant)
        aligned = [(place,) for place, kind in enumerate(signature.values()) if kind[0] == "*"]
        source = ASTSource(kernel, signature, constants, {place: [["tt.divisibility", 16]] for place in aligned})
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": options["num_warps"]})
        assert ".entry" in made.asm["ptx"]
        assert "st.local" not in made.asm["ptx"], f"{variant} keeps something in local memory"
    assert {name for name, _ in compiled} == set(OWN)
    assert len(compiled) > len(OWN), "the first depth is another variant than those below it"


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("num_depths", [1, 3, 8])
def test_the_scratch_holds_every_row(batch: int, num_depths: int) -> None:
    for width in (1, 4, 16, 64):
        levels = plan_levels(
            num_depths=num_depths,
            limits=BeamLimits(num_choices=8, width=width),
            max_nodes=63,
            vocab_size=SAID,
            batch=batch,
        )
        assert len(levels) == num_depths
        assert levels[-1].width == 0
        assert sum(level.width for level in levels) <= 64
        for above, below in pairwise(levels):
            assert below.num_paths == above.width >= 1
            assert below.first_row == above.first_row + above.width
            assert below.first_node == above.first_node + above.num_kept
            assert batch * above.width <= max(64, 2 * batch)
