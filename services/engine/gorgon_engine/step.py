"""One step of the engine: verify the drafted tree, accept a branch, commit it, draft the next tree.

It is draft -> verify -> accept -> commit turned by one verb: the draft of the *next* tree closes the step, so that the
single device-to-host read at the end brings back the emitted tokens together with what the host needs to size the next
tree. Between that read and the next nothing branches on device values, and every shape is fixed by (batch, width, bound
of the lengths): on a GPU the four verbs, `SpeculativeStep.advance`, are captured whole in a CUDA graph (`graphs.py`).
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gorgon_engine.acceptance import Acceptance, AcceptanceRule, accept
from gorgon_engine.backbone.base import Backbone, ForwardInputs, ForwardOutput, LogitsFor, RowLogits
from gorgon_engine.batch import RunningBatch
from gorgon_engine.buckets import Buckets
from gorgon_engine.drafters.base import Committed, Drafter
from gorgon_engine.drafting import ALL_ROWS, Drafting, DraftMasks, DraftRows, round_up, select_rows
from gorgon_engine.kv_cache import KVCache
from gorgon_engine.outcome import Advanced, LaunchedStep, StepResult, StepSeconds, figures_of, launched
from gorgon_engine.sampling import SamplingBatch, TokenCounts, process_logits, sample
from gorgon_engine.transfer import to_device
from gorgon_engine.tree.cost_model import FULL, Effort
from gorgon_engine.tree.tree import TreeBatch, flatten


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a step should report beside the tokens: each costs some time."""

    num_logprobs: int | None = None  # alternatives a token; None = no log-probabilities at all
    logprob_rows: tuple[int, ...] | None = None  # of the batch, for whom; None = all
    trace: bool = False  # the trees themselves
    trace_rows: tuple[int, ...] | None = None
    draft: bool = True  # a next tree to verify; False = plain decoding, at no cost
    effort: Effort = FULL  # to find it
    rows: DraftRows | DraftMasks = ALL_ROWS  # drafted for

    @property
    def drafts(self) -> bool:
        """Whether a next tree is looked for at all."""
        return self.draft and not self.effort.is_none


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """The next part of a prompt, to be run in its slot."""

    slot: int
    tokens: tuple[int, ...]  # the whole prompt, and what of the answer was said before
    start: int  # positions that have been run
    stop: int
    prompt_length: int  # of the prompt alone
    remember: bool = True  # tell the drafters with a memory, who have been told of all before it

    @property
    def is_last(self) -> bool:
        return self.stop == len(self.tokens)


class SpeculativeStep:
    """The verbs of a step over one backbone, one cache and one set of drafters. No per-sequence state but the history
    of tokens and what drafters remember, which lie beside the KV cache and are indexed like it."""

    buckets: Buckets | None = None  # sizes that a step is rounded up to; None: every size is run as it is
    runs_ahead: bool = False  # whether launching a step before the last one is read gains anything

    def __init__(
        self, backbone: Backbone, cache: KVCache, drafters: Iterable[Drafter], *, max_nodes: int, max_depth: int
    ) -> None:
        assert max_nodes <= cache.max_scratch
        self.backbone = backbone
        self.cache = cache
        self.max_nodes = max_nodes
        self.max_depth = max_depth
        self.drafting = Drafting(drafters, cache, max_nodes=max_nodes, max_depth=max_depth)

    @property
    def drafters(self) -> tuple[Drafter, ...]:
        return self.drafting.drafters

    @torch.inference_mode()
    def run(
        self,
        batch: RunningBatch,
        num_nodes: Sequence[int],
        *,
        max_length: int,
        rule: AcceptanceRule,
        wanted: Wanted,
    ) -> StepResult:
        """One step for every sequence of the batch.

        num_nodes: rows to verify for each sequence, root included. max_length: the host's upper bound of the
        sequences' committed lengths.
        """
        return self.launch(batch, num_nodes, max_length=max_length, rule=rule, wanted=wanted).read()

    @torch.inference_mode()
    def launch(
        self,
        batch: RunningBatch,
        num_nodes: Sequence[int],
        *,
        max_length: int,
        rule: AcceptanceRule,
        wanted: Wanted,
    ) -> LaunchedStep:
        """As `run`, without waiting for what it gives."""
        rows = to_device(num_nodes, batch.slots.device)
        advanced = self.advance(batch, rows, max(num_nodes), max_length=max_length, rule=rule, wanted=wanted)
        return launched(advanced, wanted)

    def advance(
        self, batch: RunningBatch, rows: Tensor, width: int, *, max_length: int, rule: AcceptanceRule, wanted: Wanted
    ) -> Advanced:
        """The device part: tensors in, tensors out. rows: [B] as `num_nodes` of `run`, none above `width`."""
        clock = _Clock(batch.slots.device)
        tree = flatten(batch.root_tokens, batch.candidates, rows, width)
        verified = self.verify(batch, tree, max_length)
        verify_seconds = clock.lap()
        accepted = self.accept(batch, tree, verified, rule)
        accept_seconds = clock.lap()
        after = self.commit(batch, verified, accepted)
        commit_seconds = clock.lap()
        if wanted.draft:
            self.observe(batch, verified, accepted, wanted.rows)
        after = self.draft(after, max_length + accepted.tokens.shape[1], wanted)
        seconds = StepSeconds(clock.lap(), verify_seconds, accept_seconds, commit_seconds)
        figures = figures_of(after, tree, accepted, verified.row_logits, wanted)
        return Advanced(after, figures, tree.source_names, seconds)

    @torch.inference_mode()
    def prefill(
        self,
        chunks: Sequence[PrefillChunk],
        sampling: SamplingBatch | None,
        counts: TokenCounts | None,
        *,
        wanted: Wanted,
    ) -> StepResult | None:
        """Run the next parts of some prompts, in one pass where they fit together.

        Of those that end with it the first token is sampled, which becomes the root, and the first tree drafted: the
        result has a row for each of them, in their order, and so have `sampling`, `counts` and `wanted.rows`. None
        where no prompt ends.
        """
        outputs = self._run_chunks(chunks)
        ended = [place for place, chunk in enumerate(chunks) if chunk.is_last]
        batch = None
        if ended:
            assert sampling is not None, "prompts that end are sampled from"
            batch = self._first_tokens([chunks[i] for i in ended], [outputs[i] for i in ended], sampling, counts)
        if self.drafting.is_remembering:
            for chunk, output in zip(chunks, outputs, strict=True):
                if chunk.remember:
                    self._observe_prompt(chunk, output)
        if batch is None:
            return None
        ones = torch.ones_like(batch.root_tokens)
        root = flatten(batch.root_tokens, None, ones, 1)
        first = Acceptance(path=root.depths, tokens=root.tokens, num_committed=ones)
        logits = RowLogits.of(torch.cat([outputs[place].logits for place in ended]))
        drafted = self.draft(batch, max(len(chunks[place].tokens) for place in ended), wanted)
        figures = figures_of(drafted, root, first, logits, wanted)
        return launched(Advanced(drafted, figures, root.source_names, StepSeconds()), wanted).read()

    def _run_chunks(self, chunks: Sequence[PrefillChunk]) -> list[ForwardOutput]:
        """What the backbone makes of each chunk: hidden states [1, n, C], and logits [1, 1, V] where it is a last."""
        outputs: dict[int, ForwardOutput] = {}
        for places in self._passes(chunks):
            together = [chunks[place] for place in places]
            output = self._forward(together)
            for row, (place, chunk) in enumerate(zip(places, together, strict=True)):
                hidden = output.hidden[row : row + 1, : chunk.stop - chunk.start]
                outputs[place] = ForwardOutput(hidden, RowLogits.of(output.logits[row : row + 1]))
        return [outputs[place] for place in range(len(chunks))]

    def _passes(self, chunks: Sequence[PrefillChunk]) -> list[list[int]]:
        """Which chunks run together: one pass, but for those whose padding would leave their slot."""
        widest = max(chunk.stop - chunk.start for chunk in chunks)
        fit = [i for i, chunk in enumerate(chunks) if chunk.start + widest <= self.cache.num_positions]
        alone = [[i] for i in range(len(chunks)) if i not in fit]
        return [fit, *alone] if fit else alone

    def _forward(self, chunks: Sequence[PrefillChunk]) -> ForwardOutput:
        """Hidden states [B, N, C] of the chunks' positions and, where a prompt ends, logits [B, 1, V] of the last."""
        device = self.backbone.device
        for chunk in chunks:
            if chunk.start == 0:
                self.drafting.history[chunk.slot, : len(chunk.tokens)] = to_device(chunk.tokens, device)
        return self.run_prompts(chunks)

    @torch.inference_mode()
    def run_prompts(self, chunks: Sequence[PrefillChunk]) -> ForwardOutput:
        """One pass of the backbone over the next parts of some prompts: as `_forward`, and nothing else is told."""
        device = self.backbone.device
        sizes = [chunk.stop - chunk.start for chunk in chunks]
        width = max(sizes)
        padded = [(*chunk.tokens[chunk.start : chunk.stop], *[0] * (width - size))
                  for chunk, size in zip(chunks, sizes, strict=True)]  # fmt: skip
        inputs = ForwardInputs(
            tokens=to_device([token for row in padded for token in row], device).view(len(chunks), width),
            depths=torch.arange(width, device=device).expand(len(chunks), -1),
            slots=to_device([chunk.slot for chunk in chunks], device),
            lengths=to_device([chunk.start for chunk in chunks], device),
            num_rows=to_device(sizes, device),
            prompt_lengths=to_device([chunk.prompt_length for chunk in chunks], device),
            max_positions=max(chunk.start for chunk in chunks) + width,
        )
        return self._pass_over(inputs, ends=any(chunk.is_last for chunk in chunks))

    def _pass_over(self, inputs: ForwardInputs, *, ends: bool) -> ForwardOutput:
        output = self.backbone.forward(inputs, self.cache, logits_for=LogitsFor.LAST if ends else LogitsFor.NONE)
        self.cache.append(inputs.slots, inputs.num_rows)
        return output

    def _first_tokens(
        self,
        chunks: Sequence[PrefillChunk],
        outputs: Sequence[ForwardOutput],
        sampling: SamplingBatch,
        counts: TokenCounts | None,
    ) -> RunningBatch:
        """The state of prompts that have ended."""
        device = self.backbone.device
        slots = to_device([chunk.slot for chunk in chunks], device)
        positions = to_device([len(chunk.tokens) for chunk in chunks], device)
        logits = torch.cat([output.logits[:, -1] for output in outputs])
        tokens = sample(process_logits(logits, sampling, counts), sampling, positions)
        if counts is not None:
            counts.add(tokens, torch.ones_like(tokens, dtype=torch.bool))
        self.drafting.history[slots, positions] = tokens
        return RunningBatch(
            slots=slots,
            prompt_lengths=to_device([chunk.prompt_length for chunk in chunks], device),
            root_tokens=tokens,
            hidden=torch.cat([output.hidden[:, -1] for output in outputs]),
            sampling=sampling,
            counts=counts,
            candidates=None,
        )

    def _observe_prompt(self, chunk: PrefillChunk, output: ForwardOutput) -> None:
        """Once the token behind it is in the history."""
        device = self.backbone.device
        self.drafting.observe(
            Committed(
                slots=to_device([chunk.slot], device),
                starts=to_device([chunk.start], device),
                hidden=output.hidden,
                next_tokens=self.drafting.history[chunk.slot, chunk.start + 1 : chunk.stop + 1].clone()[None],
                counts=to_device([chunk.stop - chunk.start], device),
            )
        )

    def verify(self, batch: RunningBatch, tree: TreeBatch, max_length: int) -> ForwardOutput:
        """One pass of the backbone over all nodes; their keys and values go to scratch behind the committed length."""
        inputs = ForwardInputs(
            tokens=tree.tokens,
            depths=tree.depths,
            slots=batch.slots,
            lengths=self.cache.lengths[batch.slots],
            num_rows=tree.num_nodes,
            prompt_lengths=batch.prompt_lengths,
            max_positions=min(round_up(max_length + tree.tokens.shape[1]), self.cache.num_positions),
            ancestors=tree.ancestors,
        )
        return self.backbone.forward(inputs, self.cache)

    def accept(self, batch: RunningBatch, tree: TreeBatch, verified: ForwardOutput, rule: AcceptanceRule) -> Acceptance:
        """Walk each tree to the last node that the backbone agrees with."""
        return accept(
            tree,
            verified.row_logits,
            positions=self.cache.lengths[batch.slots],
            sampling=batch.sampling,
            counts=batch.counts,
            rule=rule,
            max_depth=self.max_depth,
        )

    def commit(self, batch: RunningBatch, verified: ForwardOutput, accepted: Acceptance) -> RunningBatch:
        """Slice the cache to the accepted branch; the bonus token becomes the next root."""
        roots = self.cache.commit_step(
            batch.slots,
            accepted.path,
            accepted.num_committed,
            tokens=accepted.tokens,
            history=self.drafting.history,
            hidden=verified.hidden,
        )
        return replace(batch, root_tokens=roots.tokens, hidden=roots.hidden)

    def observe(
        self,
        batch: RunningBatch,
        verified: ForwardOutput,
        accepted: Acceptance,
        chosen: DraftRows | DraftMasks = ALL_ROWS,
    ) -> None:
        """Tell the drafters that remember what was committed of the sequences that they know; masks leave nobody out.
        batch: its slots."""
        known = None if isinstance(chosen, DraftMasks) else chosen.known
        if not self.drafting.is_remembering or known == ():
            return
        rows = torch.arange(batch.slots.shape[0], device=batch.slots.device)[:, None]
        committed = Committed(
            slots=batch.slots,
            starts=self.cache.lengths[batch.slots] - accepted.num_committed,
            hidden=verified.hidden[rows, accepted.path],
            next_tokens=accepted.tokens,
            counts=accepted.num_committed,
        )
        self.drafting.observe(select_rows(committed, known))

    def draft(self, batch: RunningBatch, max_length: int, wanted: Wanted | None = None) -> RunningBatch:
        """Guess continuations of the roots, best first. max_length: the host's bound of the committed lengths."""
        wanted = wanted or Wanted()
        candidates = None
        if wanted.draft:
            candidates = self.drafting.propose(batch, max_length, wanted.rows, wanted.effort)
        return replace(batch, candidates=candidates)


class _Clock:
    """Lap times on a CPU; on a GPU, where a lap would need a synchronisation, zeros."""

    def __init__(self, device: torch.device) -> None:
        self._on = device.type == "cpu"
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        return elapsed if self._on else 0.0
