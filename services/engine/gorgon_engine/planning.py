"""What a pass is asked to do for the sequences in it: which parts of prompts to run, what to report, whom to draft for.

Pure functions of the host's view; the scheduler decides when a pass runs.
"""

from collections.abc import Sequence as Seq

import torch

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.drafting import DraftRows, chosen_rows
from gorgon_engine.sampling import SamplingBatch, TokenCounts
from gorgon_engine.sequence import Sequence
from gorgon_engine.step import PrefillChunk, Wanted
from gorgon_engine.tree.cost_model import Effort


def plan_chunks(prefilling: Seq[Sequence], portion: int, *, drafters_epoch: int) -> list[tuple[Sequence, PrefillChunk]]:
    """The next parts of prompts, of `portion` positions together.

    prefilling: in order of admission. The first is sure of half of the portion, so that it ends; what is left goes to
    the shortest ones, so that a short prompt does not wait for a long one to end.
    """
    first, *others = prefilling
    shares = {id(first): min(first.num_left, max(portion // 2, 1) if others else portion)}
    left = portion - shares[id(first)]
    for sequence in sorted(others, key=lambda s: s.num_left):
        share = min(sequence.num_left, left)
        if share == 0:
            break
        shares[id(sequence)] = share
        left -= share
    shares[id(first)] = min(first.num_left, shares[id(first)] + left)
    return [
        (sequence, _chunk(sequence, shares[id(sequence)], drafters_epoch))
        for sequence in prefilling
        if id(sequence) in shares
    ]


def _chunk(sequence: Sequence, size: int, drafters_epoch: int) -> PrefillChunk:
    request = sequence.request
    return PrefillChunk(
        slot=sequence.slot,
        tokens=sequence.prefix,
        start=sequence.num_prefilled,
        stop=sequence.num_prefilled + size,
        prompt_length=len(request.prompt),
        remember=request.speculation.may_draft and sequence.drafters_epoch == drafters_epoch,
    )


def begin_sampling(sequences: Seq[Sequence], backbone: Backbone) -> tuple[SamplingBatch | None, TokenCounts | None]:
    """The sampling state of sequences whose prompts end: None where there are none, counts where any is penalised."""
    if not sequences:
        return None, None
    device, vocab_size = backbone.device, backbone.config.vocab_size
    params = [s.request.sampling for s in sequences]
    sampling = SamplingBatch.of(params, vocab_size=vocab_size, device=device)
    if not sampling.any_penalty:
        return sampling, None
    counts = TokenCounts.empty(sampling.seeds, vocab_size)
    for row, sequence in enumerate(sequences):
        if sequence.request.sampling.penalised:
            said = torch.tensor(sequence.request.generated, dtype=torch.int64, device=device)
            counts.in_prompt[row, list(sequence.request.prompt)] = True
            counts.in_output[row].index_add_(0, said, torch.ones_like(said, dtype=torch.int32))
    return sampling, counts


def wanted_of(sequences: Seq[Sequence], drafters_epoch: int, effort: Effort) -> Wanted:
    """What the requests of a pass want of it. drafters_epoch: of the drafters in use. effort: as the budget has it."""
    batch = len(sequences)
    logprobs = [row for row, s in enumerate(sequences) if s.request.sampling.logprobs is not None]
    traced = [row for row, s in enumerate(sequences) if s.request.trace]
    drafted = [row for row, s in enumerate(sequences) if s.request.speculation.may_draft]
    known = [row for row in drafted if sequences[row].drafters_epoch == drafters_epoch]
    return Wanted(
        num_logprobs=max((sequences[row].request.sampling.logprobs or 0 for row in logprobs), default=None),
        logprob_rows=chosen_rows(logprobs, batch),
        trace=bool(traced),
        trace_rows=chosen_rows(traced, batch),
        draft=bool(drafted),
        effort=effort,
        rows=DraftRows(chosen_rows(drafted, batch), chosen_rows(known, batch)),
    )
