"""The forward pass against transformers: every family, every RoPE type, both kernels, chunks and trees."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from gorgon_engine.backbone.base import Backbone, ForwardInputs, LogitsFor
from gorgon_engine.backbone.select import BackboneOptions, Kernels, load_backbone
from gorgon_engine.kernels.cpu import load_library
from gorgon_engine.kernels.tree_attention import attention_mask, reference, tree_attention
from gorgon_engine.kv_cache import KVCache
from gorgon_engine.models.loading import Quantization
from gorgon_engine.tokenizer import Tokenizer
from gorgon_engine.tree.tree import ancestor_words, tree_mask
from gorgon_protocol.errors import BadRequestError
from support.models import tiny_llama

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
LONG_FACTORS = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.5 + 0.3 * i for i in range(8)]}


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama-bias-tied": LlamaConfig(**SHAPE | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-linear": LlamaConfig(**SHAPE, **rope(rope_type="linear", factor=2.0)),
    "llama-dynamic": LlamaConfig(**SHAPE, **rope(rope_type="dynamic", factor=2.0)),
    "llama-yarn": LlamaConfig(**SHAPE, **rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama-longrope": LlamaConfig(
        **SHAPE, **rope(rope_type="longrope", factor=4.0, original_max_position_embeddings=16, **LONG_FACTORS)
    ),
    "llama3": LlamaConfig(
        **SHAPE,
        **rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "mistral-window": MistralConfig(**SHAPE, sliding_window=8),
    "qwen2": Qwen2Config(**{k: v for k, v in SHAPE.items() if k != "head_dim"}),
    "qwen2-window": Qwen2Config(
        **{k: v for k, v in SHAPE.items() if k != "head_dim"},
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
    ),
    "qwen3": Qwen3Config(**SHAPE),
}


def make_cache(backbone: Backbone, *, slots: int = 2, capacity: int = 1024) -> KVCache:
    config = backbone.config
    return KVCache(
        num_layers=config.num_layers,
        num_slots=slots,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        capacity=capacity,
        max_scratch=128,
        dtype=backbone.cache_dtype,
        device=backbone.device,
    )


def run_chunks(backbone: Backbone, tokens: torch.Tensor, *, chunk: int) -> torch.Tensor:
    """Logits [T, V] of a prompt that comes in chunks."""
    cache = make_cache(backbone)
    slot = cache.acquire()
    parts = []
    for start in range(0, tokens.shape[0], chunk):
        piece = tokens[start : start + chunk]
        inputs = ForwardInputs.chain(piece, slot=slot, length=start, prompt_length=tokens.shape[0])
        parts.append(backbone.forward(inputs, cache).logits[0].float())
        cache.append(slot, piece.shape[0])
    return torch.cat(parts)


@pytest.mark.parametrize("kernels", [Kernels.TORCH, Kernels.NATIVE])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name: str, kernels: Kernels, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    model.save_pretrained(tmp_path)
    backbone, _ = load_backbone(tmp_path, BackboneOptions(dtype=torch.float32, kernels=kernels))
    tokens = torch.randint(61, (40,), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    for chunk in (40, 13):
        assert (run_chunks(backbone, tokens, chunk=chunk) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("kernels", [Kernels.TORCH, Kernels.NATIVE])
def test_tree_rows_equal_their_own_chains(kernels: Kernels, tmp_path: Path) -> None:
    """Each node of a tree over a prefix = the last token of its branch decoded by itself."""
    folder = tiny_llama(tmp_path)
    backbone, _ = load_backbone(folder, BackboneOptions(dtype=torch.float32, kernels=kernels))
    generator = torch.Generator().manual_seed(1)
    prefix = torch.randint(67, (9,), generator=generator)
    parents = torch.tensor([[-1, 0, 0, 1, 1, 2, 3, 5, 5, 6]])
    tokens = torch.randint(67, (1, 10), generator=generator)
    depths = tree_mask(parents).sum(dim=2) - 1
    cache = make_cache(backbone)
    slot = cache.acquire()
    backbone.forward(ForwardInputs.chain(prefix, slot=slot, length=0, prompt_length=9), cache)
    cache.append(slot, 9)
    slots = torch.tensor([slot])
    output = backbone.forward(
        ForwardInputs(
            tokens=tokens,
            depths=depths,
            slots=slots,
            lengths=cache.lengths[slots],
            num_rows=torch.tensor([10]),
            prompt_lengths=torch.tensor([9]),
            max_positions=19,
            ancestors=ancestor_words(parents),
        ),
        cache,
    )
    for node in range(10):
        branch, at = [], node
        while at >= 0:
            branch.append(int(tokens[0, at]))
            at = int(parents[0, at])
        alone = run_chunks(backbone, torch.cat([prefix, torch.tensor(branch[::-1])]), chunk=64)[-1]
        assert torch.allclose(output.logits[0, node].float(), alone, atol=1e-4)
        if backbone.row_invariant:
            assert torch.equal(output.logits[0, node], alone)


def test_attention_equals_the_loop_over_rows() -> None:
    torch.manual_seed(0)
    batch, rows, heads, groups, dim = 2, 7, 6, 2, 8
    keys, values = torch.randn(3, groups, 40, dim), torch.randn(3, groups, 40, dim)
    query = torch.randn(batch, rows, heads, dim)
    parents = torch.tensor([[-1, 0, 0, 1, 2, 2, 4], [-1, 0, 1, 2, 3, 4, 5]])
    depths = tree_mask(parents).sum(dim=2) - 1
    for window in (0, 5):
        mask = attention_mask(
            torch.tensor([20, 3]), depths, ancestor_words(parents), num_positions=30, sliding_window=window
        )
        slots = torch.tensor([2, 0])
        expected = reference(query, keys, values, slots, mask)
        assert torch.allclose(tree_attention(query, keys, values, slots, mask).double(), expected, atol=1e-5)
    assert int(mask[0, 6].sum()) == 5


def test_real_text_on_the_real_model(smollm2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    backbone, _ = load_backbone(smollm2, BackboneOptions(dtype=torch.float32))
    assert backbone.kernels == "native-fp32"
    text = (Path(__file__).parents[2] / "LICENSE").read_text()[1500:4000]
    tokens = torch.tensor(Tokenizer.from_folder(smollm2).encode(text))
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    assert (run_chunks(backbone, tokens, chunk=200) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("quantization", [Quantization.INT8, Quantization.NF4])
def test_portable_quantised_forwards_are_close(quantization: Quantization, tmp_path: Path) -> None:
    """Quantisation errors only: a wrong scale, nibble order or fused row would be far off."""
    torch.manual_seed(4)
    config = LlamaConfig(**SHAPE | {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1})
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    options = BackboneOptions(quantization=quantization, dtype=torch.float32, kernels=Kernels.TORCH)
    backbone, _ = load_backbone(tmp_path, options)
    tokens = torch.randint(61, (30,), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model(tokens[None]).logits[0].log_softmax(dim=1)
    got = run_chunks(backbone, tokens, chunk=30).log_softmax(dim=1)
    divergence = (expected.exp() * (expected - got)).sum(dim=1).mean()
    assert divergence < (1e-3 if quantization is Quantization.INT8 else 5e-2)


def test_only_wanted_logits_are_computed(tmp_path: Path) -> None:
    backbone, _ = load_backbone(tiny_llama(tmp_path), BackboneOptions(dtype=torch.float32))
    tokens = torch.arange(5)
    shapes = {}
    for wanted in LogitsFor:
        cache = make_cache(backbone)
        inputs = ForwardInputs.chain(tokens, slot=cache.acquire(), length=0, prompt_length=5)
        shapes[wanted] = backbone.forward(inputs, cache, logits_for=wanted).logits
    assert [shapes[w].shape[1] for w in LogitsFor] == [5, 1, 0]
    assert torch.equal(shapes[LogitsFor.LAST][0, 0], shapes[LogitsFor.ALL][0, 4])


@pytest.mark.parametrize("kernels", [Kernels.TORCH, Kernels.NATIVE])
def test_each_sequence_has_the_logits_of_its_own_last_row(kernels: Kernels, tmp_path: Path) -> None:
    """Prompts of different lengths in one pass, the shorter ones padded behind."""
    backbone, _ = load_backbone(tiny_llama(tmp_path), BackboneOptions(dtype=torch.float32, kernels=kernels))
    generator = torch.Generator().manual_seed(2)
    num_rows = torch.tensor([5, 1, 7, 3])
    tokens = torch.randint(67, (4, 7), generator=generator)
    cache = make_cache(backbone, slots=4)
    inputs = ForwardInputs(
        tokens=tokens,
        depths=torch.arange(7).expand(4, -1),
        slots=torch.tensor([cache.acquire() for _ in range(4)]),
        lengths=torch.zeros(4, dtype=torch.int64),
        num_rows=num_rows,
        prompt_lengths=num_rows,
        max_positions=7,
    )
    last = backbone.forward(inputs, cache, logits_for=LogitsFor.LAST)
    every = backbone.forward(inputs, cache)
    assert last.logits.shape == (4, 1, 67)
    assert last.hidden.shape == (4, 7, backbone.config.hidden_size)
    for row, count in enumerate(num_rows.tolist()):
        torch.testing.assert_close(last.logits[row, 0], every.logits[row, count - 1], atol=1e-4, rtol=1e-4)
        alone = run_chunks(backbone, tokens[row, :count], chunk=7)[-1]
        torch.testing.assert_close(last.logits[row, 0], alone, atol=1e-4, rtol=1e-4)
        if backbone.row_invariant:
            assert torch.equal(last.logits[row, 0], alone)


EVERY_BACKBONE = {
    "native-fp32": BackboneOptions(dtype=torch.float32, kernels=Kernels.NATIVE, device="cpu"),
    "native-bf16": BackboneOptions(dtype=torch.bfloat16, kernels=Kernels.NATIVE, device="cpu"),
    "native-int8": BackboneOptions(quantization=Quantization.INT8, kernels=Kernels.NATIVE, device="cpu"),
    "torch-float32": BackboneOptions(dtype=torch.float32, kernels=Kernels.TORCH, device="cpu"),
    "torch-bfloat16": BackboneOptions(dtype=torch.bfloat16, kernels=Kernels.TORCH, device="cpu"),
    "torch-int8": BackboneOptions(quantization=Quantization.INT8, kernels=Kernels.TORCH, device="cpu"),
    "torch-nf4": BackboneOptions(quantization=Quantization.NF4, kernels=Kernels.TORCH, device="cpu"),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", EVERY_BACKBONE)
def test_heads_can_borrow_both_ends_of_a_backbone(name: str, tied: bool, tmp_path: Path) -> None:
    """`embed` gives the checkpoint's rows, `project_to` the outputs of `project` for some tokens alone."""
    torch.manual_seed(3)
    shape = SHAPE | {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, tie_word_embeddings=tied)).eval()
    model.save_pretrained(tmp_path)
    backbone, _ = load_backbone(tmp_path, EVERY_BACKBONE[name])
    assert backbone.kernels == name
    narrow = name not in ("native-fp32", "torch-float32", "torch-int8")
    tokens = torch.randint(61, (3, 2, 4), generator=torch.Generator().manual_seed(5))
    expected = model.model.embed_tokens.weight.detach()[tokens]
    embedded = backbone.embed(tokens)
    assert embedded.dtype == (torch.bfloat16 if name in ("torch-bfloat16", "torch-nf4") else torch.float32)
    assert torch.equal(embedded.float(), expected.bfloat16().float() if narrow else expected)

    said = torch.tensor([60, 3, 4, 4, 17, 0, 33])
    project = backbone.project_to(said)
    assert (backbone.lm_head.in_features, backbone.lm_head.out_features) == (64, 61)
    generator = torch.Generator().manual_seed(6)
    for hidden in (torch.randn(64, generator=generator), torch.randn(2, 3, 128, generator=generator)[..., 10:74]):
        whole = backbone.project(hidden)
        assert whole.shape == (*hidden.shape[:-1], 61)
        some = project(hidden)
        assert some.shape == (*hidden.shape[:-1], 7)
        if backbone.row_invariant or name == "torch-int8":
            assert torch.equal(some, whole[..., said])
        else:  # a library may order a smaller product's sums in another way
            torch.testing.assert_close(some, whole[..., said])


def test_choices_that_cannot_be_are_refused(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    with pytest.raises(BadRequestError, match="native kernels run int8 and unquantised models on a CPU: got nf4"):
        load_backbone(folder, BackboneOptions(quantization=Quantization.NF4, kernels=Kernels.NATIVE))
    with pytest.raises(BadRequestError, match="device 'tpu' is not"):
        load_backbone(folder, BackboneOptions(device="tpu"))
    if not torch.cuda.is_available():
        with pytest.raises(BadRequestError, match="torch sees no CUDA GPU"):
            load_backbone(folder, BackboneOptions(device="cuda"))


def test_without_native_kernels_torch_serves_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GORGON_NATIVE", "0")
    load_library.cache_clear()
    backbone, notices = load_backbone(tiny_llama(tmp_path), BackboneOptions())
    assert backbone.kernels == "torch-int8"
    assert "disabled by GORGON_NATIVE=0" in notices[0]
    with pytest.raises(BadRequestError, match="native kernels cannot be used: disabled"):
        load_backbone(tmp_path, BackboneOptions(kernels=Kernels.NATIVE))
