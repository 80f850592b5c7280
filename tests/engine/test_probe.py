"""What the heads say, against transformers' forward pass and the heads' published formulas."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.backbone.select import BackboneOptions, Kernels, load_backbone
from gorgon_engine.drafters.select import load_heads_for
from gorgon_engine.heads.checkpoint import LoadedHeads, save_heads
from gorgon_engine.heads.eagle import EagleHead, EagleShape
from gorgon_engine.heads.families import DraftHeads, family_fields
from gorgon_engine.heads.hydra import HydraHeads, HydraShape
from gorgon_engine.heads.medusa import MedusaHeads
from gorgon_engine.models.identity import backbone_identity
from gorgon_engine.probe import HeadProbe, probe
from gorgon_protocol.errors import BadRequestError, ContextLengthError, GorgonError
from gorgon_protocol.manifest import BackboneReference, HeadsManifest
from support.eagle import make_head, predict
from support.models import VOCAB, tiny_llama

HIDDEN = 48
PROMPT = [5, 17, 3, 40, 8]  # the next token is no near-tie
PART = torch.arange(2, VOCAB, 3)  # tokens that can be drafted, where not all can


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"), max_positions=700)


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return load_backbone(folder, BackboneOptions(dtype=torch.float32, kernels=Kernels.TORCH, device="cpu"))[0]


@pytest.fixture(scope="module")
def reference(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def randomised(heads: DraftHeads) -> DraftHeads:
    torch.manual_seed(11)
    for name, parameter in heads.named_parameters():
        if name != "norm":
            nn.init.normal_(parameter, std=0.3)
    return heads


def publish(folder: Path, backbone: Backbone, place: Path, heads: DraftHeads, offsets: tuple[int, ...],
            vocabulary: Tensor | None = None) -> LoadedHeads:  # fmt: skip
    """The heads saved, and loaded again the way that an engine does."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "version": "1",
        "backbone": BackboneReference(identity=backbone_identity(folder), name="Tiny"),
        "vocab_size": VOCAB,
        "offsets": offsets,
        "draft_vocab_size": None if vocabulary is None else vocabulary.numel(),
        "dtype": "float32",
        "quantization": "none",
    }
    manifest = HeadsManifest(**(fields | family_fields(heads)))
    save_heads(place / "tiny@1", heads, manifest, draft_vocabulary=vocabulary)
    return load_heads_for(backbone, folder, place / "tiny@1")


def last_hidden(reference: LlamaForCausalLM, token_ids: list[int]) -> Tensor:
    with torch.no_grad():
        return reference.model(torch.tensor([token_ids])).last_hidden_state[0, -1]  # [C]


def check(probed: HeadProbe, logits: Tensor, vocabulary: Tensor | None = None) -> None:
    """The likeliest tokens of logits [V] with their probabilities, best first."""
    best, places = torch.softmax(logits, dim=0).topk(len(probed.top))
    tokens = places if vocabulary is None else vocabulary[places]
    assert [guess.token_id for guess in probed.top] == tokens.tolist()
    assert [guess.probability for guess in probed.top] == pytest.approx(best.tolist(), rel=1e-3)


def medusa_logits(heads: MedusaHeads, reference: LlamaForCausalLM, hidden: Tensor, number: int) -> Tensor:
    """Medusa, section 2.1, head by head."""
    x = hidden
    for block in range(heads.num_blocks):
        x = x + nn.functional.silu(heads.weight[number, block] @ x + heads.bias[number, block])
    return reference.lm_head(x) if heads.projection is None else heads.projection[number] @ x


@pytest.mark.parametrize("offsets", [(1, 2, 3), (2, 3, 4), (2, 5, 6)])
@pytest.mark.parametrize("own", [False, True])
def test_medusa_heads_read_the_last_hidden_state(
    folder: Path, backbone: Backbone, reference: LlamaForCausalLM, tmp_path: Path, offsets: tuple[int, ...], own: bool
) -> None:
    lm_head = torch.zeros(VOCAB, HIDDEN) if own else None
    heads = randomised(MedusaHeads(HIDDEN, num_heads=3, num_blocks=2, lm_head=lm_head))
    assert isinstance(heads, MedusaHeads)
    probes = probe(backbone, publish(folder, backbone, tmp_path, heads, offsets), PROMPT, top=4)
    hidden = last_hidden(reference, PROMPT)
    expected = [(offset, "head") for offset in offsets]
    if 1 not in offsets:
        expected.insert(0, (1, "lm_head"))
        check(probes[0], reference.lm_head(hidden))
    assert [(one.offset, one.source) for one in probes] == expected
    assert [one.head for one in probes] == list(range(1, len(probes) + 1))
    for number, probed in enumerate(one for one in probes if one.source == "head"):
        check(probed, medusa_logits(heads, reference, hidden, number))


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("vocabulary", [None, PART], ids=["all tokens", "part of them"])
def test_hydra_heads_follow_their_own_likeliest_tokens(
    folder: Path,
    backbone: Backbone,
    reference: LlamaForCausalLM,
    tmp_path: Path,
    normalised: bool,
    vocabulary: Tensor | None,
) -> None:
    heads = randomised(HydraHeads(HydraShape(HIDDEN, num_heads=3, num_blocks=2, normalised=normalised)))
    assert isinstance(heads, HydraHeads)
    probes = probe(backbone, publish(folder, backbone, tmp_path, heads, (2, 3, 4), vocabulary), PROMPT)
    assert [(one.head, one.offset, one.source) for one in probes] == [
        (1, 1, "lm_head"), (2, 2, "head"), (3, 3, "head"), (4, 4, "head"),
    ]  # fmt: skip
    hidden = last_hidden(reference, PROMPT)
    check(probes[0], reference.lm_head(hidden))
    drafted = torch.tensor([one.top[0].token_id for one in probes[:3]])
    with torch.no_grad():
        rows = heads(hidden, reference.model.embed_tokens(drafted), reference.lm_head)  # as in training
    for probed, row in zip(probes[1:], rows, strict=True):
        check(probed, row if vocabulary is None else row[vocabulary], vocabulary)


@pytest.mark.parametrize("length", [1, 6, 600])
@pytest.mark.parametrize("vocabulary", [None, PART], ids=["all tokens", "part of them"])
def test_an_eagle_head_goes_on_behind_the_whole_prompt(
    folder: Path,
    backbone: Backbone,
    reference: LlamaForCausalLM,
    tmp_path: Path,
    vocabulary: Tensor | None,
    length: int,
) -> None:
    head: EagleHead = make_head(EagleShape(HIDDEN, 4, 2, 4, 20, num_heads=3))
    prompt = torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(3)).tolist()
    probes = probe(backbone, publish(folder, backbone, tmp_path, head, (2, 3, 4), vocabulary), prompt)
    assert [(one.head, one.offset, one.source) for one in probes] == [
        (1, 1, "lm_head"), (2, 2, "head"), (3, 3, "head"), (4, 4, "head"),
    ]  # fmt: skip
    with torch.no_grad():
        hidden = reference.model(torch.tensor([prompt])).last_hidden_state[0]
        check(probes[0], reference.lm_head(hidden[-1]))
        drafted = [one.top[0].token_id for one in probes[:3]]
        embeddings = reference.model.embed_tokens(torch.tensor([*prompt[1:], *drafted]))
        rows = reference.lm_head(predict(head, hidden, embeddings))
    for probed, row in zip(probes[1:], rows, strict=True):
        check(probed, row if vocabulary is None else row[vocabulary], vocabulary)


def test_a_part_of_the_vocabulary_is_spoken_of_in_its_own_ids(
    folder: Path, backbone: Backbone, reference: LlamaForCausalLM, tmp_path: Path
) -> None:
    heads = randomised(MedusaHeads(HIDDEN, num_heads=2, lm_head=torch.zeros(PART.numel(), HIDDEN)))
    assert isinstance(heads, MedusaHeads)
    probes = probe(backbone, publish(folder, backbone, tmp_path, heads, (2, 3), PART), PROMPT, top=1000)
    assert [len(one.top) for one in probes] == [VOCAB, PART.numel(), PART.numel()]
    for number, probed in enumerate(probes[1:]):
        assert {guess.token_id for guess in probed.top} == set(PART.tolist())
        assert sum(guess.probability for guess in probed.top) == pytest.approx(1.0, abs=1e-4)
        check(probed, medusa_logits(heads, reference, last_hidden(reference, PROMPT), number), PART)


def test_long_prompts_run_in_chunks(
    folder: Path, backbone: Backbone, reference: LlamaForCausalLM, tmp_path: Path
) -> None:
    prompt = torch.randint(VOCAB, (700,), generator=torch.Generator().manual_seed(2)).tolist()
    loaded = publish(folder, backbone, tmp_path, randomised(MedusaHeads(HIDDEN, num_heads=1)), (2,))
    check(probe(backbone, loaded, prompt)[0], reference.lm_head(last_hidden(reference, prompt)))


@pytest.mark.parametrize(
    "options",
    [
        BackboneOptions(dtype=torch.bfloat16, kernels=Kernels.TORCH, device="cpu"),
        BackboneOptions(dtype=torch.float32, kernels=Kernels.NATIVE, device="cpu"),
        BackboneOptions(device="cpu"),
    ],
    ids=["torch bfloat16", "native fp32", "native int8"],
)
def test_every_backbone_says_about_the_same(
    folder: Path, backbone: Backbone, tmp_path: Path, options: BackboneOptions
) -> None:
    heads = randomised(HydraHeads(HydraShape(HIDDEN, num_heads=1)))
    exact = probe(backbone, publish(folder, backbone, tmp_path, heads, (2,)), PROMPT, top=VOCAB)
    other = load_backbone(folder, options)[0]
    probes = probe(other, load_heads_for(other, folder, tmp_path / "tiny@1"), PROMPT, top=VOCAB)
    assert probes[0].top[0].token_id == exact[0].top[0].token_id  # the root that the head sees
    for one, same in zip(probes, exact, strict=True):
        expected = {guess.token_id: guess.probability for guess in same.top}
        found = {guess.token_id: guess.probability for guess in one.top}
        assert found == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(
    ("token_ids", "top", "error", "message"),
    [
        ([], 3, BadRequestError, "the prompt is empty"),
        ([1, VOCAB], 3, BadRequestError, f"the prompt holds token {VOCAB}"),
        ([-1], 3, BadRequestError, "the prompt holds token -1"),
        ([1] * 701, 3, ContextLengthError, "701 tokens long and the model takes 700"),
        ([1], 0, BadRequestError, "top must be at least 1: got 0"),
    ],
)
def test_bad_input(
    folder: Path, backbone: Backbone, tmp_path: Path, token_ids: list[int], top: int, error: type[GorgonError],
    message: str,
) -> None:  # fmt: skip
    loaded = publish(folder, backbone, tmp_path, MedusaHeads(HIDDEN, num_heads=1), (2,))
    with pytest.raises(error, match=message):
        probe(backbone, loaded, token_ids, top)
