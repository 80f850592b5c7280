"""What speculation brings at the cost of Llama-3-8B: SmolLM2-135M in NF4 inside its matrices, plain and speculative.

    python benchmarks/engine/lifted.py [--one] [--steps] [--batches] [--checks] [--profile] [--control]
        [--memory] [--json FILE]

The weights of Llama-3-8B are gated. The model measured here has exactly its shapes and computes exactly what SmolLM2
computes (`lifting`): a step costs what it costs there, while text and acceptance are SmolLM2's and its heads'. Both
contestants are one engine with the same kernels, asked in turns. Each part, all of them unless some are named:

--memory    peak of one sequence of 4,096 positions under a 16 GB cap; of eight with heads
--checks    float32: the tokens of the small model itself; as served: its likeliest tokens, teacher-forced
--steps     milliseconds of a step by its nodes, drafting included
--profile   the GPU's time of a step by kernel, with 1 node and with 32
--control   the same with random layers: the zeros of lifted matrices must not be what makes them fast
--one       one stream over MT-bench, greedy and at T=0.7: tokens/s, tokens a step, identity
--batches   8 and 32 streams: tokens/s of all together

Each takes one to three minutes on a data-centre GPU. The tables come last, behind them the figures that have a bar.
"""

import argparse
import gc
import json
import os
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lifted_bench import Bench, Options, Section, say
from lifted_parts import PARTS
from lifting import LLAMA_3_8B

from gorgon_engine.models.catalog import resolve_model
from gorgon_engine.runtime import silence_libraries
from gorgon_protocol.errors import GorgonError


def run_parts(
    bench: Bench, options: Options, names: Sequence[str], path: Path | None
) -> tuple[list[Section], list[str]]:
    """The parts in order, and the names of those that broke: one must not cost the others. What is measured is in the
    file as soon as it is."""
    sections: list[Section] = []
    broken = []
    for name in names:
        began = time.perf_counter()
        try:
            section = PARTS[name](bench, options)
        except Exception:  # whatever breaks in one part: GPU time is short, and the traceback says it
            traceback.print_exc()
            broken.append(name)
        else:
            sections.append(section)
            say(section.text())
            say(f"{name}: {time.perf_counter() - began:.0f} s")
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        if path is not None:
            write_json(
                path, {"hardware": hardware(bench.device), "parts": [asdict(one) for one in sections], "broken": broken}
            )
    return sections, broken


def write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def hardware(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a folder or a catalogue name: what is lifted")
    parser.add_argument("--heads", type=Path, help="EAGLE heads for it; those that come with the program if left out")
    for name in PARTS:
        parser.add_argument(f"--{name}", action="store_true")
    usual = Options()
    parser.add_argument("--limit", type=int, default=usual.limit, help="questions of one stream")
    parser.add_argument("--tokens", type=int, default=usual.tokens, help="of an answer")
    parser.add_argument("--seconds", type=float, default=usual.seconds, help="of one stream, for each temperature")
    parser.add_argument("--no-graphs", action="store_true", help="launch every step kernel by kernel")
    parser.add_argument("--no-run-ahead", action="store_true", help="read each step before the next is launched")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("lifted: there is no CUDA GPU here, and nothing to measure without one")
    silence_libraries()
    options = Options(limit=arguments.limit, tokens=arguments.tokens, seconds=arguments.seconds)
    names = [name for name in PARTS if getattr(arguments, name)] or list(PARTS)
    device = torch.device("cuda")
    try:
        bench = Bench(
            resolve_model(arguments.model),
            LLAMA_3_8B,
            device=device,
            heads=arguments.heads,
            graphs=not arguments.no_graphs,
            run_ahead=not arguments.no_run_ahead,
        )
        sections, broken = run_parts(bench, options, names, arguments.json)
    except GorgonError as error:
        raise SystemExit(f"lifted: {error}") from error
    say(f"\n{hardware(device)}: the shape of Llama-3-8B in NF4, text and acceptance of SmolLM2-135M")
    for section in sections:
        say(section.text())
    say("\nBars")
    for bar in (bar for section in sections for bar in section.bars):
        say(bar.line())
    if broken:
        raise SystemExit(f"lifted: {', '.join(broken)} broke, see above")


if __name__ == "__main__":
    main()
