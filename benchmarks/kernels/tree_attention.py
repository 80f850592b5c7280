"""Tree attention on a GPU: is it right, does a row keep its bits, and what does it take beside what exists?

    python benchmarks/kernels/tree_attention.py              # the table, about a minute
    python benchmarks/kernels/tree_attention.py --variants   # what the plan's fields do to a few of its cells

The shape of Llama-3-8B: 32 query heads, 8 KV heads of 128, bf16. Checks come first, on fresh random inputs. Times are
medians of CUDA-graph replays in which every call reads another cache, so that none of it lies in L2. Baselines are
given what helps them: SDPA gets a ready mask and packed query heads, the loop over branches ready keys and values, Flex
attention a ready block mask. Batches are ragged: i/8 of the context.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from gorgon_engine.kernels.tree_attention import attention_mask
from gorgon_engine.kernels.triton.tree_attention import reference, tree_attention
from gorgon_engine.kernels.triton.tree_attention_plan import TreeAttentionPlan, TreeAttentionWorkspace
from gorgon_engine.tree.tree import ancestor_words

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
GROUP = NUM_HEADS // NUM_KV_HEADS
MAX_DEPTH = 15
NODES = (1, 4, 8, 16, 32, 64, 128)
CONTEXTS = (512, 2048, 8192)
BATCHES = (1, 8)
ROTATED_BYTES = 160_000_000  # three times the L2 cache of an H100
MEASURED_BYTES_PER_SECOND = 3.0e12


@dataclass(frozen=True, slots=True)
class Case:
    """One cell of the table: a cache of several copies of B sequences, and a tree for each of them."""

    context: int
    keys: Tensor  # [copies * B, G, P, D]
    values: Tensor
    lengths: Tensor  # [B]
    parents: Tensor  # [B, N]
    ancestors: Tensor  # [B, N, W]
    query: Tensor  # [B, N, H, D]

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def num_nodes(self) -> int:
        return self.query.shape[1]

    @property
    def num_copies(self) -> int:
        return self.keys.shape[0] // self.batch

    def slots(self, copy: int) -> Tensor:
        return torch.arange(self.batch, device=self.keys.device) + copy * self.batch

    def floor_microseconds(self) -> float:
        """Reading every key and value once."""
        positions = int(self.lengths.sum()) + self.batch * self.num_nodes
        return positions * NUM_KV_HEADS * HEAD_DIM * 4 / MEASURED_BYTES_PER_SECOND * 1e6


def make_cache(context: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values [copies * B, G, P, D] and lengths [B]."""
    positions = context + max(NODES)
    copies = max(3, -(-ROTATED_BYTES // (batch * context * NUM_KV_HEADS * HEAD_DIM * 4)))
    shape = (copies * batch, NUM_KV_HEADS, positions, HEAD_DIM)
    keys = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    values = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    lengths = torch.tensor([context * (i + 1) // batch for i in range(batch)], device="cuda")
    return keys, values, lengths


def make_case(context: int, cache: tuple[Tensor, Tensor, Tensor], num_nodes: int) -> Case:
    keys, values, lengths = cache
    parents = torch.tensor([random_parents(num_nodes) for _ in range(len(lengths))], device="cuda")
    query = torch.randn(len(lengths), num_nodes, NUM_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16) * 2
    return Case(context, keys, values, lengths, parents, ancestor_words(parents).contiguous(), query)


def random_parents(num_nodes: int) -> list[int]:
    parents, depths = [-1], [0]
    while len(parents) < num_nodes:
        parent = int(torch.randint(len(parents), ()))
        if depths[parent] < MAX_DEPTH:
            parents.append(parent)
            depths.append(depths[parent] + 1)
    return parents


def make_plan(variant: str, case: Case) -> TreeAttentionPlan:
    make = TreeAttentionPlan.exact if variant == "exact" else TreeAttentionPlan.fast
    return make(
        num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, batch=case.batch, num_nodes=case.num_nodes,
        max_length=case.context, max_depth=MAX_DEPTH, device=case.query.device,
    )  # fmt: skip


def attend(case: Case, plan: TreeAttentionPlan, copy: int) -> Tensor:
    workspace = plan.workspace(case.query.device)
    for tensor in (workspace.outs, workspace.bests, workspace.totals):
        tensor.fill_(torch.nan)  # nothing is read that was not written
    return tree_attention(
        case.query, case.keys, case.values, case.slots(copy), case.lengths, case.ancestors, plan=plan,
        workspace=workspace,
    )  # fmt: skip


def check(case: Case, plan: TreeAttentionPlan) -> float:
    """Relative error against the loop over branches in float64. Exits where it is wrong."""
    out = attend(case, plan, 1)
    want = reference(case.query, case.keys, case.values, case.slots(1), case.lengths, case.ancestors)
    error = float((out.double() - want).norm() / want.norm())
    if not error < 1e-2:
        sys.exit(f"wrong: relative error {error:.1e} with {case.num_nodes} nodes, context {case.context}, {plan}")
    return error


def count_differing_rows(case: Case, plan: TreeAttentionPlan) -> tuple[int, int]:
    """(rows, rows whose bits are not those of plain decoding of the same path), of the first sequence."""
    out = attend(case, plan, 0)
    parents, length, differing = case.parents[0].tolist(), int(case.lengths[0]), 0
    for node in range(case.num_nodes):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        stored = length + torch.tensor(path, device="cuda")
        end = length + len(path)
        keys, values = torch.randn_like(case.keys[:1]), torch.randn_like(case.values[:1])
        for to, source in ((keys, case.keys), (values, case.values)):
            to[0, :, :length] = source[0, :, :length]
            to[0, :, length:end] = source[0][:, stored]
        alone = replace(
            case, keys=keys, values=values, lengths=torch.tensor([end - 1], device="cuda"),
            parents=case.parents[:1, :1], ancestors=torch.ones(1, 1, 1, dtype=torch.int64, device="cuda"),
            query=case.query[:1, node : node + 1].contiguous(), context=end,
        )  # fmt: skip
        differing += not torch.equal(attend(alone, make_plan("exact", alone), 0)[0, 0], out[0, node])
    return case.num_nodes, differing


def microseconds(calls: list[Callable[[], object]], repeats: int = 7) -> float:
    """Median time of one of the calls, captured one behind the other in a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    began = time.perf_counter()
    while time.perf_counter() - began < 0.015:  # clocks up
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def rotated(case: Case) -> list[int]:
    """The cache copies that the calls of one graph read."""
    return [number % case.num_copies for number in range(max(24, case.num_copies))]


def time_ours(case: Case, plan: TreeAttentionPlan) -> float:
    workspace: TreeAttentionWorkspace = plan.workspace(case.query.device)
    out = torch.empty_like(case.query)
    slots = [case.slots(copy) for copy in range(case.num_copies)]

    def call(copy: int) -> Callable[[], object]:
        return lambda: tree_attention(
            case.query, case.keys, case.values, slots[copy], case.lengths, case.ancestors, plan=plan,
            workspace=workspace, out=out,
        )  # fmt: skip

    return microseconds([call(copy) for copy in rotated(case)])


def packed_query(case: Case) -> Tensor:
    """[B, G, group * N, D]: the query heads of a KV head as rows."""
    query = case.query.unflatten(2, (NUM_KV_HEADS, GROUP)).permute(0, 2, 3, 1, 4)
    return query.reshape(case.batch, NUM_KV_HEADS, GROUP * case.num_nodes, HEAD_DIM)


def dense_mask(case: Case) -> Tensor:
    """[B, N, T] bool, T a multiple of 16."""
    num_positions = -(-(case.context + case.num_nodes) // 16) * 16
    depths = torch.zeros(case.batch, case.num_nodes, dtype=torch.int64, device="cuda")
    return attention_mask(case.lengths, depths, case.ancestors, num_positions=num_positions, sliding_window=0)


def time_sdpa(case: Case) -> float:
    query, mask = packed_query(case), dense_mask(case)
    mask = mask.repeat(1, GROUP, 1)[:, None]  # [B, 1, group * N, T]
    num_positions = mask.shape[-1]

    def call(copy: int) -> Callable[[], object]:
        pick = slice(copy * case.batch, (copy + 1) * case.batch)
        keys, values = case.keys[pick, :, :num_positions], case.values[pick, :, :num_positions]
        return lambda: scaled_dot_product_attention(query, keys, values, attn_mask=mask)

    return microseconds([call(copy) for copy in rotated(case)])


def time_branches(case: Case) -> float:
    """The loop over the branches of one sequence: each a chain behind the prefix, in a call of its own."""
    length, parents = int(case.lengths[0]), case.parents[0].tolist()
    branches = []
    for leaf in sorted(set(range(case.num_nodes)) - set(parents)):
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        rows = torch.tensor(path, device="cuda")
        query = case.query[:1, rows].unflatten(2, (NUM_KV_HEADS, GROUP)).permute(0, 2, 3, 1, 4)
        mask = torch.ones(len(path), length + len(path), dtype=torch.bool, device="cuda").tril(length)
        mask = torch.nn.functional.pad(mask.repeat(GROUP, 1), (0, -(length + len(path)) % 16))
        branches.append((query.reshape(1, NUM_KV_HEADS, -1, HEAD_DIM), mask[None, None]))

    def call(copy: int) -> Callable[[], object]:
        def run() -> None:
            for query, mask in branches:
                keys, values = (t[copy : copy + 1, :, : mask.shape[-1]] for t in (case.keys, case.values))
                scaled_dot_product_attention(query, keys, values, attn_mask=mask)

        return run

    return microseconds([call(copy) for copy in rotated(case)], repeats=3)


def time_flex(case: Case) -> float:
    mask = dense_mask(case)[0]
    num_positions = mask.shape[-1]
    blocks = create_block_mask(
        lambda _b, _h, q, kv: mask[q, kv], 1, 1, case.num_nodes, num_positions, device="cuda", _compile=False
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    query = case.query.transpose(1, 2).contiguous()

    def call(copy: int) -> Callable[[], object]:
        keys, values = (t[copy : copy + 1, :, :num_positions] for t in (case.keys, case.values))
        return lambda: compiled(query, keys, values, block_mask=blocks, enable_gqa=True)

    return microseconds([call(copy) for copy in rotated(case)])


def run_checks() -> None:
    torch.manual_seed(time.time_ns() % 2**31)
    print(f"seed {torch.initial_seed()}")
    worst = 0.0
    for context, batch, num_nodes in ((70, 1, 9), (513, 8, 33), (2500, 1, 64), (1000, 2, 128), (4500, 1, 1)):
        case = make_case(context, make_cache(context, batch), num_nodes)
        exact = make_plan("exact", case)
        plans = [replace(exact, whole=whole) for whole in (False, True)] + [make_plan("fast", case)]
        worst = max([worst, *(check(case, plan) for plan in plans)])
        if not torch.equal(attend(case, plans[0], 0), attend(case, plans[1], 0)):
            print(f"  NOT bit-equal: units folded by one program and by several, context {context}, {num_nodes} nodes")
    print(f"largest relative error against float64: {worst:.1e}")
    for context, num_nodes in ((63, 16), (640, 64), (2040, 32), (4100, 128)):
        case = make_case(context, make_cache(context, 1), num_nodes)
        exact = make_plan("exact", case)
        tall = replace(exact, block_rows=128, num_warps=8)
        for name, plan in (("exact", exact), ("exact, 128 rows a product", tall)):
            rows, differing = count_differing_rows(case, plan)
            print(f"{name}, context {context}: {differing} of {rows} rows differ from plain decoding in any bit")


def run_variants() -> None:
    variants: dict[str, dict[str, Any]] = {
        "exact": {},
        "unit 128": {"unit": 128},
        "unit 512": {"unit": 512},
        "2 stages": {"num_stages": 2},
        "fold: 2 warps": {"fold_warps": 2},
        "fold: 4 warps": {"fold_warps": 4},
        "tail 32": {"tail": 32},
        "tail 32, 4 warps": {"tail": 32, "fold_warps": 4},
        "128 rows, 8 warps": {"block_rows": 128, "num_warps": 8},
        "whole": {"whole": True},
        "no early fold": {"early_fold": False},
        "no descriptors": {"tensor_descriptors": False},
    }
    cells = [(nodes, context) for context in (2048, 8192) for nodes in (1, 16, 64)]
    cases = {
        (nodes, context): make_case(context, cache, nodes)
        for context in (2048, 8192)
        for cache in [make_cache(context, 1)]
        for nodes in (1, 16, 64)
    }
    print("\nus, one sequence        " + "".join(f"{n:4d} x {c:5d}" for n, c in cells))
    for name, changes in variants.items():
        times = []
        for cell in cells:
            plan = replace(make_plan("exact", cases[cell]), **changes)
            check(cases[cell], plan)
            times.append(time_ours(cases[cell], plan))
        print(f"{name:24s}" + "".join(f"{t:12.1f}" for t in times), flush=True)


def run_table(flex_seconds: float) -> None:
    began, failure = time.perf_counter(), ""
    print("\nus a layer (floor: keys and values read once at 3 TB/s)")
    print("batch  context  nodes      exact       fast       SDPA   branches       Flex      floor")
    for batch in BATCHES:
        for context in CONTEXTS:
            cache = make_cache(context, batch)
            for num_nodes in NODES:
                case = make_case(context, cache, num_nodes)
                times = [time_ours(case, make_plan(variant, case)) for variant in ("exact", "fast")]
                times.append(time_sdpa(case))
                times.append(time_branches(case) if batch == 1 else float("nan"))
                # Each shape of Flex attention is compiled anew: where the time is up it is left out.
                wanted = batch == 1 and num_nodes in (16, 64) and time.perf_counter() - began < flex_seconds
                try:
                    times.append(time_flex(case) if wanted else float("nan"))
                except Exception as error:  # a compiler's failure on a baseline must not cost the table
                    times.append(float("nan"))
                    failure = str(error).splitlines()[0]
                cells = "".join(f"{t:11.1f}" if t == t else f"{'-':>11s}" for t in times)
                print(f"{batch:5d} {context:8d} {num_nodes:6d}{cells}{case.floor_microseconds():11.1f}", flush=True)
            del cache, case
            torch.cuda.empty_cache()
    if failure:
        print(f"Flex attention failed: {failure}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", action="store_true", help="the plan's fields instead of the table")
    parser.add_argument("--flex-seconds", type=float, default=40.0, help="start no Flex attention after this time")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU: these times mean nothing elsewhere; the kernels' tests run without one")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    with torch.inference_mode():
        run_checks()
        if arguments.variants:
            run_variants()
        else:
            run_table(arguments.flex_seconds)


if __name__ == "__main__":
    main()
