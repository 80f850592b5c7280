"""Time of one native CPU forward against the number of rows, for each weight kind and context length.

    python benchmarks/kernels/cpu_forward.py --model <Hugging Face model folder>
    python benchmarks/kernels/cpu_forward.py --model <folder> --kinds int8 --builds native no-amx

Kinds, builds, row counts and contexts take turns within each round and the medians are printed, so that a noisy machine
blurs all of them alike. "GB/s" is weight bytes / time at the first row count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gorgon_engine.kernels.cpu import Kind, NativeLayer, NativeLibrary, NativeModel, PackedLinear, load_library

KINDS: tuple[Kind, ...] = ("fp32", "bf16", "int8")
# The flags take instructions away from what the machine has.
BUILDS = {
    "native": (),
    "no-amx": ("-DGORGON_NO_AMX",),
    "avx2": ("-mno-avx512f", "-mno-avxvnni"),
    "generic": ("-DGORGON_FORCE_GENERIC",),
}


def load_model(folder: Path, kind: Kind, library: NativeLibrary) -> NativeModel:
    config = json.loads((folder / "config.json").read_text())
    weights: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        weights.update(load_file(shard))
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads", config["num_attention_heads"])

    def pack(prefix: str, *names: str) -> PackedLinear:
        matrices = [weights[f"{prefix}{name}.weight"] for name in names]
        biases = [weights[f"{prefix}{name}.bias"] for name in names if f"{prefix}{name}.bias" in weights]
        bias = torch.cat(biases) if biases else None
        return PackedLinear.pack(torch.cat(matrices), bias, kind, library=library)

    def norm(name: str) -> Tensor | None:
        return weights[name].float() if name in weights else None

    layers = []
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        layers.append(
            NativeLayer(
                input_norm=weights[f"{prefix}input_layernorm.weight"].float(),
                post_norm=weights[f"{prefix}post_attention_layernorm.weight"].float(),
                q_norm=norm(f"{prefix}self_attn.q_norm.weight"),
                k_norm=norm(f"{prefix}self_attn.k_norm.weight"),
                qkv=pack(f"{prefix}self_attn.", "q_proj", "k_proj", "v_proj"),
                o=pack(f"{prefix}self_attn.", "o_proj"),
                gate_up=pack(f"{prefix}mlp.", "gate_proj", "up_proj"),
                down=pack(f"{prefix}mlp.", "down_proj"),
            )
        )
    head = "lm_head" if "lm_head.weight" in weights else "model.embed_tokens"
    return NativeModel(
        layers,
        weights["model.norm.weight"].float(),
        pack("", head),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        rms_norm_eps=config["rms_norm_eps"],
    )


class Timer:
    """Forwards of one model over a filled cache. The values do not matter for time, so the cache holds noise."""

    def __init__(self, model: NativeModel, cache_dtype: torch.dtype, positions: int) -> None:
        self.model = model
        shape = (len(model.layers), 1, model.num_kv_heads, positions, model.head_dim)
        self.keys = torch.randn(shape).to(cache_dtype)
        self.values = torch.randn(shape).to(cache_dtype)
        self.angles = torch.rand(positions, model.head_dim // 2) * 6.28

    def seconds(self, rows: int, context: int, *, tree: bool) -> float:
        """tree: the rows are a binary tree over a prefix of context tokens; else a causal prefill from position 0."""
        first = context if tree else 0
        positions = torch.arange(first, first + rows, dtype=torch.int32)
        ancestors = torch.zeros(rows, 2, dtype=torch.int64)
        for row in range(rows if tree else 0):
            node: int = row
            while True:
                word, bit = divmod(node, 64)
                ancestors[row, word] |= 1 << bit if bit < 63 else -(1 << 63)
                if node == 0:
                    break
                node = (node - 1) // 2
        prefix = torch.full((rows,), context, dtype=torch.int32) if tree else positions + 1
        embeddings = torch.randn(rows, self.model.hidden_size)
        logits_rows = None if tree else torch.tensor([rows - 1], dtype=torch.int32)
        arguments: dict[str, Any] = {
            "embeddings": embeddings,
            "cos": self.angles[positions].cos(),
            "sin": self.angles[positions].sin(),
            "slots": torch.zeros(rows, dtype=torch.int32),
            "write_positions": positions,
            "prefix_lengths": prefix,
            "tree_base": torch.full((rows,), context, dtype=torch.int32),
            "ancestors": ancestors,
            "keys": self.keys,
            "values": self.values,
            "logits_rows": logits_rows,
            "out_hidden": torch.empty_like(embeddings),
            "out_logits": torch.empty(rows if tree else 1, self.model.vocab_size),
        }
        start = time.perf_counter()
        self.model.forward(**arguments)
        return time.perf_counter() - start


Case = tuple[int, int, bool]  # rows, context, tree


def measure(timers: dict[str, Timer], cases: list[Case], rounds: int) -> dict[tuple[str, Case], list[float]]:
    """Seconds of each forward, by the timer's name and the case."""
    samples: dict[tuple[str, Case], list[float]] = {}
    for round_index in range(rounds + 1):
        for case in cases:
            for name, timer in timers.items():
                rows, context, tree = case
                seconds = timer.seconds(rows, context, tree=tree)
                if round_index > 0:  # the first round grows workspaces
                    samples.setdefault((name, case), []).append(seconds)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--builds", nargs="+", choices=BUILDS, default=["native"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 1024])
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if max(options.rows) > 128:
        parser.error("a tree has at most 128 rows")

    positions = max(max(options.contexts) + max(options.rows), options.prefill)
    timers: dict[str, Timer] = {}
    for build in options.builds:
        library = load_library(BUILDS[build])
        if options.threads:
            library.set_num_threads(options.threads)
        print(f"{build}: instruction set {library.instruction_set}, {library.num_threads} threads")
        for kind in options.kinds:
            cache_dtype = torch.float32 if kind == "fp32" else torch.bfloat16
            timers[f"{kind}, {build}"] = Timer(load_model(options.model, kind, library), cache_dtype, positions)

    cases = [(rows, context, True) for context in options.contexts for rows in options.rows]
    prefill = (options.prefill, 0, False)
    samples = measure(timers, [*cases, prefill], options.rounds)

    for name, timer in timers.items():
        weight_bytes = sum(linear.num_bytes for linear in timer.model.linears())
        for context in options.contexts:
            one = statistics.median(samples[name, (options.rows[0], context, True)])
            print(
                f"\n{name}, context {context}: {weight_bytes / one / 1e9:.1f} GB/s of weights at {options.rows[0]} row"
            )
            for rows in options.rows:
                times = samples[name, (rows, context, True)]
                median = statistics.median(times)
                print(f"  {rows:4d} rows  {median * 1e3:8.2f} ms (least {min(times) * 1e3:7.2f})  x{median / one:.2f}")
        median = statistics.median(samples[name, prefill])
        print(f"  prefill of {options.prefill}: {median * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
