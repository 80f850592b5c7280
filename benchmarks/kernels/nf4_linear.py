"""NF4 products of Llama-3-8B's layers on a GPU: first whether they are right, then what they cost.

    python benchmarks/kernels/nf4_linear.py [--rows 1,2,4,8,16,32,64] [--variants registers,shared]

Right: every variant and plan on fresh random weights and rows, against the float32 product of the dequantised matrix,
and bit by bit: a row alone against the same row among 64, and against the portable kernel.

Cost: CUDA graphs over distinct weights of more than three times the L2 cache, medians. Per product, microseconds,
without the sum over partial sums (the next operator's); then the 128 products of 32 layers in order, over 3.7 GB of
distinct weights, without and with a kernel of their own for the sums. Beside them bitsandbytes, where it can be
imported, and torch's bfloat16 product. About a minute; the tables come last.
"""

import argparse
import concurrent.futures
import functools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gorgon_engine.kernels.triton.nf4_linear import Nf4Variant, nf4_linear, sum_partials
from gorgon_engine.kernels.triton.nf4_packing import BLOCK_WORDS, WORDS, PackedNf4, pack_nf4, reference_weights
from gorgon_engine.kernels.triton.nf4_plan import Nf4Plan, choose_tile, nf4_plans
from gorgon_engine.models.nf4 import NF4_CODE
from gorgon_protocol.errors import ModelError

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
Times = dict[str, dict[int, float]]  # by what computes it, by rows

NUM_LAYERS = 32
POOL_BYTES = 170_000_000
MIN_PROGRAMS, MAX_PROGRAMS = 96, 132


@dataclass(frozen=True, slots=True)
class Config:
    variant: Nf4Variant
    plan: Nf4Plan

    def __str__(self) -> str:
        plan = self.plan
        return f"{self.variant} {plan.num_programs} programs, {plan.inner_splits} inner, {plan.num_partials} partial"

    def takes(self, num_rows: int) -> bool:
        try:
            choose_tile(num_rows, self.plan.inner_splits, shared_weights=self.variant is Nf4Variant.SHARED)
        except ModelError:
            return False
        return True


def configs(name: str, variants: Iterable[Nf4Variant]) -> list[Config]:
    out_features, in_features = SHAPES[name]
    plans = nf4_plans(out_features // 64, in_features // 256)
    fitting = [plan for plan in plans if MIN_PROGRAMS <= plan.num_programs <= MAX_PROGRAMS]
    return [Config(variant, plan) for variant in variants for plan in fitting]


def random_rows(num_rows: int, size: int) -> Tensor:
    return torch.randn(num_rows, size, device="cuda").bfloat16()


def random_weight(out_features: int, in_features: int) -> PackedNf4:
    """Through the packing, for the checks."""
    num_weights = out_features * in_features
    packed = torch.randint(0, 256, (num_weights // 2,), dtype=torch.uint8, device="cuda")
    absmax = torch.rand(num_weights // 64, device="cuda") * 0.05 + 0.01
    return pack_nf4(packed, absmax, torch.tensor(NF4_CODE, device="cuda"), out_features, in_features)


def random_blocks(like: PackedNf4) -> PackedNf4:
    """Fresh blocks, for the clock: no packing."""
    words = torch.randint(-(2**31), 2**31 - 1, (like.words.numel(),), dtype=torch.int32, device="cuda")
    blocks = words.view(-1, BLOCK_WORDS)
    scales = torch.rand(blocks.shape[0], 2 * (BLOCK_WORDS - WORDS), device="cuda") * 0.05 + 0.01
    blocks[:, WORDS:] = scales.bfloat16().view(torch.int32)
    return PackedNf4(words, like.code, like.table, like.out_features, like.in_features)


def graph_milliseconds(run: Callable[[], object], replays: int = 8, repeats: int = 5) -> float:
    """Median time of one replay of a CUDA graph of `run`."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times = []
    for _ in range(repeats):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(replays):
            graph.replay()
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended) / replays)
    return statistics.median(times)


def compile_one(variant: Nf4Variant, inner_splits: int, num_rows: int) -> None:
    weight = random_weight(256, 256 * inner_splits)
    plan = Nf4Plan(weight.num_row_blocks, weight.num_input_blocks, inner_splits, inner_splits)
    if Config(variant, plan).takes(num_rows):
        nf4_linear(random_rows(num_rows, weight.in_features), weight, plan, variant=variant)
        torch.cuda.synchronize()


def compile_all(variants: Sequence[Nf4Variant], rows: Sequence[int]) -> None:
    """In processes beside each other: the compiled kernels come back through Triton's cache on disk."""
    tiles = sorted({min(max(8, 1 << (count - 1).bit_length()), 64) for count in rows})
    jobs = [(variant, inner, count) for variant in variants for inner in (1, 2, 4) for count in tiles]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(12, multiprocessing.cpu_count()), mp_context=context) as pool:
        for job in [pool.submit(compile_one, *job) for job in jobs]:
            job.result()


def check(variants: Sequence[Nf4Variant], rows: Sequence[int]) -> dict[str, list[Config]]:
    """The configurations by product that are right, and whose rows' bits do not depend on their company."""
    good: dict[str, list[Config]] = {name: [] for name in SHAPES}
    print(f"{'product':8} {'variant and plan':46} {'error':>8}  row alone = among others  = portable kernel")
    for name, shape in SHAPES.items():
        weight, x = random_weight(*shape), random_rows(max(rows), shape[1])
        want = x.float() @ reference_weights(weight).T
        for config in configs(name, variants):
            counts = [count for count in rows if config.takes(count)]
            outs = {}
            for count in counts:
                partials = nf4_linear(x[:count].contiguous(), weight, config.plan, variant=config.variant)
                outs[count] = partials, torch.empty(count, shape[0], dtype=torch.bfloat16, device="cuda")
                sum_partials(*outs[count])
            error = max(
                ((out.float() - want[:count]).norm() / want[:count].norm()).item() for count, (_, out) in outs.items()
            )
            most = outs[counts[-1]][0]
            same = all(torch.equal(partials, most[:, :count]) for count, (partials, _) in outs.items())
            given = x[: counts[-1]].contiguous()
            portable = nf4_linear(given, weight, config.plan, variant=Nf4Variant.PORTABLE)
            print(f"{name:8} {config!s:46} {error:8.1e}  {same!s:24}  {torch.equal(most, portable)}", flush=True)
            if error < 1e-2 and same:
                good[name].append(config)
    return good


def time_product(name: str, good: Sequence[Config], rows: Sequence[int]) -> Times:
    """Microseconds of one product."""
    shape = SHAPES[name]
    first = random_weight(*shape)
    pool = [first, *(random_blocks(first) for _ in range(max(2, POOL_BYTES // first.num_bytes)))]
    times: Times = {}
    for config in good:
        line = times[str(config)] = {}
        for count in filter(config.takes, rows):
            out = torch.empty(config.plan.num_partials, count, shape[0], device="cuda")
            product = functools.partial(nf4_linear, plan=config.plan, partials=out, variant=config.variant)
            line[count] = pool_microseconds(product, pool, count, shape[1])
    del pool
    dense = [random_rows(*shape) for _ in range(max(2, POOL_BYTES // (2 * first.out_features * first.in_features)))]
    transposed = [weight.T for weight in dense]
    times["torch bfloat16"] = {count: pool_microseconds(torch.matmul, transposed, count, shape[1]) for count in rows}
    if (quantized := bitsandbytes_pool(dense)) is not None:
        times["bitsandbytes"] = {count: pool_microseconds(*quantized, count, shape[1]) for count in rows}
    return times


def pool_microseconds(
    product: Callable[[Tensor, Any], object], weights: Sequence[object], num_rows: int, size: int
) -> float:
    x = random_rows(num_rows, size)

    def run() -> None:
        for weight in weights:
            product(x, weight)

    return graph_milliseconds(run) / len(weights) * 1e3


def bitsandbytes_pool(dense: Sequence[Tensor]) -> tuple[Callable[[Tensor, Any], object], list[object]] | None:
    """bitsandbytes' product and its weights, four times as many to be as many bytes. None where it cannot run."""
    try:
        import bitsandbytes

        quantized = [
            bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
            for weight in dense
            for _ in range(4)
        ]
    except (ImportError, OSError, RuntimeError) as error:
        print(f"bitsandbytes cannot run here: {error}")
        return None
    return lambda x, pair: bitsandbytes.matmul_4bit(x, pair[0].t(), quant_state=pair[1]), quantized


def time_layers(
    table: dict[str, Times], good: dict[str, list[Config]], variants: Sequence[Nf4Variant], rows: Sequence[int]
) -> list[str]:
    """Lines of milliseconds for the products of all layers, each by the plans that were best for the most rows, which
    are one choice for all rows: row-invariance asks for it."""
    seeds = {name: random_weight(*shape) for name, shape in SHAPES.items()}
    layers = [[(name, random_blocks(seed)) for name, seed in seeds.items()] for _ in range(NUM_LAYERS)]
    lines = []
    for variant in variants:
        for whole_gate in (False, True):
            chosen = {}
            for name, all_good in good.items():
                able = [config for config in all_good if config.variant is variant]
                best = best_config(table[name], able, rows, whole=whole_gate if name == "gate_up" else None)
                if best is not None:
                    chosen[name] = best
            if len(chosen) < len(SHAPES):
                continue
            for with_sums in (False, True):
                times = [layers_milliseconds(layers, chosen, count, with_sums=with_sums) for count in rows]
                what = f"{variant}{', gate_up whole' if whole_gate else ''}{', with sums' if with_sums else ''}"
                lines.append(f"{what:40}" + "".join(f"{value:8.3f}" for value in times))
            lines += [f"    {name}: {config}" for name, config in chosen.items()]
    return lines


def best_config(times: Times, good: Sequence[Config], rows: Sequence[int], *, whole: bool | None) -> Config | None:
    """The fastest over all rows together, of those that take them all. whole: of those that leave whole sums, or
    partial ones."""
    able = [config for config in good if all(map(config.takes, rows))]
    if whole is not None:
        able = [config for config in able if (config.plan.num_partials == 1) == whole]
    return min(able, key=lambda config: sum(times[str(config)].values()), default=None)


def layers_milliseconds(
    layers: Sequence[Sequence[tuple[str, PackedNf4]]], chosen: dict[str, Config], num_rows: int, *, with_sums: bool
) -> float:
    inputs = {size: random_rows(num_rows, size) for _, size in SHAPES.values()}
    partials = {
        name: torch.empty(config.plan.num_partials, num_rows, SHAPES[name][0], device="cuda")
        for name, config in chosen.items()
    }
    outs = {
        name: torch.empty(num_rows, shape[0], dtype=torch.bfloat16, device="cuda") for name, shape in SHAPES.items()
    }

    def run() -> None:
        for layer in layers:
            for name, weight in layer:
                config = chosen[name]
                x = inputs[weight.in_features]
                nf4_linear(x, weight, config.plan, partials=partials[name], variant=config.variant)
                if with_sums:
                    sum_partials(partials[name], outs[name])

    return graph_milliseconds(run, replays=3)


def print_tables(table: dict[str, Times], layers: Sequence[str], rows: Sequence[int]) -> None:
    header = "".join(f"{count:8}" for count in rows)
    print(f"\nMicroseconds a product, by rows; partial sums not yet added\n{'':57}{header}")
    for name, lines in table.items():
        for what, times in lines.items():
            values = "".join(f"{times[count]:8.2f}" if count in times else f"{'-':>8}" for count in rows)
            print(f"{name:9}{what:48}{values}")
    print(f"\nMilliseconds for {NUM_LAYERS} layers, by rows\n{'':40}{header}")
    for what in ("torch bfloat16", "bitsandbytes"):
        if all(what in lines for lines in table.values()):
            sums = [sum(lines[what][count] for lines in table.values()) * NUM_LAYERS / 1e3 for count in rows]
            print(f"{what + ' (sum of the above)':40}" + "".join(f"{value:8.3f}" for value in sums))
    print("\n".join(layers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,2,4,8,16,32,64")
    parser.add_argument("--variants", default="registers,shared")
    arguments = parser.parse_args()
    rows = sorted(int(count) for count in arguments.rows.split(","))
    variants = [Nf4Variant(name) for name in arguments.variants.split(",")]
    if not torch.cuda.is_available():
        raise SystemExit("nf4_linear: there is no CUDA GPU here, and nothing to measure without one")
    began = time.perf_counter()
    if Nf4Variant.PORTABLE not in variants:
        compile_all(variants, rows)
    print(f"compiled after {time.perf_counter() - began:.0f} s", flush=True)
    good = check(variants, rows)
    print(f"checked after {time.perf_counter() - began:.0f} s", flush=True)
    table = {name: time_product(name, good[name], rows) for name in SHAPES}
    layers = time_layers(table, good, variants, rows)
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.perf_counter() - began:.0f} s")
    print_tables(table, layers, rows)
    wrong = sum(len(configs(name, variants)) - len(good[name]) for name in SHAPES)
    if wrong:
        raise SystemExit(f"nf4_linear: {wrong} of the checks above failed; what failed was not timed")


if __name__ == "__main__":
    main()
