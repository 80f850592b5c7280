"""The forward pass through the Triton kernels: against that in torch operations, and that a row's bits are its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from support.triton_checks import run_check

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 61,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama-bias-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama-dynamic": LlamaConfig(
        **SHAPE | {"max_position_embeddings": 16, "num_hidden_layers": 1},
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    ),
    # Like SmolLM2: three query heads a KV head, a hidden size that no block of the kernels divides. Its last product
    # leaves three partial sums.
    "llama-group-of-3": LlamaConfig(
        **SHAPE
        | {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3, "head_dim": 128}
        | {"num_hidden_layers": 1}
    ),
    "qwen2": Qwen2Config(  # a bias on qkv
        **{k: v for k, v in SHAPE.items() if k != "head_dim"} | {"hidden_size": 128, "num_hidden_layers": 1}
    ),
    "qwen3": Qwen3Config(**SHAPE),  # norms of queries and keys
}

COMMON = """
from dataclasses import replace
from pathlib import Path

from gorgon_engine.backbone.base import ForwardInputs, LogitsFor
from gorgon_engine.backbone.torch_backbone import TorchBackbone
from gorgon_engine.backbone import triton_backbone
from gorgon_engine.backbone.triton_backbone import TritonBackbone
from gorgon_engine.kernels.triton.nf4_packing import pack_nf4, reference_weights
from gorgon_engine.kv_cache import KVCache
from gorgon_engine.models.linear import DenseLinear
from gorgon_engine.models.loading import load_weights
from gorgon_engine.models.nf4 import Nf4Linear
from gorgon_engine.tree.tree import ancestor_words, tree_mask

torch.backends.cuda.matmul.allow_tf32 = False
torch.manual_seed(0)
device = torch.device(device)
# On a GPU what it serves; the interpreter's arithmetic in bfloat16 is wrong.
dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
weights = load_weights(Path(FOLDER), quantization=QUANTIZATION, dtype=dtype, device=device)
config = weights.config


# The very weights that the kernels multiply, with torch's arithmetic in the given dtype.
def in_torch(kind):
    def cast(tensor):
        return None if tensor is None else tensor.to(kind)

    def cast_linear(linear):
        weight = linear.weight
        if isinstance(linear, Nf4Linear):  # rounded as the kernels do it: each scale, and each weight
            packed = pack_nf4(weight.packed, weight.absmax, weight.code, weight.out_features, weight.in_features)
            weight = reference_weights(packed, dtype)
        return DenseLinear(cast(weight), cast(linear.bias))

    layers = tuple(
        replace(
            one, input_norm=cast(one.input_norm), post_norm=cast(one.post_norm), q_norm=cast(one.q_norm),
            k_norm=cast(one.k_norm), qkv=cast_linear(one.qkv), o=cast_linear(one.o),
            gate_up=cast_linear(one.gate_up), down=cast_linear(one.down),
        )
        for one in weights.layers
    )
    changed = replace(
        weights, embedding=cast(weights.embedding), layers=layers, final_norm=cast(weights.final_norm),
        lm_head=cast_linear(weights.lm_head),
    )
    return TorchBackbone(changed, device=device, dtype=kind, quantization="none")


backbone = TritonBackbone(weights, device=device, dtype=dtype, max_depth=7)


def make_cache(slots=4, capacity=200, dtype=dtype):
    return KVCache(
        num_layers=config.num_layers, num_slots=slots, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
        capacity=capacity, max_scratch=128, dtype=dtype, device=device,
    )


def prefill(backbone, cache, slot, prompt, chunks, logits_for=LogitsFor.ALL):
    outputs = []
    for chunk in prompt.split(chunks):
        length = int(cache.lengths[slot])
        inputs = ForwardInputs.chain(chunk, slot=slot, length=length, prompt_length=len(prompt))
        outputs.append(backbone.forward(inputs, cache, logits_for=logits_for))
        cache.append(slot, len(chunk))
    return outputs


def verify(backbone, cache, slots, tokens, parents, bound=0):
    slots = torch.tensor(slots, device=device)
    return backbone.forward(
        ForwardInputs(
            tokens=tokens, depths=tree_mask(parents).sum(dim=2) - 1, slots=slots, lengths=cache.lengths[slots],
            num_rows=torch.full_like(slots, tokens.shape[1]), prompt_lengths=cache.lengths[slots],
            max_positions=int(cache.lengths[slots].max()) + tokens.shape[1] + bound, ancestors=ancestor_words(parents),
        ),
        cache,
    )


def some_tokens(*shape):
    return torch.randint(0, config.vocab_size, shape, device=device)
"""

AGAINST_TORCH = (
    COMMON
    + """
expected_name = {"nf4": "triton-nf4", "none": f"triton-{str(dtype)[6:]}"}[QUANTIZATION]
assert backbone.kernels.removesuffix("-gluon") == expected_name, backbone.kernels
prompts = [some_tokens(size) for size in (3, 18)]
tokens, parents = some_tokens(2, 4), torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 0]], device=device)


def outputs(backbone):
    cache = make_cache(dtype=backbone.dtype)
    slots = [cache.acquire(), cache.acquire()]
    found = []
    for slot, prompt in zip(slots, prompts, strict=True):
        last = prefill(backbone, cache, slot, prompt, 17, LogitsFor.LAST)[-1]
        assert last.logits.shape == (1, 1, config.vocab_size)
        found.append(last.logits)
    output = verify(backbone, cache, slots, tokens, parents)
    return [*found, output.logits, output.hidden]


# ||given - expected|| / ||expected||, of all logits and of all hidden states.
def relative_errors(given):
    def error(got, want):
        got, want = (torch.cat([part.flatten().float() for part in parts]) for parts in (got, want))
        return float((got - want).norm() / want.norm())

    return error(given[:-1], expected[:-1]), error(given[-1:], expected[-1:])


def check(given):
    if dtype == torch.float32:
        for want, got in zip(expected, given, strict=True):
            torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)
        return
    # What 16 bits cost depends on model and text: what they cost torch is the measure.
    for ours, theirs in zip(relative_errors(given), relative_errors(rounded), strict=True):
        assert ours <= min(1.5 * theirs, 3e-2), (ours, theirs)


expected, rounded = outputs(in_torch(torch.float32)), outputs(in_torch(dtype))
given = outputs(backbone)
assert expected[0].std() > 0.3, "logits without a shape would prove nothing"
check(given)
if LONG:
    triton_backbone.MAX_TILED_ROWS = 2  # prompts through weights that are written out
    long = outputs(backbone)
    check(long)
    assert not all(map(torch.equal, given, long)), "they went the same way as before"
cache = make_cache()
(nothing,) = prefill(backbone, cache, cache.acquire(), prompts[0], 17, LogitsFor.NONE)
assert nothing.logits.shape == (1, 0, config.vocab_size)
"""
)

ROW_INVARIANCE = (
    COMMON
    + """
prompt = some_tokens(18)
chain = some_tokens(5)
# Decoded plainly, one row at a time, behind a prompt in one chunk.
cache = make_cache()
slot = cache.acquire()
(whole,) = prefill(backbone, cache, slot, prompt, 18)
root = torch.tensor([[-1]], device=device)
plain = []
for token in chain:
    output = verify(backbone, cache, [slot], token.view(1, 1), root)
    plain.append((output.logits[0, 0], output.hidden[0, 0]))
    cache.append(slot, 1)

# The prompt cut elsewhere.
cut = make_cache()
slots = [cut.acquire() for _ in range(2)]
pieces = torch.cat([output.logits[0] for output in prefill(backbone, cut, slots[0], prompt, 7)])
assert torch.equal(pieces, whole.logits[0])
(beside,) = prefill(backbone, cut, slots[1], prompt[:5], 5)
assert torch.equal(beside.logits[0], whole.logits[0, :5])

# The text as one branch of a tree among guesses: any width, another sequence beside it, any bound of the positions.
for width, bound in WIDTHS:
    on_branch = [0, *sorted((torch.randperm(width - 1)[:4] + 1).tolist())]
    parents = [-1]
    for row in range(1, width):
        before = [place for place in on_branch if place < row]
        parents.append(before[-1] if row in on_branch else before[int(torch.randint(len(before), ()))])
    tokens = some_tokens(2, width)
    tokens[0, on_branch] = chain[: len(on_branch)]
    output = verify(backbone, cut, slots, tokens, torch.tensor([parents] * 2, device=device), bound)
    for row, expected in zip(on_branch, plain, strict=False):
        for got, want in zip((output.logits[0, row], output.hidden[0, row]), expected, strict=True):
            assert torch.equal(got, want), (width, row)
"""
)


def save(name: str, folder: Path) -> None:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(CONFIGS[name]).float().save_pretrained(folder)


def program(text: str, folder: Path, quantization: str, **values: Any) -> str:
    values = {"FOLDER": str(folder), "QUANTIZATION": quantization} | values
    return "".join(f"{name} = {value!r}\n" for name, value in values.items()) + text


@pytest.mark.parametrize(
    ("name", "quantization", "long"),
    [
        ("llama-bias-tied", "none", True),
        ("llama-dynamic", "none", False),
        ("llama-group-of-3", "nf4", False),
        ("qwen2", "nf4", True),
        ("qwen3", "none", False),
    ],
)
def test_it_says_what_torch_says(name: str, quantization: str, long: bool, tmp_path: Path) -> None:
    save(name, tmp_path)
    run_check(program(AGAINST_TORCH, tmp_path, quantization, LONG=long))


@pytest.mark.parametrize(
    ("name", "quantization", "widths"),
    [("llama-bias-tied", "nf4", [(2, 100), (18, 0)]), ("qwen3", "none", [(5, 0), (33, 100)])],
)
def test_a_token_says_the_same_in_any_tree_and_in_any_company(
    name: str, quantization: str, widths: list[tuple[int, int]], tmp_path: Path
) -> None:
    """And wherever its prompt is cut."""
    save(name, tmp_path)
    run_check(program(ROW_INVARIANCE, tmp_path, quantization, WIDTHS=widths))
