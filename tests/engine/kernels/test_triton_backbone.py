"""The forward pass through the Triton kernels against that in torch operations: prompt chunks, then a tree."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from support.triton_checks import run_check

SHAPE = {
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama-bias-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SHAPE),  # a bias on qkv
    "qwen3": Qwen3Config(**SHAPE),  # norms of queries and keys
}

PROGRAM = """
from pathlib import Path

from gorgon_engine.backbone.base import ForwardInputs, LogitsFor
from gorgon_engine.backbone.torch_backbone import TorchBackbone
from gorgon_engine.backbone.triton_backbone import DenseProduct, TritonBackbone
from gorgon_engine.kv_cache import KVCache
from gorgon_engine.models.loading import load_weights
from gorgon_engine.tree.tree import ancestor_words

torch.backends.cuda.matmul.allow_tf32 = False
torch.manual_seed(0)
weights = load_weights(Path({folder!r}), dtype=torch.float32, device=device)
config, device = weights.config, torch.device(device)
made = dict(device=device, dtype=torch.float32)
backbones = [
    TorchBackbone(weights, **made, quantization="none"),
    TritonBackbone(weights, **made, kernels="triton-float32", pack=DenseProduct),
]


def outputs(backbone):
    cache = KVCache(
        num_layers=config.num_layers, num_slots=3, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
        capacity=40, max_scratch=8, dtype=torch.float32, device=device,
    )
    slots = [cache.acquire(), cache.acquire()]
    chunks = [ForwardInputs.chain(prompt, slot=slot, length=0, prompt_length=len(prompt))
              for slot, prompt in zip(slots, prompts, strict=True)]
    found = []
    for slot, chunk in zip(slots, chunks, strict=True):
        found.append(backbone.forward(chunk, cache, logits_for=LogitsFor.LAST).logits)
        cache.append(slot, chunk.tokens.shape[1])
    tree = ForwardInputs(
        tokens=tokens, depths=depths, slots=torch.tensor(slots, device=device), lengths=cache.lengths[slots],
        num_rows=torch.tensor([4, 4], device=device), prompt_lengths=cache.lengths[slots], max_positions=48,
        ancestors=ancestor_words(parents),
    )
    output = backbone.forward(tree, cache)
    return [*found, output.logits, output.hidden]


prompts = [torch.randint(0, config.vocab_size, (size,), device=device) for size in (7, 11)]
tokens = torch.randint(0, config.vocab_size, (2, 4), device=device)
parents = torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 0]], device=device)
depths = torch.tensor([[0, 1, 1, 2], [0, 1, 2, 1]], device=device)
expected, given = (outputs(backbone) for backbone in backbones)
assert expected[0].std() > 0.3, "logits without a shape would prove nothing"
for want, got in zip(expected, given, strict=True):
    torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)
"""


@pytest.mark.parametrize("name", CONFIGS)
def test_it_says_what_torch_says(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(CONFIGS[name]).float().save_pretrained(tmp_path)
    run_check(PROGRAM.format(folder=str(tmp_path)))
