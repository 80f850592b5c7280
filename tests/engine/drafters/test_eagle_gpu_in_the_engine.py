"""The GPU's EAGLE drafter at work in the engine: beside the one in tensor operations at every step, and from the
choice of drafters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.backbone.select import BackboneOptions, Kernels, load_backbone
from gorgon_engine.drafters import eagle_gpu
from gorgon_engine.drafters.eagle import EagleDrafter
from gorgon_engine.drafters.eagle_gpu import drafter_of, profitable_depths
from gorgon_engine.drafters.select import _eagle_drafter, served_quantization
from gorgon_engine.heads.eagle import EagleShape
from gorgon_engine.kernels.triton.products import Nf4Product
from gorgon_engine.tree.builders import RankPath
from support.eagle import make_head
from support.engines import tiny_folder
from support.triton_checks import run_check

IN_THE_ENGINE = """
from pathlib import Path

from gorgon_engine.backbone.select import BackboneOptions, Kernels, load_backbone
from gorgon_engine.drafters.beam import BeamLimits
from gorgon_engine.drafters.eagle import EagleDrafter
from gorgon_engine.drafters.eagle_gpu import EagleGpuDrafter, refusal
from gorgon_engine.drafters.select import eagle_on_gpu
from gorgon_engine.engine import Engine, EngineConfig
from gorgon_engine.events import FinishedEvent, TokenEvent
from gorgon_engine.heads.eagle import EagleHead, EagleShape
from gorgon_engine.models.loading import Quantization
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.sequence import SpeculationParams
from gorgon_engine.tokenizer import Tokenizer
from gorgon_engine.tree.candidates import CandidateTree

folder = Path({folder!r})
dtype, tolerance = (torch.float16, 3e-2) if device == "cuda" else (torch.float32, 1e-3)
options = BackboneOptions(quantization=Quantization.NONE, dtype=dtype, kernels=Kernels.TORCH, device=device)
backbone = load_backbone(folder, options)[0]
said = torch.arange(1, 352, 2, device=device)


def make_head(dtype, num_heads=3):
    generator = torch.Generator().manual_seed(1)
    head = EagleHead(EagleShape(48, 2, 1, 64, 96, rope_theta=500.0, num_heads=num_heads))
    for name, parameter in head.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(name.endswith("norm")), std=0.2, generator=generator)
    return head.requires_grad_(False).to(device, dtype)


class Twins:
    # What the one drafts is checked against the other.
    name, is_costly = "head", True

    def __init__(self, pair):
        self.pair, self.num_checked = pair, 0

    def for_slots(self, num_slots, num_positions):
        return Twins([drafter.for_slots(num_slots, num_positions) for drafter in self.pair])

    def observe(self, committed):
        for drafter in self.pair:
            drafter.observe(committed)

    def propose(self, context, max_nodes):
        want, got = (drafter.propose(context, max_nodes) for drafter in self.pair)
        torch.testing.assert_close(got.log_probs, want.log_probs, atol=tolerance, rtol=tolerance)
        self.num_checked += 1
        return got


assert refusal(make_head(dtype), backbone) is None
accuracies = ((0.6, 0.2), (0.6, 0.2), (0.1, 0.1))
fast = eagle_on_gpu(make_head(dtype), backbone, said, accuracies)
assert isinstance(fast, EagleGpuDrafter)
assert fast.num_depths == 2, fast.num_depths
slow = EagleDrafter(
    make_head(torch.float32, num_heads=2), embed=backbone.embed, draft_vocabulary=said,
    project=lambda x: backbone.project_to(said)(x.to(dtype)), limits=BeamLimits(num_choices=8, width=8),
)


class SomeOfTheFuture:
    # One to three right tokens: steps that commit different numbers of rows.
    name, is_costly = "oracle", False

    def __init__(self, texts):
        self.texts = texts

    def propose(self, context, max_nodes):
        tokens = torch.full((len(context.root_tokens), max_nodes), -1)
        for row, length in enumerate(context.history_lengths.tolist()):
            history = context.history[row, :length].tolist()
            text = next(text for text in self.texts if text[:length] == history[: len(text)])
            guess = text[length : length + 1 + length % 3][:max_nodes]
            tokens[row, : len(guess)] = torch.tensor(guess)
        tokens = tokens.to(device)
        places = torch.arange(max_nodes, device=device)
        log_probs = torch.where(tokens < 0, -torch.inf, -0.01 * (places + 1))
        return CandidateTree(
            tokens.clamp(min=0), (places - 1).expand_as(tokens), log_probs, torch.zeros_like(tokens), source=self.name
        )


def answers(drafters, speculate):
    config = EngineConfig(max_nodes=8, adaptive=False, num_slots=2, context=64, chunk_size=6)
    engine = Engine(backbone=backbone, tokenizer=Tokenizer.from_folder(folder), drafters=drafters, config=config)
    requests = [
        engine.request(prompt, SamplingParams(max_tokens=limit, ignore_eos=True), SpeculationParams(enabled=speculate))
        for prompt, limit in zip(prompts, (9, 4, 7), strict=True)
    ]
    tokens, accepted = {request.id: [] for request in requests}, 0
    for event in engine.generate(*requests):
        if isinstance(event, TokenEvent):
            tokens[event.request_id] += event.token_ids
        elif isinstance(event, FinishedEvent):
            accepted += event.metrics.num_accepted_draft_tokens
    return list(tokens.values()), accepted, engine


prompts = [[70, 71, 72, 70, 71, 72, 70], [5], list(range(100, 114))]
plain, _, _ = answers([], False)
texts = [prompt + answer for prompt, answer in zip(prompts, plain, strict=True)]
if device == "cpu":  # on a GPU torch's products depend on the number of rows: there may be another text
    speculative, accepted, engine = answers([Twins([slow, fast]), SomeOfTheFuture(texts)], True)
    assert speculative == plain
    assert accepted >= 8, "rows of more than one position were told"
else:
    _, _, engine = answers([Twins([slow, fast])], True)
twins = engine._step.drafters[0]
assert twins.num_checked > 4
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("eagle") / "tiny")


def test_it_drafts_what_the_tensor_operations_draft(folder: Path) -> None:
    run_check(IN_THE_ENGINE.replace("{folder!r}", repr(str(folder))))


class OnAGpu:
    """A backbone that says that it is on a GPU."""

    device = torch.device("cuda")

    def __init__(self, backbone: Backbone, kernels: str = "torch-none") -> None:
        self._backbone = backbone
        self.kernels = kernels

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    options = BackboneOptions(dtype=torch.float32, kernels=Kernels.TORCH, device="cpu")
    return load_backbone(folder, options)[0]


@pytest.mark.parametrize(
    ("head_dim", "paths", "reason"),
    [
        (8, None, "its head dim is 8, and the kernels know 64 and 128"),
        (64, None, "not torch.float32"),
        (64, [(0,), (1,)], "a fixed tree is followed"),
    ],
)
def test_what_the_kernels_cannot_run_is_said(
    backbone: Backbone, head_dim: int, paths: list[RankPath] | None, reason: str
) -> None:
    head = make_head(EagleShape(48, 2, 1, head_dim, 96, num_heads=2))
    drafter, notices = _eagle_drafter(head, OnAGpu(backbone), None, paths, None)
    assert isinstance(drafter, EagleDrafter)
    (notice,) = notices
    assert notice.startswith("the heads draft by tensor operations, several times slower than the GPU's kernels: ")
    assert reason in notice
    assert "\n" not in notice


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [
        ("native-int8", "int8"),
        ("torch-nf4", "nf4"),
        ("triton-nf4-gluon", "nf4"),
        ("triton-nf4", "nf4"),
        ("triton-bfloat16", "none"),
    ],
)
def test_the_quantisation_is_in_the_name_of_the_kernels(backbone: Backbone, kernels: str, expected: str) -> None:
    assert served_quantization(OnAGpu(backbone, kernels)) == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [(None, list(range(100))), (torch.arange(1, 352, 2), list(range(1, 200, 2))), (torch.tensor([4, 9]), [4, 9])],
    ids=["all tokens", "a large vocabulary", "a small one"],
)
def test_the_most_frequent_tokens_are_drafted(
    backbone: Backbone, said: Tensor | None, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eagle_gpu, "_MAX_DRAFT_TOKENS", 100)
    head = make_head(EagleShape(48, 2, 1, 64, 96, num_heads=4))
    drafter = drafter_of(head, backbone, said, four_bit=True, num_depths=3)
    assert drafter._vocabulary is not None
    assert drafter._vocabulary.tolist() == expected
    assert drafter._vocab_size == len(expected)
    assert drafter.num_depths == 3
    products = drafter._layer.products
    # Inputs of 48 and 96 are no multiples of 64, those of 128 are: of two heads of 64.
    assert [isinstance(product, Nf4Product) for product in products] == [False, False, True, False, False, False]
    assert drafter._layer.is_four_bit
    assert drafter._layer.num_bytes > 0


def test_it_goes_as_deep_as_it_pays() -> None:
    always, never = ((1.0,),) * 8, ((0.0, 0.0),) * 8
    assert profitable_depths(always, pass_share=0.05) == 8
    assert profitable_depths(never, pass_share=0.05) == 1
    shipped = ((0.56, 0.10, 0.05, 0.03),) * 8
    depths = [profitable_depths(shipped, pass_share=share) for share in (0.001, 0.05, 0.2, 1.0)]
    assert depths == sorted(depths, reverse=True)
    assert depths[0] == 8
    assert 4 <= depths[1] <= 7
    assert depths[3] == 1
    assert profitable_depths(((0.9, 0.9), (0.0,)), pass_share=0.05) == 1, "more than all is all"
