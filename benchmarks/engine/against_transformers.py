"""Decoding against transformers' `generate`, in one process on the same prompts.

    python benchmarks/engine/against_transformers.py [--model FOLDER] [--prompts 8] [--tokens 64] [--threads N] [--json]

Contestants: transformers in float32 and bfloat16 (its default attention and cache); this engine without speculation in
float32, bfloat16 and int8, and as it is by default (int8, prompt lookup). Greedy, past the end of sequence, every
prompt to all of them in turn. Ratios are medians over prompts, to transformers of either dtype; `identical to` counts
the answers whose tokens are transformers' own of that dtype, all of them. A bfloat16 answer may part from another
bfloat16 one where two tokens almost tie; float32 ones must not.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import contest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from gorgon_engine.backbone.select import BackboneOptions
from gorgon_engine.engine import Engine, EngineConfig
from gorgon_engine.kernels.cpu.library import default_num_threads
from gorgon_engine.models.catalog import resolve_model
from gorgon_protocol.errors import GorgonError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BASELINES = tuple(f"transformers {dtype}" for dtype in DTYPES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="folder or catalogue name (default: smollm2)")
    parser.add_argument("--prompts", type=int, default=8, help="questions of MT-bench (default: 8)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens an answer (default: 64)")
    parser.add_argument("--threads", type=int, default=default_num_threads(), help="default: physical cores")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.prompts < 1 or arguments.tokens < 2 or arguments.threads < 1:
        parser.error("--prompts and --threads must be at least 1, --tokens at least 2")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        report = run(resolve_model(arguments.model), arguments.prompts, arguments.tokens, arguments.threads)
    except GorgonError as error:
        sys.exit(f"against_transformers: {error}")
    if arguments.json:
        print(json.dumps(report))
        return
    print(contest.table(report, BASELINES))
    identical = report["identical"]
    print(", ".join(f"{name}: {count} of {report['num_prompts']}" for name, count in identical.items()))
    print(f"mean acceptance length of the default: {report['mean_acceptance_length']:.2f} tokens/step")


def run(folder: Path, num_prompts: int, num_tokens: int, num_threads: int) -> dict[str, Any]:
    torch.set_num_threads(num_threads)  # loading
    baselines = [Transformers(folder, dtype, num_threads) for dtype in DTYPES]
    engines = {
        "float32": load(folder, num_threads, BackboneOptions(dtype=torch.float32, device="cpu")),
        "bfloat16": load(folder, num_threads, BackboneOptions(dtype=torch.bfloat16, device="cpu")),
        "int8": load(folder, num_threads, BackboneOptions(device="cpu")),
    }
    plain = [
        contest.EngineContestant(f"gorgon {name} plain", engine, speculate=False, num_threads=num_threads)
        for name, engine in engines.items()
    ]
    default = contest.EngineContestant("gorgon default", engines["int8"], speculate=True, num_threads=num_threads)
    any_engine = engines["int8"]
    prompts = [
        list(any_engine.request([{"role": "user", "content": question}]).prompt)
        for question in contest.read_questions(num_prompts)
    ]
    answers = contest.hold([*baselines, *plain, default], prompts, num_tokens)
    lengths = default.mean_acceptance_lengths[1:]  # without the unmeasured answer
    return {
        "contestants": {
            name: contest.speeds(own)
            | {"ratios": {baseline: contest.ratio(own, answers[baseline]) for baseline in BASELINES}}
            for name, own in answers.items()
        },
        "identical": {
            f"gorgon {dtype} plain identical to transformers {dtype}": contest.num_identical(
                answers[f"gorgon {dtype} plain"], answers[f"transformers {dtype}"]
            )
            for dtype in DTYPES
        }
        | {
            "gorgon default identical to gorgon int8 plain": contest.num_identical(
                answers["gorgon default"], answers["gorgon int8 plain"]
            )
        },
        "mean_acceptance_length": sum(lengths) / len(lengths),
        "num_prompts": len(prompts),
        "num_tokens": num_tokens,
        "num_threads": num_threads,
        "kernels": {name: engine.backbone.kernels for name, engine in engines.items()},
    }


def load(folder: Path, num_threads: int, options: BackboneOptions) -> Engine:
    """One thread for torch while the engine measures itself: with more, its tree sizes would be those of a slower
    machine."""
    torch.set_num_threads(1)
    engine = Engine.load(EngineConfig(model=str(folder), backbone=options))
    contest.use_engine_threads(engine, num_threads)
    return engine


class Transformers:
    """`generate` as its documentation shows it."""

    def __init__(self, folder: Path, dtype: str, num_threads: int) -> None:
        self.name = f"transformers {dtype}"
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
        self._model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # no end-of-sequence token
        self._num_threads = num_threads

    def answer(self, prompt_ids: list[int], num_tokens: int) -> contest.Answer:
        torch.set_num_threads(self._num_threads)
        prompt = torch.tensor([prompt_ids])
        clock = _Clock()
        began = time.perf_counter()
        output = self._model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=num_tokens, streamer=clock
        )
        token_ids = output[0, len(prompt_ids) :].tolist()
        assert len(token_ids) == num_tokens == len(clock.times), (len(token_ids), len(clock.times))
        return contest.Answer(token_ids, clock.times[0] - began, clock.times[-1] - clock.times[0])


class _Clock(BaseStreamer):
    """When each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._saw_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._saw_prompt:
            self.times.append(time.perf_counter())
        self._saw_prompt = True

    def end(self) -> None:
        pass


if __name__ == "__main__":
    main()
