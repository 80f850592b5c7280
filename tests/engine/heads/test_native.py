"""Heads on the native kernels say what they said before, up to the precision that they are packed in."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.backbone.native_backbone import NativeBackbone
from gorgon_engine.backbone.select import BackboneOptions, Kernels, load_backbone
from gorgon_engine.drafters.base import Committed, DraftContext
from gorgon_engine.drafters.eagle import EagleDrafter
from gorgon_engine.drafters.hydra import HydraDrafter
from gorgon_engine.heads.eagle import EagleHead, EagleShape
from gorgon_engine.heads.hydra import HydraHead, HydraHeads, HydraShape
from gorgon_engine.heads.native import (
    PackedEagleHead,
    PackedHydraHeads,
    native_eagle,
    native_hydra,
    pack_eagle_for_cpu,
    pack_for_cpu,
)
from gorgon_engine.models.loading import Quantization
from gorgon_engine.tree.candidates import CandidateTree
from support.eagle import make_head
from support.models import VOCAB, tiny_llama

HEADS = 3
OPTIONS = {
    "fp32": BackboneOptions(dtype=torch.float32, kernels=Kernels.NATIVE, device="cpu"),
    "bf16": BackboneOptions(dtype=torch.bfloat16, kernels=Kernels.NATIVE, device="cpu"),
    "int8": BackboneOptions(quantization=Quantization.INT8, kernels=Kernels.NATIVE, device="cpu"),
}
# Of logits with a spread of about 5, after three blocks.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.15, "int8": 0.4}
SHAPES: list[dict[str, Any]] = [
    {"normalised": True},
    {"normalised": False, "matrix_residual": True},
    {"normalised": True, "own_projection": 20, "projection_bias": True},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hidden size 48: no multiple of the kernels' panels, nor of their groups of activations."""
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=OPTIONS)
def backbone(request: pytest.FixtureRequest, folder: Path) -> NativeBackbone:
    backbone, _ = load_backbone(folder, OPTIONS[request.param])
    assert isinstance(backbone, NativeBackbone)
    assert backbone.kind == request.param
    return backbone


def make(backbone: Backbone, **shape: Any) -> HydraHeads:
    torch.manual_seed(3)
    size = backbone.config.hidden_size
    heads = HydraHeads(HydraShape(hidden_size=size, num_heads=HEADS, num_blocks=3, **shape))
    for name, parameter in heads.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(name == "norm"), std=0.1)
    return heads.eval().requires_grad_(False)


def logits_of(heads: HydraHeads, backbone: Backbone, rows: int = 6) -> torch.Tensor:
    """[K, B, V] after the first of 6 random hidden states and tokens."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(6, backbone.config.hidden_size, generator=generator)[:rows]
    tokens = torch.randint(VOCAB, (6, HEADS), generator=generator)[:rows]
    return torch.stack(heads(hidden, backbone.embed(tokens), backbone.project))


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_heads_say_the_same(backbone: NativeBackbone, shape: dict[str, Any]) -> None:
    expected = logits_of(make(backbone, **shape), backbone)
    got = logits_of(pack_for_cpu(make(backbone, **shape), backbone), backbone)
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < TOLERANCE[backbone.kind]
    if backbone.kind == "int8":
        assert not torch.equal(got, expected), "int8 products were computed"


@pytest.mark.parametrize("shape", SHAPES)
def test_every_matrix_of_the_heads_is_packed(backbone: NativeBackbone, shape: dict[str, Any]) -> None:
    heads = make(backbone, **shape)
    packed = pack_for_cpu(heads, backbone)
    assert isinstance(packed, PackedHydraHeads)
    assert not any(isinstance(module, nn.Linear) for module in packed.modules())
    left = ["norm"] if shape["normalised"] else []
    assert [name for name, _ in packed.named_parameters()] == left
    assert heads.projection is None, "nothing is kept twice"
    assert packed.shares_projection == ("own_projection" not in shape)
    assert (packed.num_heads, packed.hidden_size) == (HEADS, backbone.config.hidden_size)
    for head in packed.heads:
        assert isinstance(head, HydraHead)
        assert len(head.blocks) == 2
        assert (head.residual is not None) == shape.get("matrix_residual", False)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_does_not_see_the_others(backbone: NativeBackbone, shape: dict[str, Any]) -> None:
    packed = pack_for_cpu(make(backbone, **shape), backbone)
    together = logits_of(packed, backbone)
    for rows in (1, 3):
        assert torch.equal(logits_of(packed, backbone, rows), together[:, :rows])


def test_inputs_may_lie_anywhere_in_memory(backbone: NativeBackbone) -> None:
    """One hidden state shared by the paths of a beam, and rows with others between them."""
    packed = pack_for_cpu(make(backbone, matrix_residual=True), backbone)
    hidden = torch.randn(1, backbone.config.hidden_size).expand(7, -1)
    conditions = torch.randn(7, 4 * backbone.config.hidden_size)[:, : 2 * backbone.config.hidden_size]
    expected = packed.features(1, hidden.contiguous(), conditions.contiguous())
    assert torch.equal(packed.features(1, hidden, conditions), expected)
    for row in range(7):
        assert torch.equal(packed.features(1, hidden[row], conditions[row]), expected[row])


@pytest.mark.parametrize("shape", SHAPES)
def test_half_precision_weights_are_packed_as_they_are(backbone: NativeBackbone, shape: dict[str, Any]) -> None:
    """A checkpoint in bfloat16 is the same heads as its widened copy."""
    narrow = make(backbone, **shape).bfloat16()
    wide = make(backbone, **shape)
    wide.load_state_dict(narrow.state_dict())
    packed = [pack_for_cpu(heads, backbone) for heads in (narrow, wide)]
    assert torch.equal(*(logits_of(heads, backbone) for heads in packed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduced", [True, False])
def test_one_call_drafts_what_the_packed_heads_guess(
    backbone: NativeBackbone, shape: dict[str, Any], reduced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = shape.get("own_projection")
    said = torch.arange(3, 3 + (own or 30)) if reduced else None
    shape = shape if reduced or own is None else shape | {"own_projection": VOCAB}
    packed = pack_for_cpu(make(backbone, **shape), backbone)
    project = backbone.project if said is None else backbone.project_to(said)
    options: dict[str, Any] = {"embed": backbone.embed, "draft_vocabulary": said}
    context = DraftContext(
        root_tokens=torch.tensor([4, 9]),
        hidden=torch.randn(2, backbone.config.hidden_size, generator=torch.Generator().manual_seed(1)),
        history=torch.tensor([[4], [9]]),
        history_lengths=torch.tensor([1, 1]),
        seeds=torch.tensor([0, 0]),
    )
    expected = HydraDrafter(packed, project=project, **options).propose(context, 20)
    drafter = HydraDrafter(packed, native=native_hydra(packed, backbone, said), **options)
    monkeypatch.delattr("gorgon_engine.drafters.hydra.likeliest_tree")
    tree = drafter.propose(context, 20)
    assert (tree.log_probs > -torch.inf).all()
    for name in ("tokens", "parents", "log_probs", "ranks"):
        assert torch.equal(getattr(tree, name), getattr(expected, name))


def test_heads_that_torch_runs_have_no_native_call(backbone: NativeBackbone) -> None:
    assert native_hydra(make(backbone), backbone, None) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_backbones_keep_torch_heads(folder: Path, dtype: torch.dtype) -> None:
    backbone, _ = load_backbone(folder, BackboneOptions(dtype=dtype, kernels=Kernels.TORCH, device="cpu"))
    heads = make(backbone, matrix_residual=True)
    modules = list(heads.modules())
    assert pack_for_cpu(heads, backbone) is heads
    assert list(heads.modules()) == modules
    assert native_hydra(heads, backbone, None) is None


class TestEagle:
    def head(self, backbone: Backbone) -> EagleHead:
        shape = EagleShape(backbone.config.hidden_size, 8, 2, 8, 96, rope_theta=500.0, num_heads=HEADS)
        return make_head(shape, std=0.1)

    def tree(self, drafter: EagleDrafter, backbone: Backbone) -> CandidateTree:
        """Of two texts of nine positions."""
        generator = torch.Generator().manual_seed(4)
        hidden = torch.randn(2, 9, backbone.config.hidden_size, generator=generator)
        tokens = torch.randint(VOCAB, (2, 10), generator=generator)
        slots, zeros = torch.tensor([1, 0]), torch.zeros(2, dtype=torch.int64)
        drafter = drafter.for_slots(2, 20)
        drafter.observe(Committed(slots, zeros, hidden, tokens[:, 1:], zeros + 9))
        return drafter.propose(DraftContext(tokens[:, -1], hidden[:, -1], tokens, zeros + 10, zeros, slots), 20)

    def test_every_matrix_is_packed_and_nothing_kept_twice(self, backbone: NativeBackbone) -> None:
        head = self.head(backbone)
        norms = {name: gain.clone() for name, gain in head.named_parameters() if name.endswith("norm")}
        packed = pack_eagle_for_cpu(head.bfloat16(), backbone)
        assert isinstance(packed, PackedEagleHead)
        assert packed.shape == head.shape
        assert not any(isinstance(module, nn.Linear) for module in (*packed.modules(), *head.modules()))
        left = dict(packed.named_parameters())
        assert left.keys() == norms.keys()
        for name, gain in norms.items():
            assert torch.equal(left[name], gain.bfloat16().float())
            assert not left[name].requires_grad

    @pytest.mark.parametrize("reduced", [True, False])
    def test_one_call_drafts_what_the_head_guesses(
        self, backbone: NativeBackbone, reduced: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        said = torch.arange(3, 40) if reduced else None
        project = backbone.project if said is None else backbone.project_to(said)
        options: dict[str, Any] = {"embed": backbone.embed, "draft_vocabulary": said}
        expected = self.tree(EagleDrafter(self.head(backbone), project=project, **options), backbone)
        packed = pack_eagle_for_cpu(self.head(backbone), backbone)
        drafter = EagleDrafter(packed, native=native_eagle(packed, backbone, said), **options)
        monkeypatch.delattr("gorgon_engine.drafters.eagle.likeliest_tree")
        tree = self.tree(drafter, backbone)
        assert (tree.log_probs > -torch.inf).all()
        if backbone.kind == "fp32":
            for name in ("tokens", "parents", "ranks"):
                assert torch.equal(getattr(tree, name), getattr(expected, name))
        tolerance = {"fp32": 1e-5, "bf16": 0.05, "int8": 0.1}[backbone.kind]
        torch.testing.assert_close(tree.log_probs, expected.log_probs, atol=tolerance, rtol=tolerance)
        if said is not None:
            assert torch.isin(tree.tokens, said).all()

    def test_what_torch_runs_has_no_native_call(self, backbone: NativeBackbone, folder: Path) -> None:
        head = self.head(backbone)
        assert native_eagle(head, backbone, None) is None
        in_torch, _ = load_backbone(folder, BackboneOptions(dtype=torch.float32, kernels=Kernels.TORCH, device="cpu"))
        assert pack_eagle_for_cpu(head, in_torch) is head
        assert native_eagle(pack_eagle_for_cpu(head, backbone), in_torch, None) is None

    def test_heads_too_wide_for_the_native_attention_are_run_by_torch(self, backbone: NativeBackbone) -> None:
        shape = EagleShape(backbone.config.hidden_size, 1, 1, 514, 8, num_heads=1)
        packed = pack_eagle_for_cpu(make_head(shape), backbone)
        assert native_eagle(packed, backbone, None) is None
        drafter = EagleDrafter(packed, embed=backbone.embed, project=backbone.project)
        assert (self.tree(drafter, backbone).log_probs[:, :8] > -torch.inf).all()
