"""The step on a GPU, eagerly: does it run, what does it cost, how often does it synchronise?

    python benchmarks/engine/gpu_eager.py --model FOLDER [--tokens 128]

For bf16 and NF4: tokens/s plain and with prompt lookup, identity of the two, and the synchronising calls of one step as
`torch.cuda.set_sync_debug_mode` reports them. Eager mode is bound by the host; CUDA graphs are what the speed needs.
"""

import argparse
import collections
import json
import statistics
import time
import traceback
import warnings
from pathlib import Path

import torch

from gorgon_engine.backbone.select import BackboneOptions
from gorgon_engine.engine import Engine, EngineConfig
from gorgon_engine.events import FinishedEvent, TokenEvent
from gorgon_engine.models.loading import Quantization
from gorgon_engine.random import gumbel_noise
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.sequence import Request, SpeculationParams

PROMPTS = Path(__file__).parents[1] / "data" / "mt_bench.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=6)
    arguments = parser.parse_args()
    questions = [json.loads(line)["turns"][0] for line in PROMPTS.read_text().splitlines()]
    questions = questions[:: len(questions) // arguments.prompts]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for quantization in (Quantization.NONE, Quantization.NF4):
        options = BackboneOptions(quantization=quantization, dtype=torch.bfloat16, device="cuda")
        began = time.perf_counter()
        config = EngineConfig(model=arguments.model, backbone=options, context=2048, max_nodes=16)
        engine = Engine.load(config)
        assert engine.calibration is not None
        costs = dict(zip(engine.calibration.cost_model.rows, engine.calibration.cost_model.seconds, strict=True))
        print(f"\n{engine.backbone.kernels}: loaded in {time.perf_counter() - began:.1f} s")
        print("step milliseconds by rows:", {rows: round(seconds * 1e3, 2) for rows, seconds in costs.items()})
        for temperature in (0.0, 0.7):
            measure(engine, questions, arguments.tokens, temperature)
        count_synchronisations(engine, questions[0])


def measure(engine: Engine, questions: list[str], tokens: int, temperature: float) -> None:
    rates: dict[bool, list[float]] = {False: [], True: []}
    lengths, identical, margins = [], 0, []
    for question in questions:
        outputs = {}
        for speculate in (False, True):
            request = engine.request(
                [{"role": "user", "content": question}],
                SamplingParams(max_tokens=tokens, temperature=temperature, seed=1),
                SpeculationParams(enabled=speculate),
            )
            events = list(engine.generate(request))
            end = events[-1]
            assert isinstance(end, FinishedEvent)
            outputs[speculate] = [t for e in events if isinstance(e, TokenEvent) for t in e.token_ids]
            rates[speculate].append(end.tokens_per_second or 0.0)
            if speculate:
                lengths.append(end.metrics.mean_acceptance_length)
        if outputs[False] == outputs[True]:
            identical += 1
        else:
            margins.append(margin_at_divergence(engine, request, outputs[False], outputs[True]))
    plain, speculative = statistics.median(rates[False]), statistics.median(rates[True])
    print(
        f"T={temperature}: plain {plain:.1f} tokens/s, lookup {speculative:.1f} ({speculative / plain:.2f}x), "
        f"{statistics.mean(lengths):.2f} tokens/step, identical {identical} of {len(questions)}"
    )
    for place, margin in margins:
        print(f"  differs at token {place}: the two tokens lie {margin:.4f} apart in (perturbed) logits")


def margin_at_divergence(engine: Engine, request: Request, plain: list[int], other: list[int]) -> tuple[int, float]:
    """Where two outputs part, and how far apart the two tokens are there: in logits over the temperature, with the
    random number's noise, recomputed by one prefill of the common text."""
    place = next(i for i, (a, b) in enumerate(zip(plain, other, strict=False)) if a != b)
    tokens = [*request.prompt, *plain[:place]]
    again = engine.request(tokens, SamplingParams(max_tokens=1, logprobs=20))
    event = next(e for e in engine.generate(again) if isinstance(e, TokenEvent))
    assert event.logprobs is not None
    logprobs = dict(event.logprobs[0].top)
    sampling = request.sampling
    values = []
    for token in (plain[place], other[place]):
        value = logprobs.get(token, float("-inf")) / (sampling.temperature or 1.0)
        if sampling.temperature:
            seed, position = torch.tensor(sampling.seed), torch.tensor(len(tokens))
            value += float(gumbel_noise(seed, position, engine.backbone.config.vocab_size)[token])
        values.append(value)
    return place, abs(values[0] - values[1])


def count_synchronisations(engine: Engine, question: str) -> None:
    """Warnings of the sync debug mode over twenty steps, by the line of ours that caused them."""
    request = engine.request([{"role": "user", "content": question}], SamplingParams(max_tokens=200, ignore_eos=True))
    engine.submit(request)
    for _ in range(5):
        engine.step()
    places: collections.Counter[str] = collections.Counter()

    def note(message: Warning | str, *_: object, **__: object) -> None:
        if "synchroniz" in str(message):
            ours = [frame for frame in traceback.extract_stack() if "gorgon_engine" in frame.filename]
            places[f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "elsewhere"] += 1

    steps = 20
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        for _ in range(steps):
            engine.step()
        torch.cuda.set_sync_debug_mode("default")
    engine.abort()
    total = sum(places.values())
    print(f"synchronisations a step: {total / steps:.2f}  {dict(places)}")


if __name__ == "__main__":
    main()
