"""The parts of the lifted benchmark: each measures one thing and gives its table, its data and its bars."""

import argparse
import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any

import concurrency
import torch
from contest import num_identical, ratio, read_questions, speeds
from gpu_eager import margin_at_divergence
from lifted_bench import Bar, Bench, Options, Section, Spoken, Stream, graphs_line, say, take_turns, timed_steps
from lifted_model import serve_float32

from gorgon_engine.backbone.base import Backbone, ForwardInputs, LogitsFor
from gorgon_engine.engine import Engine, LoadedParts
from gorgon_engine.events import FinishedEvent, TokenEvent
from gorgon_engine.kv_cache import KVCache
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.sequence import SpeculationParams
from gorgon_engine.tree.tree import ancestor_words
from gorgon_protocol.errors import GorgonError

TEMPERATURES = (0.0, 0.7)
CAP_BYTES = 16_000_000_000
PROFILE_NODES = (1, 32)


def measure_one(bench: Bench, options: Options) -> Section:
    """One stream."""
    engine = bench.engine(options)
    prompts = bench.prompts(engine, options.limit)
    rows: list[dict[str, Any]] = []
    for temperature in TEMPERATURES:
        streams = [Stream(name, engine, name == "speculative", temperature) for name in ("plain", "speculative")]
        answers = take_turns(streams, prompts, options.tokens, options.seconds)
        plain, speculative = answers["plain"], answers["speculative"]
        row: dict[str, Any] = {
            "temperature": temperature,
            "num_prompts": len(plain),
            "plain": speeds(plain),
            "speculative": speeds(speculative),
            "ratio": ratio(speculative, plain),
            "tokens_per_step": 1 + sum(a.num_accepted for a in speculative) / sum(a.num_steps for a in speculative),
            "identical": num_identical(speculative, plain),
            "differences": differences(streams[0], prompts, plain, speculative),
        }
        rows.append(row)
        say(one_line(row))
    data = {"kernels": engine.backbone.kernels, "calibration": calibrated(engine), "rows": rows}
    head = (
        f"{'T':>4} {'plain/s':>9} {'spec./s':>9} {'ratio':>7} {'tokens/step':>12} {'first token':>12} {'identical':>11}"
    )
    lines = [head, *map(one_line, rows), *difference_lines(rows), calibration_line(engine), graphs_line(engine)]
    bars = []
    for row, least in zip(rows, (2.2, 1.7), strict=True):
        t = row["temperature"]
        if t == 0.0:
            bars.append(Bar("plain tokens/s, one stream", row["plain"]["tokens_per_second"], 330.0))
        bars.append(Bar(f"speculative / plain, one stream, T={t}", row["ratio"], least))
        share = row["identical"] / row["num_prompts"]
        bars.append(Bar(f"identical answers of {row['num_prompts']}, T={t}", share, 1.0))
    return Section("one", f"One stream, {options.tokens} tokens, medians over the prompts", lines, data, bars)


def one_line(row: dict[str, Any]) -> str:
    plain, speculative = row["plain"], row["speculative"]
    identical = f"{row['identical']} of {row['num_prompts']}"
    return (
        f"{row['temperature']:4.1f} {plain['tokens_per_second']:9.1f} {speculative['tokens_per_second']:9.1f} "
        f"{row['ratio']:7.2f} {row['tokens_per_step']:12.2f} {plain['first_token_seconds'] * 1e3:9.1f} ms "
        f"{identical:>11}"
    )


def differences(
    stream: Stream, prompts: Sequence[list[int]], plain: Sequence[Spoken], other: Sequence[Spoken]
) -> list[dict[str, Any]]:
    """Where two answers part, and how far apart their tokens lie there in (perturbed) logits."""
    found = []
    for number, (one, two) in enumerate(zip(plain, other, strict=True)):
        if one.token_ids != two.token_ids:
            request = stream.request(prompts[number], len(one.token_ids))
            place, margin = margin_at_divergence(stream.engine, request, one.token_ids, two.token_ids)
            found.append({"prompt": number, "token": place, "margin": margin})
    return found


def difference_lines(rows: Sequence[dict[str, Any]], most: int = 8) -> list[str]:
    """The widest margins: near-ties explain themselves."""
    lines = []
    for row in rows:
        widest = sorted(row["differences"], key=lambda one: -one["margin"])
        for one in widest[:most]:
            lines.append(
                f"     T={row['temperature']}, prompt {one['prompt']}: differs at token {one['token']}, "
                f"the two lie {one['margin']:.4f} apart in logits"
            )
        if len(widest) > most:
            lines.append(f"     and {len(widest) - most} more, nearer")
    return lines


def calibrated(engine: Engine) -> dict[str, Any]:
    """What the engine measured of itself, milliseconds."""
    calibration = engine.calibration
    if calibration is None:
        return {}
    model = calibration.cost_model
    return {
        "plain_step": calibration.plain_step_seconds * 1e3,
        "steps_by_rows": {rows: s * 1e3 for rows, s in zip(model.rows, model.seconds, strict=True)},
        "trees": model.draft_seconds * 1e3,
        "heads": None if calibration.costly_draft is None else calibration.costly_draft.first * 1e3,
    }


def calibration_line(engine: Engine) -> str:
    figures = calibrated(engine)
    if not figures:
        return "not calibrated"
    by_rows = ", ".join(f"{rows}: {ms:.2f}" for rows, ms in figures["steps_by_rows"].items())
    heads = "none" if figures["heads"] is None else f"{figures['heads']:.2f}"
    return f"calibrated, ms: steps by rows {by_rows}; trees {figures['trees']:.2f}, heads {heads}"


def measure_steps(bench: Bench, options: Options) -> Section:
    """Steps that always verify so many nodes."""
    rows = {nodes: step_times(bench, options, bench.parts, nodes) for nodes in options.step_nodes}
    plain = rows[1]["milliseconds"]
    lines = [f"{'nodes':>6} {'verified':>9} {'ms':>8} {'plain steps':>12} {'tokens/step':>12} {'steps':>6}  how"]
    for nodes, row in rows.items():
        row["ratio"] = row["milliseconds"] / plain
        lines.append(
            f"{nodes:6} {row['verified']:9.0f} {row['milliseconds']:8.3f} {row['ratio']:12.2f} "
            f"{row['tokens_per_step']:12.2f} {row['num_steps']:6}  {row['how']}"
        )
    bars = [Bar("milliseconds of a plain step", plain, 3.0, at_least=False)]
    if 32 in rows:
        bars.append(
            Bar("plain steps of a step with 32 nodes, drafting included", rows[32]["ratio"], 1.35, at_least=False)
        )
    title = "A step by its nodes, drafting, acceptance and the host included (1 = plain decoding), medians"
    return Section("steps", title, lines, {"rows": rows}, bars)


def step_times(
    bench: Bench, options: Options, parts: LoadedParts, nodes: int, *, num_prompts: int = 3
) -> dict[str, Any]:
    """Medians over the steps of some answers, behind one that warms up."""
    engine = bench.engine(options, parts, adaptive=False, max_nodes=max(nodes, 2))
    stream = Stream("steps", engine, speculate=nodes > 1)
    prompts = bench.prompts(engine, num_prompts)
    timed_steps(engine, stream.request(prompts[0], options.tokens))
    steps = [step for prompt in prompts for step in timed_steps(engine, stream.request(prompt, options.tokens))]
    return {
        "milliseconds": statistics.median(step.seconds for step in steps) * 1e3,
        "verified": statistics.median(step.num_nodes for step in steps),
        "tokens_per_step": statistics.mean(step.num_tokens for step in steps),
        "num_steps": len(steps),
        "how": graphs_line(engine),
    }


def measure_profile(bench: Bench, options: Options) -> Section:
    """What the GPU does in a step, by kernel: of plain decoding, and of a tree of 32."""
    profiles = {nodes: kernel_times(bench, options, nodes) for nodes in PROFILE_NODES}
    names = sorted(
        {name for profile in profiles.values() for name in profile},
        key=lambda name: -profiles[PROFILE_NODES[-1]].get(name, (0.0, 0.0))[1],
    )
    lines = ["".join(f"{f'{nodes} nodes: calls':>18}{'us':>9}" for nodes in PROFILE_NODES) + "  kernel"]
    for name in [*names[:24], "all"]:
        cells = []
        for profile in profiles.values():
            calls, microseconds = profile.get(name, (0.0, 0.0))
            if name == "all":
                calls, microseconds = (sum(column) for column in zip(*profile.values(), strict=True))
            cells.append(f"{calls:18.1f}{microseconds:9.1f}")
        lines.append("".join(cells) + f"  {name[:70]}")
    title = "GPU time of a step by kernel, each from the end of the one in front"
    return Section("profile", title, lines, {"kernels": profiles})


def kernel_times(bench: Bench, options: Options, nodes: int) -> dict[str, tuple[float, float]]:
    """Calls and microseconds of a step by the name of the kernel. One that starts early is charged from the end of the
    one in front: until then it waits."""
    engine = bench.engine(options, adaptive=False, max_nodes=max(nodes, 2))
    stream = Stream("profile", engine, speculate=nodes > 1)
    prompt = bench.prompts(engine, 1)[0]
    stream.answer(prompt, options.tokens)
    engine.submit(stream.request(prompt, options.tokens))
    for _ in range(6):  # the prompt, and steps until they replay
        engine.step()
    num_steps = 0
    on_gpu = bench.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        while engine.has_work:
            num_steps += sum(isinstance(event, TokenEvent) for event in engine.step())
        if on_gpu:
            torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    spans = sorted(
        (event.time_range.end, event.time_range.start, event.key)
        for event in profiler.events()
        if event.device_type == kind
    )
    times: dict[str, tuple[float, float]] = {}
    last = spans[0][1]
    for end, start, name in spans:
        calls, microseconds = times.get(name, (0.0, 0.0))
        times[name] = (calls + 1 / num_steps, microseconds + max(end - max(start, last), 0.0) / num_steps)
        last = max(last, end)
    times["idle"] = (0.0, (last - spans[0][1]) / num_steps - sum(spent for _, spent in times.values()))
    return times


def measure_control(bench: Bench, options: Options) -> Section:
    """Lifted and random layers in turns."""
    control = bench.control()
    rows = {}
    lines = [f"{'nodes':>6} {'lifted ms':>10} {'random ms':>10} {'random / lifted':>16}"]
    for nodes in options.control_nodes:
        turns = [(step_times(bench, options, parts, nodes, num_prompts=1)["milliseconds"])
                 for parts in (bench.parts, control, control, bench.parts)]  # fmt: skip
        lifted, random = statistics.mean([turns[0], turns[3]]), statistics.mean(turns[1:3])
        rows[nodes] = {"lifted": lifted, "random": random, "ratio": random / lifted}
        lines.append(f"{nodes:6} {lifted:10.3f} {random:10.3f} {random / lifted:16.3f}")
    worst = max(rows.values(), key=lambda row: abs(row["ratio"] - 1.0))["ratio"]
    bars = [Bar("random / lifted step time, the furthest from 1", abs(worst - 1.0), 0.02, at_least=False)]
    if not bars[0].is_met:
        lines.append("more than 2 % apart: quote the times of the random layers")
    return Section(
        "control", "Steps of the lifted model and of random weights of its shape", lines, {"rows": rows}, bars
    )


def measure_batches(bench: Bench, options: Options) -> Section:
    """Several streams: as many requests in flight as there are, prefill part of the figures."""
    data, lines, bars = {}, [], []
    for temperature in TEMPERATURES:
        arguments = argparse.Namespace(tokens=options.tokens, temperature=temperature)
        contestants: list[concurrency.Contestant] = []
        for batch in options.batches:
            engine = bench.engine(options, num_slots=batch)
            pair = [concurrency.Contestant(batch, speculate, engine) for speculate in (False, True)]
            for number in range(-1, options.rounds):
                hold_round(pair, number, arguments)
            contestants += pair
            say(f"T={temperature}, {batch} streams\n{concurrency.table(concurrency.report(pair))}")
        rows = concurrency.report(contestants)
        data[str(temperature)] = rows
        lines += [f"T={temperature}", concurrency.table(rows)]
        bars += [
            Bar(f"speculative / plain, {row['streams']} streams, T={temperature}", row["ratio"], 0.98) for row in rows
        ]
        for contestant in contestants:
            del contestant.engine  # and its cache, before the next ones are made
    return Section("batches", "Several streams: tokens/s of all together", lines, {"rows": data}, bars)


def hold_round(pair: Sequence[concurrency.Contestant], number: int, arguments: argparse.Namespace) -> None:
    """The same questions to both, one after the other: what a GPU still runs must not be charged to the next.
    Round -1 warms up and is forgotten."""
    questions = read_questions(80)
    for contestant in pair if number % 2 else reversed(pair):
        count = contestant.num_streams * 2 + contestant.num_streams // 2
        chosen = list(islice(cycle(questions), 17 * (number + 1), 17 * (number + 1) + count))
        one = concurrency.Round(concurrency.requests_of(contestant, chosen, arguments))
        while not one.is_over:
            one.step(contestant)
        one.finish(contestant.engine)
        if number >= 0:
            contestant.rounds.append(one)


def check(bench: Bench, options: Options) -> Section:
    """Whether the lifted model says what the small one says."""
    small = bench.plain_engine(serve_float32(bench.small), options)
    prompts = bench.prompts(small, options.check_prompts)
    want = [Stream("small", small, False).answer(prompt, options.check_tokens).token_ids for prompt in prompts]
    logits = [forced_logits(small.backbone, prompt, said) for prompt, said in zip(prompts, want, strict=True)]
    served = [forced_logits(bench.parts.backbone, prompt, said) for prompt, said in zip(prompts, want, strict=True)]
    disagreements = []
    for number, (ours, theirs) in enumerate(zip(served, logits, strict=True)):
        best, said = theirs.max(dim=-1), ours.argmax(dim=-1)
        for place in (said != best.indices).nonzero().flatten().tolist():
            margin = float(best.values[place] - theirs[place, min(int(said[place]), theirs.shape[1] - 1)])
            disagreements.append({"prompt": number, "token": place, "margin": margin})
    num_places = sum(map(len, want))
    agreement = 1.0 - len(disagreements) / num_places
    large = bench.plain_engine(serve_float32(bench.lifted()), options)
    stream = Stream("lifted", large, False)
    given = [stream.answer(prompt, options.check_tokens) for prompt in prompts]
    exact = sum(one.token_ids == other for one, other in zip(given, want, strict=True))
    disagreements.sort(key=lambda one: -one["margin"])
    lines = [
        f"float32, dequantised: {exact} of {len(prompts)} answers of {options.check_tokens} tokens identical",
        f"{bench.parts.backbone.kernels}, teacher-forced: {num_places - len(disagreements)} of {num_places} likeliest "
        f"tokens agree ({agreement:.2%})",
        "  the small model's margins where not: " + ", ".join(f"{one['margin']:.3f}" for one in disagreements[:16]),
    ]
    data = {"identical": exact, "num_prompts": len(prompts), "agreement": agreement, "disagreements": disagreements}
    bars = [
        Bar(f"identical answers of {len(prompts)} in float32", exact / len(prompts), 1.0),
        Bar("teacher-forced agreement as served", agreement, 0.98),
    ]
    return Section("checks", "The lifted model against the small one", lines, data, bars)


@torch.inference_mode()
def forced_logits(backbone: Backbone, prompt: Sequence[int], said: Sequence[int]) -> torch.Tensor:
    """What predicts each token of an answer: [T, V] float32, the prompt prefilled, the answer verified as a tree
    that is one path, in pieces of 16 nodes: as deep as trees are."""
    config, device = backbone.config, backbone.device
    cache = KVCache(
        num_layers=config.num_layers,
        num_slots=1,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        capacity=len(prompt) + len(said),
        max_scratch=64,
        dtype=backbone.cache_dtype,
        device=device,
    )
    slot = cache.acquire()
    head = torch.tensor(prompt[:-1], device=device)
    inputs = ForwardInputs.chain(head, slot=slot, length=0, prompt_length=len(prompt))
    backbone.forward(inputs, cache, logits_for=LogitsFor.NONE)
    cache.append(torch.tensor([slot], device=device), len(head))
    rows = torch.tensor([*prompt[-1:], *said[:-1]], device=device)
    length, logits = len(head), []
    for piece in rows.split(16):
        places = torch.arange(len(piece), device=device)[None]
        inputs = ForwardInputs(
            tokens=piece[None],
            depths=places,
            slots=torch.tensor([slot], device=device),
            lengths=torch.tensor([length], device=device),
            num_rows=torch.tensor([len(piece)], device=device),
            prompt_lengths=torch.tensor([len(prompt)], device=device),
            max_positions=length + len(piece),
            ancestors=ancestor_words(places - 1),
        )
        logits.append(backbone.forward(inputs, cache).logits[0].float())
        # The path's keys and values lie where they are to stay.
        cache.append(torch.tensor([slot], device=device), len(piece))
        length += len(piece)
    return torch.cat(logits)


def measure_memory(bench: Bench, options: Options) -> Section:
    """Peaks of torch's allocator while the model is made and while it serves; the CUDA context of some 0.5 GB lies
    beside."""
    rows: list[dict[str, Any]] = []
    with capped(bench.device, CAP_BYTES):
        rows.append(try_long(bench, options, num_slots=1, speculate=False))
    rows.append(try_long(bench, options, num_slots=8, speculate=True))
    rows[0]["what"] = f"one sequence of {options.long_context}, under a cap of 16 GB"
    rows[1]["what"] = f"eight of {options.long_context}, with heads"
    lines = [f"{'':44} {'':12} {'loading GB':>11} {'serving GB':>11}"]
    for row in rows:
        peaks = "".join(
            f" {'-' if row[name] is None else format(row[name], '.2f'):>11}" for name in ("loading", "serving")
        )
        lines.append(f"{row['what']:44} {'fits' if row['fits'] else 'DOES NOT FIT':12}{peaks}")
    bars = [Bar("one long sequence fits under 16 GB (1 = yes)", float(rows[0]["fits"]), 1.0)]
    return Section("memory", "Peak memory of the GPU", lines, {"rows": rows}, bars)


def try_long(bench: Bench, options: Options, *, num_slots: int, speculate: bool) -> dict[str, Any]:
    """Run sequences that nearly fill the context: whether they fit, and the peaks in GB, None without a GPU."""
    row: dict[str, Any] = {"fits": False, "loading": None, "serving": None}
    room = min(64, options.long_context // 4)
    start_peak(bench.device)
    try:
        parts = bench.parts
        row["loading"] = peak_gigabytes(bench.device)
        start_peak(bench.device)
        if not speculate:
            parts = LoadedParts(parts.backbone, parts.tokenizer, drafters=(), notices=())
        engine = bench.engine(options, parts, num_slots=num_slots, context=options.long_context)
        prompt = bench.prompts(engine, 1)[0]
        whole = list(islice(cycle(prompt), options.long_context - room))
        sampling = SamplingParams(max_tokens=room, ignore_eos=True)
        requests = [
            engine.request([*whole[number:], *whole[:number]], sampling, SpeculationParams(enabled=speculate))
            for number in range(num_slots)
        ]
        row["fits"] = sum(isinstance(event, FinishedEvent) for event in engine.generate(*requests)) == num_slots
    except (torch.OutOfMemoryError, GorgonError) as error:
        say(f"does not fit: {str(error).splitlines()[0]}")
    row["serving"] = peak_gigabytes(bench.device)
    return row


def start_peak(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gigabytes(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None


@contextmanager
def capped(device: torch.device, num_bytes: int) -> Iterator[None]:
    """Torch's allocator may hold so many bytes and no more."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(num_bytes / total, 1.0))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# In the order in which they run: the capped one before anything else has been allocated.
PARTS: dict[str, Callable[[Bench, Options], Section]] = {
    "memory": measure_memory,
    "checks": check,
    "steps": measure_steps,
    "profile": measure_profile,
    "control": measure_control,
    "one": measure_one,
    "batches": measure_batches,
}
