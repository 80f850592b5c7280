"""The large model computes what the small one inside it computes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lifting import MASKED, Lift, Shape
from transformers import LlamaConfig, LlamaForCausalLM

from gorgon_engine.backbone.base import ForwardInputs
from gorgon_engine.backbone.torch_backbone import TorchBackbone
from gorgon_engine.heads.eagle import EagleHead, EagleShape, Prefix
from gorgon_engine.kv_cache import KVCache
from gorgon_engine.models.linear import DenseLinear
from gorgon_engine.models.loading import BackboneWeights, load_weights
from gorgon_engine.models.nf4 import Nf4Linear
from gorgon_protocol.errors import ModelError

LARGE = Shape(
    hidden_size=256, intermediate_size=448, num_layers=4, num_heads=8, num_kv_heads=2, head_dim=128, vocab_size=150
)
VOCAB = 97


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shapes as SmolLM2's are to Llama-3-8B's: groups of three in groups of four, half of the head dimension."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=192,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=VOCAB,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("small")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def lift(weights: BackboneWeights, seed: int) -> Lift:
    return Lift(weights.config, LARGE, torch.Generator().manual_seed(seed))


def logits(weights: BackboneWeights, tokens: torch.Tensor) -> torch.Tensor:
    config = weights.config
    backbone = TorchBackbone(weights, device=torch.device("cpu"), dtype=torch.float32, quantization="none")
    cache = KVCache(
        num_layers=config.num_layers,
        num_slots=1,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        capacity=64,
        max_scratch=8,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    inputs = ForwardInputs.chain(tokens, slot=cache.acquire(), length=0, prompt_length=tokens.numel())
    return backbone.forward(inputs, cache).logits[0]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_large_model_says_what_the_small_one_says(folder: Path, quantization: str, seed: int):
    small = load_weights(folder, quantization=quantization, dtype=torch.float32)
    large = lift(small, seed).backbone(small)
    assert isinstance(large.layers[0].qkv, Nf4Linear if quantization == "nf4" else DenseLinear)
    tokens = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(seed))
    expected, given = logits(small, tokens), logits(large, tokens)
    assert expected.std() > 0.5, "logits without a shape would prove nothing"
    torch.testing.assert_close(given[:, :VOCAB], expected, atol=2e-4, rtol=2e-4)
    assert bool((given[:, VOCAB:] < 0.5 * MASKED).all())


def test_what_need_not_be_zero_is_junk(folder: Path):
    small = load_weights(folder, quantization="nf4", dtype=torch.float32)
    large = lift(small, 1).backbone(small)
    layer = large.layers[0]
    for linear in (layer.qkv, layer.gate_up):
        assert isinstance(linear, Nf4Linear)
        weight = linear.dequantize()
        # Only the unused rotary dimensions of the used q and k heads may be zero.
        zero_rows = int((weight == 0).all(dim=1).sum())
        assert zero_rows == (4 * 64 if linear is layer.qkv else 0)
    assert isinstance(large.lm_head, DenseLinear)
    assert bool((large.lm_head.weight[:, 192:].abs().mean(dim=1) > 0).all())


def test_layers_left_over_add_nothing_and_share_no_memory(folder: Path):
    small = load_weights(folder, quantization="nf4", dtype=torch.float32)
    large = lift(small, 1).backbone(small)
    assert len(large.layers) == LARGE.num_layers
    last, model = large.layers[-1], large.layers[1]
    for part in ("o", "down"):
        assert not getattr(last, part).dequantize().any()
    assert last.qkv.weight.packed.data_ptr() != model.qkv.weight.packed.data_ptr()  # type: ignore[attr-defined]


def test_drafting_tokens_of_the_small_model_needs_no_mask(folder: Path):
    small = load_weights(folder, dtype=torch.float32)
    head = lift(small, 1).backbone(small).lm_head
    assert isinstance(head, DenseLinear)
    known, more = head.select_outputs(torch.tensor([3, VOCAB - 1])), head.select_outputs(torch.tensor([3, VOCAB]))
    assert known.bias is None
    assert torch.equal(known.weight, head.weight[[3, VOCAB - 1]])
    assert more.bias is not None
    assert more.bias[1] < 0.5 * MASKED


def test_a_model_with_larger_groups_is_refused(folder: Path):
    small = load_weights(folder, dtype=torch.float32)
    with pytest.raises(ModelError, match="groups are smaller"):
        Lift(small.config, replace(LARGE, num_heads=4), torch.Generator())


def test_the_large_eagle_drafts_what_the_small_one_drafts(folder: Path):
    torch.manual_seed(3)
    small = EagleHead(EagleShape(192, 3, 1, 64, 128, num_heads=2))
    for parameter in small.parameters():
        parameter.data.normal_(std=0.3)
    weights = load_weights(folder, dtype=torch.float32)
    large = lift(weights, 1).eagle(small)
    features, embeddings = torch.randn(2, 1, 5, 1, 192)
    expected = predicted(small, features, embeddings)

    def widened(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, LARGE.hidden_size - 192))

    given = predicted(large, widened(features), widened(embeddings))
    assert not given[..., 192:].any()
    torch.testing.assert_close(given[..., :192], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def predicted(head: EagleHead, features: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """Two steps behind each of five places."""
    angles = head.angles(torch.arange(5)[None])
    rows = head.rows(features, embeddings, angles)
    keys, values = (part[:, :, 0].transpose(1, 2) for part in (rows.keys, rows.values))
    prefix = Prefix(keys, values, torch.ones(5, 5, dtype=torch.bool).tril()[None])
    paths = head.extend(prefix, head.begin(rows, prefix), embeddings, head.angles(torch.arange(1, 6)[None]))
    return paths.features
