"""From options to drafters, on a real backbone and real checkpoint folders; and heads in the step: still exact."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from gorgon_engine.acceptance import AcceptanceRule
from gorgon_engine.backbone.base import Backbone
from gorgon_engine.backbone.select import BackboneOptions, Kernels, load_backbone
from gorgon_engine.drafters import select
from gorgon_engine.drafters.base import DraftContext, Drafter
from gorgon_engine.drafters.heads import HeadsDrafter
from gorgon_engine.drafters.hydra import HydraDrafter
from gorgon_engine.drafters.ngram import NgramDrafter
from gorgon_engine.drafters.select import DrafterKind, HeadsTree, make_drafters
from gorgon_engine.heads.bundled import bundled_heads
from gorgon_engine.heads.checkpoint import load_heads, save_heads
from gorgon_engine.heads.families import family_fields
from gorgon_engine.heads.hydra import HydraHeads, HydraShape
from gorgon_engine.heads.medusa import MedusaHeads
from gorgon_engine.heads.native import pack_for_cpu
from gorgon_engine.kv_cache import KVCache
from gorgon_engine.models.identity import backbone_identity
from gorgon_engine.models.loading import Quantization
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.step import SpeculativeStep, Wanted
from gorgon_protocol.errors import BadRequestError, HeadsError
from gorgon_protocol.manifest import BackboneReference, HeadsManifest
from support.models import VOCAB, tiny_llama
from support.steps import prefill

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return load_backbone(folder, BackboneOptions(dtype=torch.float32, kernels=Kernels.TORCH, device="cpu"))[0]


def publish(store: Path, folder: Path, backbone: Backbone, *, filled: bool = True, **values: Any) -> Path:
    """Heads of the tiny backbone, untrained (`filled=False`: they pass the hidden state through)."""
    offsets = values.get("offsets", (1, 2, 3, 4))
    torch.manual_seed(7)
    heads = MedusaHeads(backbone.config.hidden_size, num_heads=len(offsets))
    if filled:
        for parameter in heads.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    fields: dict[str, Any] = {
        "name": "tiny",
        "version": "1",
        "backbone": BackboneReference(identity=backbone_identity(folder), name="Tiny"),
        "hidden_size": backbone.config.hidden_size,
        "vocab_size": VOCAB,
        "num_heads": len(offsets),
        "offsets": offsets,
        "num_blocks": 1,
        "projection": "shared",
        "dtype": "float32",
        "quantization": "none",
    }
    manifest = HeadsManifest(**(fields | values))
    save_heads(store / "tiny@1", heads, manifest)
    (store / "latest").write_text("tiny@1\n")
    return store / "tiny@1"


def make(heads: Path | None, backbone: Backbone, folder: Path, kind: DrafterKind | None = DrafterKind.HEADS,
         **options: Any) -> tuple[list[Drafter], list[str]]:  # fmt: skip
    return make_drafters(kind, heads, backbone=backbone, folder=folder, **options)


def make_context(backbone: Backbone, batch: int = 2) -> DraftContext:
    history = torch.randint(VOCAB, (batch, 16), generator=torch.Generator().manual_seed(1))
    return DraftContext(
        root_tokens=history[:, -1],
        hidden=torch.randn(batch, backbone.config.hidden_size, generator=torch.Generator().manual_seed(2)),
        history=history,
        history_lengths=torch.full((batch,), 16),
        seeds=torch.arange(batch),
    )


@pytest.mark.parametrize(
    ("kind", "with_heads", "names"),
    [
        (None, False, ["lookup"]),
        (None, True, ["head", "lookup"]),
        (DrafterKind.BOTH, True, ["head", "lookup"]),
        (DrafterKind.HEADS, True, ["head"]),
        (DrafterKind.NGRAM, False, ["lookup"]),
        (DrafterKind.NONE, False, []),
    ],
)
def test_every_choice_makes_its_drafters(
    tmp_path: Path, backbone: Backbone, folder: Path, kind: DrafterKind | None, with_heads: bool, names: list[str]
) -> None:
    heads = publish(tmp_path, folder, backbone) if with_heads else None
    drafters, notices = make(heads, backbone, folder, kind)
    assert [drafter.name for drafter in drafters] == names
    assert notices == []


@pytest.mark.parametrize("kind", [DrafterKind.HEADS, DrafterKind.BOTH])
def test_heads_that_are_wanted_must_be_given(backbone: Backbone, folder: Path, kind: DrafterKind) -> None:
    message = f"drafter {kind} needs trained heads, and none come with the program for this model: give their folder"
    with pytest.raises(BadRequestError, match=message):
        make(None, backbone, folder, kind)


def test_heads_that_are_not_used_are_mentioned(tmp_path: Path, backbone: Backbone, folder: Path) -> None:
    heads = publish(tmp_path, folder, backbone)
    drafters, notices = make(heads, backbone, folder, DrafterKind.NONE)
    assert drafters == []
    assert notices == [f"heads {heads} are not used: the drafter is none"]


def test_a_store_of_the_backbone_will_do(tmp_path: Path, backbone: Backbone, folder: Path) -> None:
    publish(tmp_path, folder, backbone)
    assert len(make(tmp_path, backbone, folder)[0]) == 1


def test_another_quantisation_is_said(tmp_path: Path, backbone: Backbone, folder: Path) -> None:
    heads = publish(tmp_path, folder, backbone, quantization="nf4")
    (notice,) = make(heads, backbone, folder)[1]
    assert "trained on the backbone in nf4" in notice
    native = load_backbone(folder, BackboneOptions())[0]  # int8
    (notice,) = make(heads, native, folder)[1]
    assert "it is served in int8" in notice


def test_the_head_of_the_next_token_is_left_out(tmp_path: Path, backbone: Backbone, folder: Path) -> None:
    """Depth d is the choice of the head with offset d + 1, whatever place it has."""
    context = make_context(backbone)
    full = publish(tmp_path / "a", folder, backbone, offsets=(1, 2, 3, 4))
    (drafter,), _ = make(full, backbone, folder)
    torch.manual_seed(7)
    heads = MedusaHeads(backbone.config.hidden_size, num_heads=4)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        logits = heads(context.hidden, backbone.project)
    tree = drafter.propose(context, 60)
    depth = torch.zeros_like(tree.parents)
    for node in range(60):
        parent = tree.parents[:, node : node + 1]
        depth[:, node] = torch.where(parent < 0, 0, depth.gather(1, parent.clamp(min=0)) + 1)[:, 0]
    for row in range(2):
        for d in range(3):
            first = tree.tokens[row][(depth[row] == d) & (tree.ranks[row] == 0)]
            assert len(first) > 0
            assert (first == logits[row, d + 1].argmax()).all()


def test_heads_without_a_second_offset_cannot_draft(tmp_path: Path, backbone: Backbone, folder: Path) -> None:
    heads = publish(tmp_path, folder, backbone, offsets=(1, 3))
    with pytest.raises(HeadsError, match=r"predict offsets \[1, 3\]: without offset 2 nothing continues"):
        make(heads, backbone, folder)


def test_heads_of_another_backbone_are_refused(tmp_path: Path, backbone: Backbone, folder: Path) -> None:
    heads = publish(tmp_path / "store", folder, backbone)
    other = tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(HeadsError, match="heads of another backbone"):
        make(heads, backbone, other)


@pytest.mark.parametrize("draw", [False, True])
@pytest.mark.parametrize(
    ("tree", "values", "first"),
    [
        (HeadsTree.CARTESIAN, {}, [(0,), (1,), (2,), (3,), (0, 0)]),
        (HeadsTree.SPARSE, {"recommended_tree": ((0,), (0, 0), (1,))}, [(0,), (0, 0), (1,)]),
        # Ranks of head 1 (offset 2) and later; the first row belongs to the root.
        (HeadsTree.SPARSE, {"accuracies": ((0.9, 0.0), (0.5, 0.2), (0.5, 0.1), (0.4, 0.1))},
         [(0,), (0, 0), (1,), (1, 0), (0, 0, 0)]),
    ],
)  # fmt: skip
def test_fixed_trees(
    tmp_path: Path,
    backbone: Backbone,
    folder: Path,
    draw: bool,
    tree: HeadsTree,
    values: dict[str, Any],
    first: list[tuple[int, ...]],
) -> None:
    heads = publish(tmp_path, folder, backbone, **values)
    (drafter,), _ = make(heads, backbone, folder, tree=tree, draw=draw)
    forest = drafter.propose(make_context(backbone), 127)
    paths: list[tuple[int, ...]] = []
    for parent, rank in zip(forest.parents[0].tolist(), forest.ranks[0].tolist(), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), rank))
    assert paths[: len(first)] == first
    assert (forest.draft_probs is not None) == draw


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (DrafterKind.HEADS, {"tree": HeadsTree.SPARSE}, "carry neither accuracies nor a recommended tree"),
        (DrafterKind.HEADS, {"draw": True}, r"need a fixed tree \(sparse or cartesian\)"),
        (DrafterKind.BOTH, {"draw": True, "tree": HeadsTree.CARTESIAN}, "choose the drafter heads"),
    ],
)
def test_options_that_exclude_each_other(
    tmp_path: Path, backbone: Backbone, folder: Path, kind: DrafterKind, options: dict[str, Any], message: str
) -> None:
    heads = publish(tmp_path, folder, backbone)
    with pytest.raises(BadRequestError, match=message):
        make(heads, backbone, folder, kind, **options)


@pytest.mark.parametrize("tree", list(HeadsTree))
@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=0.8, seed=3)])
def test_speculation_with_heads_says_what_plain_decoding_says(
    tmp_path: Path, folder: Path, tree: HeadsTree, sampling: SamplingParams
) -> None:
    native = load_backbone(folder, BackboneOptions(dtype=torch.float32, kernels=Kernels.NATIVE))[0]
    accuracies = ((0.9,), (0.5,), (0.4,), (0.3,))
    heads = publish(tmp_path, folder, native, filled=False, accuracies=accuracies)
    drafters, _ = make(heads, native, folder, tree=tree)
    plain, _ = decode(native, [], sampling)
    drafted, num_accepted = decode(native, drafters, sampling)
    assert drafted == plain
    assert num_accepted > 0 or sampling.temperature > 0


def decode(backbone: Backbone, drafters: list[Drafter], sampling: SamplingParams) -> tuple[list[int], int]:
    """32 tokens after a fixed prompt, and how many of them were accepted drafts."""
    config = backbone.config
    cache = KVCache(
        num_layers=config.num_layers,
        num_slots=1,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        capacity=128,
        max_scratch=32,
        dtype=backbone.cache_dtype,
        device=CPU,
    )
    step = SpeculativeStep(backbone, cache, drafters, max_nodes=16, max_depth=8)
    wanted = Wanted(draft=bool(drafters))
    prompt = [5, 9, 33, 9, 5, 60]
    result = prefill(step, prompt, sampling, chunk=8, wanted=wanted)
    tokens, accepted = list(result.tokens[0]), 0
    while len(tokens) < 32:
        nodes = 1 + sum(p > 0 for p in result.path_probs[0])
        length = len(prompt) + len(tokens)
        result = step.run(result.batch, [nodes], max_length=length, rule=AcceptanceRule.LOSSLESS, wanted=wanted)
        tokens += result.tokens[0]
        accepted += len(result.tokens[0]) - 1
    return tokens[:32], accepted


def publish_hydra(store: Path, folder: Path, backbone: Backbone, *, reduced: bool = True, **values: Any) -> Path:
    """Random hydra heads of the tiny backbone, with or without a reduced drafting vocabulary; the folder in a store."""
    torch.manual_seed(8)
    heads = HydraHeads(HydraShape(hidden_size=backbone.config.hidden_size, num_heads=3, num_blocks=2))
    for name, parameter in heads.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(name == "norm"), std=0.2)
    said = torch.arange(1, VOCAB, 2) if reduced else None
    fields: dict[str, Any] = {
        "name": "chain",
        "version": "1",
        "backbone": BackboneReference(identity=backbone_identity(folder), name="Tiny"),
        "vocab_size": backbone.config.vocab_size,
        "offsets": (2, 3, 4),
        "draft_vocab_size": None if said is None else said.numel(),
        "dtype": "float32",
        "quantization": "none",
    }
    manifest = HeadsManifest(**(fields | family_fields(heads) | values))
    save_heads(store / "tiny" / "chain@1", heads, manifest, draft_vocabulary=said)
    (store / "tiny" / "latest").write_text("chain@1\n")
    return store / "tiny"


class TestHydra:
    native = (
        BackboneOptions(dtype=torch.float32, kernels=Kernels.NATIVE, device="cpu"),
        BackboneOptions(quantization=Quantization.INT8, kernels=Kernels.NATIVE, device="cpu"),
    )
    portable = (
        BackboneOptions(dtype=torch.float32, kernels=Kernels.TORCH, device="cpu"),
        BackboneOptions(dtype=torch.bfloat16, kernels=Kernels.TORCH, device="cpu"),
        BackboneOptions(quantization=Quantization.INT8, kernels=Kernels.TORCH, device="cpu"),
    )

    @pytest.mark.parametrize("reduced", [True, False])
    @pytest.mark.parametrize("options", native + portable)
    def test_heads_run_as_the_backbone_does(
        self, tmp_path: Path, folder: Path, options: BackboneOptions, reduced: bool
    ) -> None:
        """On native kernels in the backbone's packed precision, to the bit; elsewhere in torch's float32."""
        served, _ = load_backbone(folder, options)
        heads = publish_hydra(tmp_path, folder, served, reduced=reduced)
        (drafter,), _ = make(heads, served, folder)
        loaded = load_heads(heads / "chain@1", backbone_identity=backbone_identity(folder), config=served.config,
                            quantization="none", device=CPU, dtype=torch.float32)  # fmt: skip
        assert isinstance(loaded.heads, HydraHeads)
        said = loaded.draft_vocabulary
        unpacked = HydraHeads(loaded.heads.shape)
        unpacked.load_state_dict(loaded.heads.state_dict())
        trees = []
        for heads_as_run in (pack_for_cpu(loaded.heads, served), unpacked):
            expected = HydraDrafter(
                heads_as_run.requires_grad_(False),
                embed=served.embed,
                project=served.project if said is None else served.project_to(said),
                draft_vocabulary=said,
                limits=select._CPU_LIMITS,
            )
            trees.append(expected.propose(make_context(served), 15))
        tree = drafter.propose(make_context(served), 15)
        for name in ("tokens", "parents", "ranks", "log_probs"):
            assert torch.equal(getattr(tree, name), getattr(trees[0], name))
        in_torch = options.kernels is Kernels.TORCH
        assert torch.equal(tree.log_probs, trees[1].log_probs) == in_torch, "packed where the backbone is"
        first, unpacked_first = (forest.log_probs[:, 0] for forest in (tree, trees[1]))
        torch.testing.assert_close(first, unpacked_first, atol=0.2, rtol=0.0)
        if said is not None:
            assert torch.isin(tree.tokens[tree.log_probs > -torch.inf], said).all()

    @pytest.mark.parametrize(
        ("tree", "values", "paths"),
        [
            (HeadsTree.CARTESIAN, {}, [(0,), (1,), (2,), (3,), (0, 0), (0, 1)]),
            (HeadsTree.SPARSE, {"recommended_tree": ((1,), (1, 0), (0,))}, [(1,), (1, 0), (0,)]),
            # All of its heads are of the tree: none repeats the root.
            (HeadsTree.SPARSE, {"accuracies": ((0.5, 0.2), (0.5, 0.1), (0.6, 0.1))},
             [(0,), (0, 0), (1,), (0, 0, 0), (1, 0)]),
        ],
    )  # fmt: skip
    def test_fixed_trees(
        self,
        tmp_path: Path,
        backbone: Backbone,
        folder: Path,
        tree: HeadsTree,
        values: dict[str, Any],
        paths: list[tuple[int, ...]],
    ) -> None:
        heads = publish_hydra(tmp_path, folder, backbone, **values)
        (drafter,), _ = make(heads, backbone, folder, tree=tree)
        forest = drafter.propose(make_context(backbone), 127)
        got: list[tuple[int, ...]] = []
        for parent, rank in zip(forest.parents[0].tolist(), forest.ranks[0].tolist(), strict=True):
            got.append((*(got[parent] if parent >= 0 else ()), rank))
        assert got[: len(paths)] == paths

    @pytest.mark.parametrize("tree", list(HeadsTree))
    def test_drawn_drafts_are_refused(self, tmp_path: Path, backbone: Backbone, folder: Path, tree: HeadsTree) -> None:
        heads = publish_hydra(tmp_path, folder, backbone, accuracies=((0.5,), (0.4,), (0.3,)))
        with pytest.raises(BadRequestError, match="need heads of the medusa family: these are hydra heads"):
            make(heads, backbone, folder, tree=tree, draw=True)

    @pytest.mark.parametrize("tree", list(HeadsTree))
    @pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=0.8, seed=3)])
    @pytest.mark.parametrize("options", native)
    def test_speculation_says_what_plain_decoding_says(
        self, tmp_path: Path, folder: Path, options: BackboneOptions, tree: HeadsTree, sampling: SamplingParams
    ) -> None:
        native, _ = load_backbone(folder, options)
        heads = publish_hydra(tmp_path, folder, native, accuracies=((0.5,), (0.4,), (0.3,)))
        drafters, _ = make(heads, native, folder, DrafterKind.BOTH, tree=tree)
        assert decode(native, drafters, sampling)[0] == decode(native, [], sampling)[0]


class TestBundled:
    """Heads that come with the program serve where nobody chose others."""

    @pytest.fixture
    def store(self, tmp_path: Path, folder: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> Path:
        store = tmp_path / "bundled"
        publish_hydra(store, folder, backbone, quantization="nf4")
        monkeypatch.setattr(select, "bundled_heads", partial(bundled_heads, store=store))
        return store

    @pytest.mark.parametrize(
        ("kind", "names"),
        [
            (None, ["head", "lookup"]),
            (DrafterKind.BOTH, ["head", "lookup"]),
            (DrafterKind.HEADS, ["head"]),
            (DrafterKind.NGRAM, ["lookup"]),
            (DrafterKind.NONE, []),
        ],
    )
    @pytest.mark.usefixtures("store")
    def test_who_guesses(self, backbone: Backbone, folder: Path, kind: DrafterKind | None, names: list[str]) -> None:
        """They were trained in NF4 and are served in float32: nothing to say about what nobody chose."""
        drafters, notices = make(None, backbone, folder, kind)
        assert [drafter.name for drafter in drafters] == names
        assert ("head" in names) == any(isinstance(drafter, HydraDrafter) for drafter in drafters)
        assert notices == []

    def test_chosen_heads_go_first_and_their_precision_is_said(
        self, store: Path, tmp_path: Path, backbone: Backbone, folder: Path
    ) -> None:
        own = publish(tmp_path / "own", folder, backbone)
        drafters, notices = make(own, backbone, folder, None)
        assert [type(drafter) for drafter in drafters] == [HeadsDrafter, NgramDrafter]
        assert notices == []
        # The very same folder: a choice, and so a notice.
        _, notices = make(store / "tiny", backbone, folder, None)
        assert notices == [
            "heads chain@1 were trained on the backbone in nf4 and it is served in its own precision: the output is "
            "exact all the same, acceptance may differ"
        ]

    @pytest.mark.usefixtures("store")
    def test_another_backbone_has_none(self, tmp_path: Path) -> None:
        folder = tiny_llama(tmp_path / "other", seed=1)
        other, _ = load_backbone(folder, BackboneOptions(dtype=torch.float32, kernels=Kernels.TORCH, device="cpu"))
        assert [drafter.name for drafter in make(None, other, folder, None)[0]] == ["lookup"]
        with pytest.raises(BadRequestError, match="none come with the program for this model"):
            make(None, other, folder, DrafterKind.HEADS)

    @pytest.mark.parametrize("damage", ["latest", "weights"])
    def test_damage_is_said_where_they_would_serve(
        self, store: Path, backbone: Backbone, folder: Path, damage: str
    ) -> None:
        if damage == "latest":
            (store / "tiny" / "latest").write_text("chain@2\n")
        else:
            weights = store / "tiny" / "chain@1" / "heads.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
        for kind in (None, DrafterKind.HEADS, DrafterKind.BOTH):
            with pytest.raises(HeadsError, match="chain@"):
                make(None, backbone, folder, kind)
        for kind in (DrafterKind.NGRAM, DrafterKind.NONE):
            make(None, backbone, folder, kind)
