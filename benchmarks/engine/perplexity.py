"""Perplexity of the served model in each precision, on real English text that ships with the repository.

    python benchmarks/engine/perplexity.py [--model FOLDER] [--tokens 8192]

The text is the questions of MT-bench and the licence, cut into windows of 512 tokens. Reported beside it: KL divergence
from fp32 and how often the likeliest token is the same.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from gorgon_engine.backbone.base import Backbone, ForwardInputs
from gorgon_engine.backbone.select import BackboneOptions, load_backbone
from gorgon_engine.kv_cache import KVCache
from gorgon_engine.models.catalog import resolve_model
from gorgon_engine.models.loading import Quantization
from gorgon_engine.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
WINDOW = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=8192)
    arguments = parser.parse_args()
    folder = resolve_model(arguments.model)
    lines = (ROOT / "benchmarks/data/mt_bench.jsonl").read_text().splitlines()
    questions = [turn for line in lines for turn in json.loads(line)["turns"]]
    text = "\n\n".join([*questions, (ROOT / "LICENSE").read_text()])
    tokens = torch.tensor(Tokenizer.from_folder(folder).encode(text)[: arguments.tokens])
    reference: list[torch.Tensor] = []
    print(f"{len(tokens)} tokens")
    for name, options in (
        ("fp32", BackboneOptions(dtype=torch.float32)),
        ("bf16", BackboneOptions(dtype=torch.bfloat16)),
        ("int8", BackboneOptions(quantization=Quantization.INT8)),
    ):
        backbone, _ = load_backbone(folder, options)
        loss, divergence, agreement, count = 0.0, 0.0, 0, 0
        for number, window in enumerate(tokens.split(WINDOW)):
            logits = window_log_probs(backbone, window)
            if name == "fp32":
                reference.append(logits.half())
            expected = reference[number].float()
            loss -= float(logits[:-1].gather(1, window[1:, None]).sum())
            divergence += float((expected.exp() * (expected - logits)).sum())
            agreement += int((expected.argmax(dim=1) == logits.argmax(dim=1)).sum())
            count += len(window)
        windows = len(reference)
        perplexity = math.exp(loss / (count - windows))
        if name == "bf16":
            bf16 = perplexity
        ratio = f"  {perplexity / bf16:.4f} x bf16" if name == "int8" else ""
        quality = f"KL {divergence / count:.5f}, same argmax {agreement / count:.4f}"
        print(f"{name}: perplexity {perplexity:.4f}, {quality}{ratio}")


def window_log_probs(backbone: Backbone, window: torch.Tensor) -> torch.Tensor:
    """[T, V] float32 log-probabilities of one window by itself."""
    config = backbone.config
    cache = KVCache(
        num_layers=config.num_layers,
        num_slots=1,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        capacity=WINDOW,
        max_scratch=1,
        dtype=backbone.cache_dtype,
        device=backbone.device,
    )
    inputs = ForwardInputs.chain(window, slot=cache.acquire(), length=0, prompt_length=len(window))
    return backbone.forward(inputs, cache).logits[0].float().log_softmax(dim=1)


if __name__ == "__main__":
    main()
