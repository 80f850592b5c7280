"""Drafts with an EAGLE head of Llama-3-8B's size on a GPU: first whether they are right, then what they cost.

    python benchmarks/kernels/eagle_draft.py [--context 2048] [--batches 1,8] [--json FILE]

Right: the trees of random heads, dense and in NF4, against the search in tensor operations with the same (dequantised)
weights; what a CUDA graph replays against the same calls without one, bit by bit.

Cost: CUDA graphs of what a step does (tell 17 committed rows, draft 63 nodes), medians, microseconds. A head and its
projection are larger than the L2 cache: each pass reads them from memory. A step of plain decoding is 2,700 to 3,000.
About a minute, most of it the compiler's where nothing is in its cache; the tables come last.

Expected on an H100 before it was measured (one stream, 2,048 positions, layer in NF4, 16,384 tokens in bfloat16, W 8):

    part                                    us     because
    observe                                 30     fc and qkv 16, five small launches
    root's pass                             60     o, gate_up and down 42, attention 8, three small launches
    a pass of a further depth              100     five products 58, attention 8, seven small launches, embeddings
    projection, top-k, beam                 56     projection 45, three launches
    draft of 1 / 4 / 5 / 6 / 8 depths      150 / 620 / 770 / 930 / 1240
    projection to half as many             -22 a depth; all of them in NF4: -31
    a layer in bfloat16                   +100 a depth: 0.44 GB

So that 5 depths are what 0.3 plain steps buy; W is free up to 8, nearly so to 16.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gorgon_engine.drafters.base import Committed, DraftContext
from gorgon_engine.drafters.beam import BeamLimits
from gorgon_engine.drafters.choices import top_log_probs
from gorgon_engine.drafters.eagle import EagleDrafter
from gorgon_engine.drafters.eagle_gpu import EagleGpuDrafter, angle_tables
from gorgon_engine.heads.eagle import EagleHead, EagleShape
from gorgon_engine.heads.eagle_layer import EagleLayer
from gorgon_engine.kernels.triton.eagle_beam import FoundNodes, eagle_beam
from gorgon_engine.kernels.triton.eagle_tree import eagle_tree
from gorgon_engine.kernels.triton.nf4_linear import default_variant, dequantize
from gorgon_engine.kernels.triton.nf4_packing import PackedNf4, pack_nf4
from gorgon_engine.kernels.triton.products import DenseProduct, Nf4Product, Product
from gorgon_engine.models.nf4 import NF4_CODE
from gorgon_engine.tree.candidates import CandidateTree

LLAMA_3_8B = EagleShape(4096, 32, 8, 128, 14336, rope_theta=500000.0, num_heads=8)
VOCAB = 128256
MATRICES = ("fc", "qkv", "o", "gate_up", "down")
NORMS = ("feature_norm", "embedding_norm", "attention_norm", "mlp_norm", "norm")
ROWS_EACH = 17  # committed rows that a step tells, padding and all
MAX_NODES = 63
DEPTHS, WIDTHS, VOCABULARIES = (1, 2, 3, 4, 5, 6, 8), (1, 4, 8, 16), (8192, 16384, 32768)


@dataclass(frozen=True)
class Setting:
    """What random heads are made for."""

    shape: EagleShape
    vocab_size: int
    num_drafted: int  # tokens
    dtype: torch.dtype
    device: torch.device
    context: int  # committed positions
    positions: int  # of a slot


@dataclass(frozen=True)
class Head:
    """A random head twice: packed for the kernels, and (for checks) as torch runs it, of the very same values."""

    layer: EagleLayer
    head: EagleHead
    embedding: Tensor  # [vocabulary, C]
    projection: Tensor | None  # [V, C], where it can be had
    drafted: Tensor  # [V] int64

    def drafter(self, num_slots: int, positions: int, limits: BeamLimits, num_depths: int) -> EagleGpuDrafter:
        drafter = EagleGpuDrafter(
            self.layer,
            angles=angle_tables(self.head),
            embed=lambda tokens: self.embedding.index_select(0, tokens),
            vocab_size=self.drafted.numel(),
            draft_vocabulary=self.drafted,
            limits=limits,
            num_depths=num_depths,
        )
        return drafter.for_slots(num_slots, positions)

    def in_torch(self, num_slots: int, positions: int, limits: BeamLimits) -> EagleDrafter:
        projection = self.projection
        assert projection is not None
        drafter = EagleDrafter(
            self.head,
            embed=lambda tokens: self.embedding[tokens],
            project=lambda features: features @ projection.T,
            draft_vocabulary=self.drafted,
            limits=limits,
        )
        return drafter.for_slots(num_slots, positions)


def sizes_of(shape: EagleShape) -> dict[str, tuple[int, int]]:
    """[out, in] of the layer's matrices."""
    size, width = shape.hidden_size, shape.head_dim
    return {
        "fc": (size, 2 * size),
        "qkv": (sum(shape.head_counts) * width, size),
        "o": (size, shape.num_query_heads * width),
        "gate_up": (2 * shape.intermediate_size, size),
        "down": (size, shape.intermediate_size),
    }


def random_nf4(out_features: int, in_features: int, device: torch.device) -> PackedNf4:
    """Of values whose products keep the scale of what they multiply."""
    num_weights = out_features * in_features
    packed = torch.randint(0, 256, (num_weights // 2,), dtype=torch.uint8, device=device)
    absmax = (torch.rand(num_weights // 64, device=device) + 0.5) * 1.8 * in_features**-0.5
    return pack_nf4(packed, absmax, torch.tensor(NF4_CODE, device=device), out_features, in_features)


def make_head(
    setting: Setting,
    *,
    four_bit: bool,
    four_bit_projection: bool = False,
    for_checks: bool = False,
    num_depths: int | None = None,
) -> Head:
    """for_checks: with the dense twin of every matrix, 0.5 GB for a large head."""
    shape, dtype, device = setting.shape, setting.dtype, setting.device
    if num_depths is not None:
        shape = replace(shape, num_heads=num_depths)
    head = EagleHead(shape, device="meta", dtype=dtype).requires_grad_(False)
    for name in NORMS:
        gain = 1.0 + 0.1 * torch.randn(shape.hidden_size, device=device)
        setattr(head, name, torch.nn.Parameter(gain.to(dtype), requires_grad=False))
    products: dict[str, Product] = {}
    projection = None
    for name, (rows, columns) in {**sizes_of(shape), "projection": (setting.num_drafted, shape.hidden_size)}.items():
        dense = None
        if four_bit_projection if name == "projection" else four_bit:
            packed = random_nf4(rows, columns, device)
            variant = default_variant(device, dtype)
            products[name] = Nf4Product.of(packed, variant, max_partials=1 if name == "projection" else 8)
            dense = dequantize(packed, dtype) if for_checks else None
        else:
            dense = (torch.randn(rows, columns, device=device) * columns**-0.5).to(dtype)
            products[name] = DenseProduct(dense)
        if name == "projection":
            projection = dense
        elif dense is not None and for_checks:
            getattr(head, name).weight = torch.nn.Parameter(dense, requires_grad=False)
    layer = EagleLayer(shape=shape, **{name: getattr(head, name) for name in NORMS}, **products)
    embedding = torch.randn(setting.vocab_size, shape.hidden_size, device=device).to(dtype)
    drafted = torch.randperm(setting.vocab_size, device=device)[: setting.num_drafted]
    return Head(layer, head, embedding, projection, drafted)


@dataclass(frozen=True)
class Step:
    """What a step tells and asks, in fixed tensors."""

    committed: Committed
    context: DraftContext

    def run(self, drafter: EagleGpuDrafter | EagleDrafter) -> CandidateTree:
        drafter.observe(self.committed)
        return drafter.propose(self.context, MAX_NODES)


def make_step(setting: Setting, batch: int) -> Step:
    device, size = setting.device, setting.shape.hidden_size
    slots = torch.arange(batch, device=device)
    hidden = torch.randn(batch, ROWS_EACH, size, device=device).to(setting.dtype)
    tokens = torch.randint(setting.vocab_size, (batch, ROWS_EACH), device=device)
    counts = torch.arange(batch, device=device) % 5 + 1
    lengths = torch.full((batch,), setting.context, device=device) - slots
    last = (counts - 1)[:, None]
    return Step(
        Committed(slots, lengths - counts, hidden, tokens, counts),
        DraftContext(
            root_tokens=tokens.gather(1, last)[:, 0],
            hidden=hidden[slots, last[:, 0]],
            history=torch.zeros((batch, setting.context + 1), dtype=torch.int64, device=device),
            history_lengths=lengths + 1,
            seeds=slots,
            slots=slots,
        ),
    )


def fill(drafter: EagleGpuDrafter | EagleDrafter, setting: Setting, step: Step, chunk: int = 512) -> None:
    """What a step follows on, told in chunks as a prefill does: random hidden states, the same for every drafter."""
    generator = torch.Generator().manual_seed(5)
    slots, ends = step.committed.slots, step.committed.starts
    for start in range(0, setting.context, chunk):
        count = min(chunk, setting.context - start)
        hidden = torch.randn(len(slots), count, setting.shape.hidden_size, generator=generator)
        tokens = torch.randint(setting.vocab_size, (len(slots), count), generator=generator)
        drafter.observe(
            Committed(
                slots,
                torch.full_like(slots, start),
                hidden.to(setting.device, setting.dtype),
                tokens.to(setting.device),
                (ends - start).clamp(0, count),
            )
        )


def check(setting: Setting, batch: int = 2, num_depths: int = 4) -> list[tuple[str, float, float, bool]]:
    """Of dense heads and such in NF4: the largest difference of log-probabilities between the trees, the share of equal
    tokens below the root, and whether a graph replays the bits (True where there are no graphs)."""
    results = []
    limits = BeamLimits(num_choices=8, width=8)
    for name, four_bit in (("dense", False), ("NF4", True)):
        torch.manual_seed(1)
        head = make_head(
            setting, four_bit=four_bit, four_bit_projection=four_bit, for_checks=True, num_depths=num_depths
        )
        fast = head.drafter(batch, setting.positions, limits, num_depths)
        slow = head.in_torch(batch, setting.positions, limits)
        step = make_step(setting, batch)
        trees = []
        for drafter in (fast, slow):
            fill(drafter, setting, step)
            trees.append(step.run(drafter))
        got, want = trees
        difference = (got.log_probs - want.log_probs).abs().max().item()
        firsts = [set(tree.tokens[0][tree.parents[0] < 0].tolist()) for tree in trees]
        shared = len(firsts[0] & firsts[1]) / max(len(firsts[0] | firsts[1]), 1)
        same_bits = setting.device.type != "cuda" or _replays(fast, step, got)
        results.append((name, difference, shared, same_bits))
    return results


def _replays(drafter: EagleGpuDrafter, step: Step, eager: CandidateTree) -> bool:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tree = step.run(drafter)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    names = ("tokens", "parents", "log_probs", "ranks")
    return all(torch.equal(getattr(tree, name), getattr(eager, name)) for name in names)


def graph_microseconds(run: Callable[[], object], replays: int = 20, repeats: int = 5) -> float:
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
    return statistics.median(times) * 1e3


def time_drafts(
    setting: Setting, head: Head, batch: int, widths: Iterable[int], depths: Iterable[int]
) -> dict[str, dict[int, float]]:
    """Microseconds of telling and drafting, by W and depth."""
    step = make_step(setting, batch)
    table: dict[str, dict[int, float]] = {}
    for width in widths:
        line = table[f"W {width}"] = {}
        for depth in depths:
            limits = BeamLimits(num_choices=8, width=width)
            drafter = head.drafter(batch, setting.positions, limits, depth)
            line[depth] = graph_microseconds(lambda drafter=drafter: step.run(drafter))
    return table


def time_parts(setting: Setting, head: Head, width: int = 8) -> dict[str, float]:
    """Microseconds of what a draft consists of, one after another in a graph of 20."""
    step, device, layer = make_step(setting, 1), setting.device, head.layer
    drafter = head.drafter(1, setting.positions, BeamLimits(num_choices=8, width=width), 1)
    rows = {columns: torch.randn(width, columns, device=device).to(setting.dtype)
            for _, columns in sizes_of(layer.shape).values()}  # fmt: skip
    logits = torch.randn(width, head.drafted.numel(), device=device)
    log_probs, choices = top_log_probs(logits, 8)
    log_probs, choices = log_probs.view(1, width, 8), choices.view(1, width, 8)
    num_found = 8 + 63 * 5
    found = FoundNodes.empty(1, num_found, device)
    found.log_probs.copy_(-torch.rand(1, num_found, device=device).sort().values)
    found.parents.fill_(-1)
    above = eagle_beam(log_probs[:, :1].contiguous(), choices[:, :1].contiguous(), None, found, vocabulary=head.drafted,
                       first_node=0, num_kept=8, width=width, first_bit=0)  # fmt: skip
    parts: dict[str, Callable[[], object]] = {
        "observe": lambda: drafter.observe(step.committed),
        "draft of one depth": lambda: drafter.propose(step.context, MAX_NODES),
        "embeddings": lambda: head.embedding.index_select(0, step.committed.next_tokens[0, :width]),
        **{
            name: lambda name=name, columns=columns: getattr(layer, name)(rows[columns])
            for name, (_, columns) in sizes_of(layer.shape).items()
        },
        "projection": lambda: layer.projection(rows[layer.shape.hidden_size]),
        "top-k": lambda: top_log_probs(logits, 8),
        "beam": lambda: eagle_beam(
            log_probs, choices, above, found, vocabulary=head.drafted, first_node=8, num_kept=63, width=width,
            first_bit=8,
        ),
        "tree": lambda: eagle_tree(found, MAX_NODES),
    }  # fmt: skip

    def twenty(run: Callable[[], object]) -> None:
        for _ in range(20):
            run()

    return {name: graph_microseconds(lambda run=run: twenty(run), replays=3) / 20 for name, run in parts.items()}


def print_table(title: str, table: dict[str, dict[int, float]]) -> None:
    columns = list(next(iter(table.values())))
    print(f"\n{title}\n{'':16}" + "".join(f"{f'{depth} deep':>10}" for depth in columns))
    for name, line in table.items():
        print(f"{name:16}" + "".join(f"{line[depth]:10.0f}" for depth in columns))


def measure(setting: Setting, batches: Sequence[int]) -> dict[str, object]:
    """All tables, printed and given."""
    tables: dict[str, object] = {}
    with torch.inference_mode():
        for batch in batches:
            for four_bit in (True, False) if batch == 1 else (True,):
                kind = "NF4" if four_bit else "bfloat16"
                head = make_head(setting, four_bit=four_bit)
                title = (
                    f"Microseconds a draft, {kind}, batch {batch}, {setting.num_drafted} tokens, "
                    f"{setting.context} positions"
                )
                tables[title] = table = time_drafts(setting, head, batch, WIDTHS, DEPTHS)
                print_table(title, table)
                if batch == 1:
                    tables[f"parts, {kind}"] = parts = time_parts(setting, head)
                    print(f"\nMicroseconds a part, {kind}, W 8")
                    print("\n".join(f"    {name:24}{value:8.1f}" for name, value in parts.items()))
                del head
        lines: dict[str, dict[int, float]] = {}
        for num_drafted in VOCABULARIES:
            for four_bit in (False, True):
                other = replace(setting, num_drafted=num_drafted)
                head = make_head(other, four_bit=True, four_bit_projection=four_bit)
                name = f"{num_drafted} {'NF4' if four_bit else 'bfloat16'}"
                lines[name] = time_drafts(other, head, 1, (8,), (1, 4, 6))["W 8"]
                del head
        title = "Microseconds a draft, layer in NF4, W 8, by the tokens drafted and how they are projected to"
        tables[title] = lines
        print_table(title, lines)
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=2048, help="committed positions")
    parser.add_argument("--batches", default="1,8", help="sequences a draft")
    parser.add_argument("--json", type=Path, help="write the tables to this file as well")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("eagle_draft: there is no CUDA GPU here, and nothing to measure without one")
    began = time.perf_counter()
    setting = Setting(
        shape=LLAMA_3_8B,
        vocab_size=VOCAB,
        num_drafted=16384,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
        context=arguments.context,
        positions=arguments.context + 128,
    )
    checks = check(setting)
    print(f"{'head':8}{'largest difference':>20}{'equal first choices':>22}   graph = eager")
    for name, difference, shared, same_bits in checks:
        print(f"{name:8}{difference:20.4f}{shared:22.2f}   {same_bits}", flush=True)
    print(f"checked after {time.perf_counter() - began:.0f} s", flush=True)
    tables = measure(setting, [int(batch) for batch in arguments.batches.split(",")])
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.perf_counter() - began:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps({"checks": checks, "tables": tables}, indent=1))
    wrong = [
        name for name, difference, shared, same_bits in checks if difference > 0.3 or shared < 0.7 or not same_bits
    ]
    if wrong:
        raise SystemExit(f"eagle_draft: the drafts of heads that are {' and '.join(wrong)} are not right")


if __name__ == "__main__":
    main()
