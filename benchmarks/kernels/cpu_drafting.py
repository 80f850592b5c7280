"""Time of what a step does around its forward pass on a CPU: drafting, merging and laying out, torch against C++.

Cold: after a read of as much memory as a backbone of 135 M int8 weights. The searches of Hydra and EAGLE heads in
tensor operations have their matrices in the native kernels too.

    python benchmarks/kernels/cpu_drafting.py

Both sides of all cases take turns within each round and the medians are printed, so that a noisy machine blurs all of
them alike.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from gorgon_engine.drafters.base import Committed, DraftContext
from gorgon_engine.drafters.beam import BeamLimits
from gorgon_engine.drafters.eagle import EagleDrafter
from gorgon_engine.drafters.hydra import HydraDrafter
from gorgon_engine.drafters.ngram import NgramDrafter
from gorgon_engine.heads.eagle import EagleHead, EagleShape
from gorgon_engine.heads.hydra import HydraHeads, HydraShape
from gorgon_engine.heads.native import PackedEagleHead, PackedHydraHeads
from gorgon_engine.kernels.cpu import PackedLinear, load_library
from gorgon_engine.kernels.cpu.drafting import top_log_probs
from gorgon_engine.kernels.cpu.hydra import NativeHydra
from gorgon_engine.tree.candidates import CandidateTree
from gorgon_engine.tree.tree import flatten, flatten_reference, merge_candidates, merge_reference

NUM_CANDIDATES = 31
MAX_DEPTH = 16
COLD_BYTES = 150_000_000


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    torch: Callable[[], object]
    native: Callable[[], object]
    cold: bool = False


def top_case(rows: int, vocab_size: int, k: int) -> Case:
    """Against the fastest that torch has, which leaves ties to chance."""
    logits = torch.randn(rows, vocab_size) * 3
    return Case(
        f"top {k} log-probabilities of [{rows}, {vocab_size}]",
        lambda: torch.log_softmax(logits, dim=1).topk(k, dim=1),
        lambda: top_log_probs(logits, k),
    )


def lookup_case(length: int) -> Case:
    history = torch.randint(200, (1, length))
    context = DraftContext(
        root_tokens=history[:, -1],
        hidden=torch.zeros(1, 1),
        history=history,
        history_lengths=torch.tensor([length]),
        seeds=torch.zeros(1, dtype=torch.int64),
    )
    drafter = NgramDrafter()
    num_chains = NUM_CANDIDATES // drafter.depth
    return Case(
        f"lookup in a history of {length}",
        lambda: drafter.propose_reference(context, num_chains, drafter.depth),
        lambda: drafter.propose(context, NUM_CANDIDATES),
    )


def random_forest(source: str) -> CandidateTree:
    """Children drawn from few tokens, so that the drafters agree on some paths."""
    parents = torch.tensor([[int(torch.randint(-1, node, ())) if node else -1 for node in range(NUM_CANDIDATES)]])
    log_probs = torch.zeros(1, NUM_CANDIDATES)
    for node, parent in enumerate(parents[0].tolist()):
        log_probs[0, node] = (log_probs[0, parent] if parent >= 0 else 0.0) - torch.rand(())
    tokens = torch.randint(6, parents.shape)
    return CandidateTree(tokens, parents, log_probs, torch.zeros_like(tokens), source=source)


def tree_cases() -> list[Case]:
    forests = [random_forest("head"), random_forest("lookup")]
    limits = {"max_nodes": NUM_CANDIDATES + 1, "max_depth": MAX_DEPTH}
    merged = merge_candidates(forests, **limits)
    root, num_nodes = torch.tensor([7]), torch.tensor([NUM_CANDIDATES + 1])
    width = NUM_CANDIDATES + 1
    return [
        Case(
            f"merge 2 x {NUM_CANDIDATES} candidates",
            lambda: merge_reference(forests, **limits),
            lambda: merge_candidates(forests, **limits),
        ),
        Case(
            f"lay out {width} nodes",
            lambda: flatten_reference(root, merged, num_nodes, width),
            lambda: flatten(root, merged, num_nodes, width),
        ),
    ]


def hydra_cases() -> list[Case]:
    """Heads and projections of SmolLM2-135M's sizes, one sequence, three depths searched whatever the guesses."""
    shape = HydraShape(hidden_size=576, num_heads=3, num_blocks=4)
    heads = HydraHeads(shape).requires_grad_(False)
    heads.start_as_pass_through()
    packed = PackedHydraHeads(heads, "int8")
    embeddings = torch.randn(49152, shape.hidden_size).bfloat16()
    vocabulary = torch.arange(0, 49152, 3)
    projection = PackedLinear.pack(torch.randn(vocabulary.numel(), shape.hidden_size) * 0.1, None, "int8")
    native = packed.in_one_call(embeddings=embeddings, shared=projection, draft_vocabulary=vocabulary)
    context = DraftContext(
        root_tokens=torch.tensor([7]),
        hidden=torch.randn(1, shape.hidden_size),
        history=torch.tensor([[7]]),
        history_lengths=torch.tensor([1]),
        seeds=torch.zeros(1, dtype=torch.int64),
    )

    def search(width: int, searched: NativeHydra | None) -> Callable[[], object]:
        drafter = HydraDrafter(
            packed,
            embed=lambda tokens: embeddings[tokens].float(),
            project=projection,
            draft_vocabulary=vocabulary,
            limits=BeamLimits(num_choices=6, width=width),
            native=searched,
        )
        return lambda: drafter.propose(context, NUM_CANDIDATES)

    return [
        Case(
            f"hydra, 3 depths of {width}, {'cold' if cold else 'hot'}", search(width, None), search(width, native), cold
        )
        for width in (1, 4)
        for cold in (False, True)
    ]


def eagle_cases() -> list[Case]:
    """As `hydra_cases`, behind a text of 300 tokens."""
    length, vocabulary = 300, torch.arange(0, 49152, 3)
    embeddings = torch.randn(49152, 576).bfloat16()
    projection = PackedLinear.pack(torch.randn(vocabulary.numel(), 576) * 0.1, None, "int8")
    hidden, tokens = torch.randn(1, length, 576), torch.randint(49152, (1, length + 1))
    slots, cases = torch.tensor([0]), []

    def committed(start: int, count: int) -> Committed:
        stop = start + count
        return Committed(
            slots, torch.tensor([start]), hidden[:, start:stop], tokens[:, start + 1 : stop + 1], torch.tensor([count])
        )

    def remember(drafter: EagleDrafter, rows: Committed) -> None:
        """What waits for the next draft, at once."""
        assert drafter._memory is not None
        drafter.observe(rows)
        drafter._remember(drafter._memory)

    for depths in (3, 5):
        shape = EagleShape(576, 9, 3, 64, 1536, num_heads=depths)
        head = EagleHead(shape).requires_grad_(False)
        head.start_as_pass_through()
        packed = PackedEagleHead(head, "int8")
        native = packed.in_one_call(embeddings=embeddings, projection=projection, draft_vocabulary=vocabulary)
        context = DraftContext(
            root_tokens=tokens[:, -1],
            hidden=hidden[:, -1],
            history=tokens,
            history_lengths=torch.tensor([length + 1]),
            seeds=slots,
            slots=slots,
        )
        searches = []
        for searched in (None, native):
            drafter = EagleDrafter(
                packed,
                embed=lambda tokens: embeddings[tokens].float(),
                project=projection,
                draft_vocabulary=vocabulary,
                limits=BeamLimits(num_choices=6, width=4),
                native=searched,
            ).for_slots(1, 1024)
            remember(drafter, committed(0, length))
            searches.append(drafter)
        for cold in (False, True):
            state = "cold" if cold else "hot"
            proposals = (partial(drafter.propose, context, NUM_CANDIDATES) for drafter in searches)
            cases.append(Case(f"eagle, {depths} depths of 4, {state}", next(proposals), next(proposals), cold))
            if depths == 3:
                last = (partial(remember, drafter, committed(length - 3, 3)) for drafter in searches)
                cases.append(Case(f"eagle, 3 rows remembered, {state}", next(last), next(last), cold))
    return cases


def microseconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e6


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    torch.manual_seed(0)
    library = load_library()
    if options.threads:
        library.set_num_threads(options.threads)
    torch.set_num_threads(1)  # as the engine has it beside the native kernels
    print(f"instruction set {library.instruction_set}, {library.num_threads} threads, load {os.getloadavg()[0]:.1f}")

    cases = [top_case(rows, vocab, options.k) for vocab in (16384, 49152, 128256) for rows in (1, 4)]
    cases += [*(lookup_case(length) for length in (1000, 8000)), *tree_cases(), *hydra_cases(), *eagle_cases()]
    elsewhere = torch.ones(COLD_BYTES // 4)
    samples: dict[tuple[str, str], list[float]] = {}
    for round_index in range(options.rounds + 5):
        for case in cases:
            for side in ("torch", "native"):
                function = getattr(case, side)
                if case.cold:
                    elsewhere.sum()
                else:
                    function()  # the side before it has left the caches, and its threads, to themselves
                taken = microseconds(function)
                if round_index >= 5:
                    samples.setdefault((case.name, side), []).append(taken)

    print(f"{'median (least), microseconds':44} {'torch':>16} {'native':>16}")
    for case in cases:
        columns = [samples[case.name, side] for side in ("torch", "native")]
        cells = "".join(f"{statistics.median(times):9.0f} ({min(times):5.0f})" for times in columns)
        print(f"{case.name:44} {cells}  x{statistics.median(columns[0]) / statistics.median(columns[1]):.1f}")


if __name__ == "__main__":
    main()
