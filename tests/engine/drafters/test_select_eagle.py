"""An eagle checkpoint from its folder to drafts: saved, loaded, served, refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.backbone.native_backbone import NativeBackbone
from gorgon_engine.backbone.select import BackboneOptions, Kernels, load_backbone
from gorgon_engine.drafters.eagle import EagleDrafter
from gorgon_engine.drafters.select import DrafterKind, HeadsTree, make_drafters
from gorgon_engine.engine import Engine, EngineConfig
from gorgon_engine.events import FinishedEvent, TokenEvent
from gorgon_engine.heads.checkpoint import read_heads, save_heads, verify_heads
from gorgon_engine.heads.eagle import EagleHead, EagleShape
from gorgon_engine.heads.families import expected_shapes, family_fields
from gorgon_engine.models.identity import backbone_identity
from gorgon_engine.models.loading import Quantization
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.sequence import SpeculationParams
from gorgon_protocol.errors import BadRequestError, HeadsError
from gorgon_protocol.manifest import BackboneReference, HeadsManifest
from support.eagle import make_head
from support.models import tiny_llama
from support.vocabularies import byte_level_bpe, save

VOCAB, SAID = 352, torch.arange(1, 352, 2)
SHAPE = EagleShape(48, 8, 2, 8, 96, rope_theta=500.0, num_heads=3)
OPTIONS = {
    "native fp32": BackboneOptions(dtype=torch.float32, kernels=Kernels.NATIVE, device="cpu"),
    "native int8": BackboneOptions(quantization=Quantization.INT8, kernels=Kernels.NATIVE, device="cpu"),
    "torch bf16": BackboneOptions(dtype=torch.bfloat16, kernels=Kernels.TORCH, device="cpu"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("eagle") / "tiny", vocab_size=VOCAB)
    return save(byte_level_bpe(), folder, bos="<|endoftext|>", eos="<|im_end|>")


def publish(
    place: Path,
    folder: Path,
    *,
    reduced: bool = True,
    dtype: str = "float32",
    shape: EagleShape = SHAPE,
    **values: Any,
) -> Path:
    head = make_head(shape)
    fields: dict[str, Any] = {
        "name": "tiny",
        "version": "1",
        "backbone": BackboneReference(identity=backbone_identity(folder), name="Tiny"),
        "vocab_size": VOCAB,
        "offsets": (2, 3, 4),
        "draft_vocab_size": SAID.numel() if reduced else None,
        "dtype": dtype,
        "quantization": "none",
    }
    manifest = HeadsManifest(**(fields | family_fields(head) | values))
    save_heads(place / "tiny@1", head, manifest, draft_vocabulary=SAID if reduced else None)
    return place / "tiny@1"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_is_loaded_as_it_was_saved(tmp_path: Path, folder: Path, dtype: str) -> None:
    checkpoint = publish(tmp_path, folder, dtype=dtype)
    manifest = verify_heads(checkpoint)
    assert (manifest.family, manifest.num_heads, manifest.num_blocks, manifest.tree_heads) == ("eagle", 3, 1, (0, 1, 2))
    loaded = read_heads(checkpoint)
    assert isinstance(loaded.heads, EagleHead)
    assert loaded.heads.shape == SHAPE
    assert not loaded.heads.training
    mine = dict(make_head(SHAPE).to(getattr(torch, dtype)).named_parameters())
    theirs = dict(loaded.heads.named_parameters())
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == expected_shapes(manifest)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    assert not any(tensor.requires_grad for tensor in theirs.values())


def test_a_head_of_another_shape_is_not_saved(tmp_path: Path, folder: Path) -> None:
    manifest = read_heads(publish(tmp_path, folder)).manifest
    other = make_head(EagleShape(48, 8, 4, 8, 96, num_heads=3))
    with pytest.raises(HeadsError, match="the manifest says"):
        save_heads(tmp_path / "other@1", other, manifest, draft_vocabulary=SAID)
    assert not (tmp_path / "other@1").exists()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("tree", [HeadsTree.DYNAMIC, HeadsTree.SPARSE])
def test_served_drafts_change_nothing(
    tmp_path: Path, folder: Path, options: BackboneOptions, reduced: bool, tree: HeadsTree
) -> None:
    checkpoint = publish(tmp_path, folder, reduced=reduced, accuracies=((0.5, 0.2), (0.4, 0.1), (0.3, 0.1)))
    config = EngineConfig(
        model=str(folder), backbone=options, heads=checkpoint, drafter=DrafterKind.HEADS, heads_tree=tree,
        adaptive=False, context=128, chunk_size=5,
    )  # fmt: skip
    engine = Engine.load(config)
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    answers, drafted = [], 0
    for speculate in (False, True):
        request = engine.request(list(range(60, 73)), sampling, SpeculationParams(enabled=speculate))
        events = list(engine.generate(request))
        answers.append([token for event in events if isinstance(event, TokenEvent) for token in event.token_ids])
        drafted = sum(event.metrics.num_draft_tokens for event in events if isinstance(event, FinishedEvent))
    assert drafted > 0
    if engine.backbone.row_invariant:
        assert answers[0] == answers[1]


def load(folder: Path, options: BackboneOptions) -> Backbone:
    return load_backbone(folder, options)[0]


def test_matrices_are_packed_where_the_backbones_are(tmp_path: Path, folder: Path) -> None:
    checkpoint = publish(tmp_path, folder)
    for options in OPTIONS.values():
        backbone = load(folder, options)
        (drafter,), _ = make_drafters(DrafterKind.HEADS, checkpoint, backbone=backbone, folder=folder)
        assert isinstance(drafter, EagleDrafter)
        assert (drafter._native is None) == (not isinstance(backbone, NativeBackbone))
        head = drafter._network.head
        assert not isinstance(backbone, NativeBackbone) or not any(
            isinstance(module, torch.nn.Linear) for module in head.modules()
        )
        assert all(parameter.dtype == torch.float32 for parameter in head.parameters())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    ("shape", "num_drafted"),
    [
        # In rows of 48: 96 of fc, 32 of q, k and v, 16 of o, 6 of the MLP.
        (EagleShape(48, 2, 1, 8, 2, num_heads=3), 150),
        (SHAPE, SAID.numel()),
    ],
    ids=["small layer", "large layer"],
)
def test_the_projection_is_no_larger_than_the_layer(
    tmp_path: Path, folder: Path, options: BackboneOptions, shape: EagleShape, num_drafted: int
) -> None:
    checkpoint = publish(tmp_path, folder, shape=shape)
    backbone = load(folder, options)
    (drafter,), _ = make_drafters(DrafterKind.HEADS, checkpoint, backbone=backbone, folder=folder)
    assert isinstance(drafter, EagleDrafter)
    drafted = drafter._network.draft_vocabulary
    assert drafted is not None
    assert torch.equal(drafted, SAID[:num_drafted])
    if drafter._native is not None:
        assert drafter._native.vocab_size == drafted.numel()


@pytest.mark.parametrize("tree", list(HeadsTree))
def test_drawn_drafts_are_refused(tmp_path: Path, folder: Path, tree: HeadsTree) -> None:
    checkpoint = publish(tmp_path, folder, accuracies=((0.5,), (0.4,), (0.3,)))
    backbone = load(folder, OPTIONS["native fp32"])
    with pytest.raises(BadRequestError, match="need heads of the medusa family: these are eagle heads"):
        make_drafters(DrafterKind.HEADS, checkpoint, backbone=backbone, folder=folder, tree=tree, draw=True)
