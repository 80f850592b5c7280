"""Start-up measurement: what a verification pass costs on this machine, by number of rows.

Two uses: the cost model that sizes trees, and the plain-decoding speed that every reported speedup is measured against.
"""

import statistics
import time
from dataclasses import dataclass

import torch

from gorgon_engine.acceptance import AcceptanceRule
from gorgon_engine.backbone.base import ForwardInputs
from gorgon_engine.sampling import SamplingBatch, SamplingParams
from gorgon_engine.step import SpeculativeStep, Wanted
from gorgon_engine.transfer import to_device
from gorgon_engine.tree.candidates import CandidateTree
from gorgon_engine.tree.cost_model import CostModel
from gorgon_engine.tree.tree import ancestor_words, flatten, merge_candidates

_ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
_PREFIX = 64  # positions in the cache while measuring
_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Calibration:
    """Medians over interleaved rounds, one sequence, short context."""

    plain_step_seconds: float
    cost_model: CostModel
    costly_draft_seconds: float | None = None  # of the drafters that run a network; None where there are none

    @property
    def plain_tokens_per_second(self) -> float:
        return 1.0 / self.plain_step_seconds


def calibrate(step: SpeculativeStep) -> Calibration:
    """Time plain steps, verification passes and drafting on a borrowed slot: about a second for a small CPU model."""
    slot = step.cache.acquire()
    try:
        return _measure(step, slot)
    finally:
        step.cache.release(slot)


def _measure(step: SpeculativeStep, slot: int) -> Calibration:
    device, vocab_size = step.backbone.device, step.backbone.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    prefix = min(_PREFIX, max(1, step.cache.capacity // 2))
    prompt = torch.randint(vocab_size, (prefix,), generator=generator).tolist()
    sampling = SamplingBatch.of([SamplingParams()], vocab_size=vocab_size, device=device)
    plain = Wanted(draft=False)
    start = step.prefill(slot, prompt, sampling, None, chunk_size=prefix, wanted=plain, check=lambda: None)

    costly = any(drafter.is_costly for drafter in step.drafters)
    batch, plain_times, tree_times, draft_times = start.batch, [], [], []
    rows = [r for r in _ROW_COUNTS if r <= step.max_nodes]
    pass_times: dict[int, list[float]] = {r: [] for r in rows}
    length = prefix
    for round_number in range(_ROUNDS + 1):
        timed = round_number > 0  # the first round warms up
        for _ in range(3):
            began = _now(device)
            result = step.run(batch, [1], max_length=length, rule=AcceptanceRule.LOSSLESS, wanted=plain)
            plain_times += [_now(device) - began] if timed else []
            batch, length = result.batch, length + 1
        for count in rows:
            inputs = _chain_tree(step, slot, count, generator)
            began = _now(device)
            step.backbone.forward(inputs, step.cache)
            pass_times[count] += [_now(device) - began] if timed else []
        if costly:
            began = _now(device)
            step.draft(batch, length)
            draft_times += [_now(device) - began] if timed else []
        began = _now(device)
        step.draft(batch, length, costly=False)
        # Random text gives a lookup nothing to find, and what is not found is not merged: that part is added here.
        guesses = merge_candidates(
            [_chain_of_guesses(step, generator)], max_nodes=step.max_nodes, max_depth=step.max_depth
        )
        flatten(batch.root_tokens, guesses, to_device([step.max_nodes], device), step.max_nodes)
        tree_times += [_now(device) - began] if timed else []

    plain_step = statistics.median(plain_times)
    medians = [statistics.median(pass_times[r]) for r in rows]
    overhead = max(plain_step - medians[0], 0.0)
    # More rows never cost less: a dip is noise, and would draw the budget to it.
    seconds = [plain_step]
    for median in medians[1:]:
        seconds.append(max(median + overhead, seconds[-1]))
    model = CostModel(rows=tuple(rows), seconds=tuple(seconds), draft_seconds=statistics.median(tree_times))
    return Calibration(
        plain_step_seconds=plain_step,
        cost_model=model,
        costly_draft_seconds=statistics.median(draft_times) if draft_times else None,
    )


def _chain_of_guesses(step: SpeculativeStep, generator: torch.Generator) -> CandidateTree:
    device, count = step.backbone.device, max(step.max_nodes - 1, 1)
    tokens = torch.randint(step.backbone.config.vocab_size, (1, count), generator=generator).to(device)
    index = torch.arange(count, device=device)[None]
    return CandidateTree(tokens, index - 1, -(index + 1).float(), torch.zeros_like(tokens), source="calibration")


def _chain_tree(step: SpeculativeStep, slot: int, num_rows: int, generator: torch.Generator) -> ForwardInputs:
    device = step.backbone.device
    tokens = torch.randint(step.backbone.config.vocab_size, (1, num_rows), generator=generator).to(device)
    index = torch.arange(num_rows, device=device)[None]
    slots = torch.tensor([slot], device=device)
    return ForwardInputs(
        tokens=tokens,
        depths=index,
        slots=slots,
        lengths=step.cache.lengths[slots],
        num_rows=torch.tensor([num_rows], device=device),
        prompt_lengths=step.cache.lengths[slots],
        max_positions=min(2 * _PREFIX + num_rows, step.cache.keys.shape[3]),
        ancestors=ancestor_words(index - 1),
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
