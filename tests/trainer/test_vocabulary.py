"""The drafting vocabulary: the most frequent tokens of the answers, and their rows of the lm_head."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from gorgon_engine.backbone.select import BackboneOptions, Kernels, load_backbone
from gorgon_engine.models.loading import Quantization
from gorgon_protocol.errors import TrainingError
from gorgon_trainer.shards import TokenSequence
from gorgon_trainer.vocabulary import draft_vocabulary, lm_head_weight
from support.models import tiny_llama
from support.training import VOCAB, make_shards

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_most_frequent_tokens_of_the_training_answers(tmp_path: Path) -> None:
    answers = [([9, 9, 9, 40, 7], [0, 0, 0, 1, 1]), ([30, 30, 5, 40], [1, 1, 1, 1]), ([30, 7, 5], [1, 1, 1])]
    train = [TokenSequence.from_lists(tokens, mask) for tokens, mask in answers]
    shards = make_shards(tmp_path, train, [TokenSequence.from_lists([66] * 20, [1] * 20)])
    said = Counter(token for tokens, mask in answers for token, counted in zip(tokens, mask, strict=True) if counted)
    assert said == {30: 3, 40: 2, 7: 2, 5: 2}

    expected = {1: [30], 2: [5, 30], 3: [5, 7, 30], 4: [5, 7, 30, 40], 6: [0, 1, 5, 7, 30, 40]}
    for size, tokens in expected.items():
        chosen = draft_vocabulary(shards, size)
        assert chosen is not None
        assert chosen.dtype == torch.int64
        assert chosen.tolist() == tokens
    assert draft_vocabulary(shards, None) is None
    whole = draft_vocabulary(shards, VOCAB)
    assert whole is not None
    assert whole.tolist() == list(range(VOCAB))


@pytest.mark.parametrize("size", [0, -1, VOCAB + 1])
def test_sizes_that_are_none(tmp_path: Path, size: int) -> None:
    shards = make_shards(tmp_path, [TokenSequence.from_lists([9], [1])], [])
    with pytest.raises(TrainingError) as caught:
        draft_vocabulary(shards, size)
    assert str(caught.value) == f"draft_vocab_size must be between 1 and the vocabulary's {VOCAB}: got {size}"


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (BackboneOptions(dtype=torch.float32, kernels=Kernels.NATIVE), 1e-5),
        (BackboneOptions(dtype=torch.bfloat16, kernels=Kernels.NATIVE), 2e-2),
        (BackboneOptions(quantization=Quantization.INT8, kernels=Kernels.NATIVE), 4e-2),
        (BackboneOptions(dtype=torch.float32, kernels=Kernels.TORCH), 1e-5),
        (BackboneOptions(quantization=Quantization.INT8, kernels=Kernels.TORCH), 4e-2),
        (BackboneOptions(quantization=Quantization.NF4, kernels=Kernels.TORCH), 2e-2),
    ],
)
@pytest.mark.parametrize("chosen", [None, torch.tensor([3, 4, 21, 66])], ids=["all", "some"])
def test_the_weight_is_what_the_backbone_multiplies_with(
    tmp_path: Path, options: BackboneOptions, tolerance: float, chosen: torch.Tensor | None
) -> None:
    """Up to what the backbone does to the hidden states: bf16, or int8 of groups of 64."""
    folder = tiny_llama(tmp_path / "tiny", hidden_size=64, vocab_size=VOCAB)
    backbone, _ = load_backbone(folder, BackboneOptions(options.quantization, options.dtype, "cpu", options.kernels))
    weight = lm_head_weight(backbone, chosen)
    assert weight.shape == (VOCAB if chosen is None else len(chosen), backbone.config.hidden_size)
    hidden = torch.randn(30, backbone.config.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = backbone.project(hidden.to(weight.dtype)).float()
    expected = expected if chosen is None else expected[:, chosen]
    made = hidden @ weight.float().T
    assert (made - expected).abs().max() < tolerance * expected.abs().max()
