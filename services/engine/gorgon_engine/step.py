"""One step of the engine: verify the drafted tree, accept a branch, commit it, draft the next tree.

It is draft -> verify -> accept -> commit turned by one verb: the draft of the *next* tree closes the step, so that the
single device-to-host read at the end brings back the emitted tokens together with what the host needs to size the next
tree. Between that read and the next nothing branches on device values, and every shape is fixed by (batch, width):
on a GPU the four verbs can be captured whole in a CUDA graph.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gorgon_engine.acceptance import Acceptance, AcceptanceRule, accept
from gorgon_engine.backbone.base import Backbone, ForwardInputs, ForwardOutput, LogitsFor
from gorgon_engine.batch import RunningBatch
from gorgon_engine.drafters.base import Committed, DraftContext, Drafter, StatefulDrafter
from gorgon_engine.kv_cache import KVCache
from gorgon_engine.logprobs import TokenLogprobs, gather_logprobs, token_logprobs
from gorgon_engine.sampling import SamplingBatch, TokenCounts, process_logits, sample
from gorgon_engine.transfer import read_back, to_device
from gorgon_engine.tree.tree import TreeBatch, flatten, merge_candidates

# The part of the cache and of the history that a step looks at is rounded up to this many positions, so that a GPU
# sees few distinct shapes.
POSITION_BUCKET = 128


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a step should report beside the tokens: each costs some time."""

    num_logprobs: int | None = None  # alternatives a token; None = no log-probabilities at all
    trace: bool = False  # the trees themselves
    draft: bool = True  # a next tree to verify; False = plain decoding, at no cost
    costly: bool = True  # drafted by the drafters that run a network too


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Wall-clock time of each verb, measured on a CPU; zero on a GPU, where measuring would mean synchronising."""

    draft: float = 0.0
    verify: float = 0.0
    accept: float = 0.0
    commit: float = 0.0


@dataclass(frozen=True, slots=True)
class TreeTrace:
    """One sequence's verified tree as the host sees it, the root left out: what the page draws."""

    tokens: list[int]
    parents: list[int]  # index into the lists, -1 = child of the root
    depths: list[int]
    probabilities: list[float]  # of the whole path, by the drafters' estimate
    ranks: list[int]
    sources: list[str]
    accepted: list[bool]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the host learns from one step, an entry a sequence of the batch."""

    batch: RunningBatch  # the state after the step
    tokens: list[list[int]]  # emitted: accepted drafts in path order, then the bonus token
    num_drafted: list[int]  # nodes verified, the root not counted
    path_probs: list[list[float]]  # of the next tree's candidates, descending
    logprobs: list[list[TokenLogprobs]] | None
    traces: list[TreeTrace] | None
    seconds: StepSeconds
    drafted: bool = False  # a next tree was looked for,
    drafted_costly: bool = False  # and by the drafters that run a network too


class SpeculativeStep:
    """The verbs of a step over one backbone, one cache and one set of drafters. No per-sequence state but the history
    of tokens and what drafters remember, which lie beside the KV cache and are indexed like it."""

    def __init__(
        self, backbone: Backbone, cache: KVCache, drafters: Sequence[Drafter], *, max_nodes: int, max_depth: int
    ) -> None:
        assert max_nodes <= cache.max_scratch
        self.backbone = backbone
        self.cache = cache
        num_positions = cache.keys.shape[3]
        self.drafters = tuple(
            drafter.for_slots(cache.num_slots, num_positions) if isinstance(drafter, StatefulDrafter) else drafter
            for drafter in drafters
        )
        self.max_nodes = max_nodes
        self.max_depth = max_depth
        # Nobody has to remember anything where nothing is ever drafted.
        self._stateful = [d for d in self.drafters if isinstance(d, StatefulDrafter) and max_nodes > 1]
        self._history = torch.zeros((cache.num_slots, num_positions + 1), dtype=torch.int64, device=backbone.device)

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
        clock = _Clock(batch.slots.device)
        rows = to_device(num_nodes, batch.slots.device)
        tree = flatten(batch.root_tokens, batch.candidates, rows, max(num_nodes))
        verified = self.verify(batch, tree, max_length)
        verify_seconds = clock.lap()
        accepted = self.accept(batch, tree, verified, rule)
        accept_seconds = clock.lap()
        after = self.commit(batch, verified, accepted)
        commit_seconds = clock.lap()
        if wanted.draft:
            self.observe(batch, verified, accepted)
            after = self.draft(after, max_length + accepted.tokens.shape[1], costly=wanted.costly)
        seconds = StepSeconds(clock.lap(), verify_seconds, accept_seconds, commit_seconds)
        return _read(after, tree, accepted, verified.logits, wanted, seconds)

    @torch.inference_mode()
    def prefill(
        self,
        slot: int,
        prompt: Sequence[int],
        sampling: SamplingBatch,
        counts: TokenCounts | None,
        *,
        chunk_size: int,
        wanted: Wanted,
        check: Callable[[], None],
    ) -> StepResult:
        """Run a prompt into its slot, sample the first token, which becomes the root, and draft its first tree.

        `check` is called between chunks and may raise to give up.
        """
        device = self.backbone.device
        tokens = torch.tensor(prompt, dtype=torch.int64, device=device)
        self._history[slot, : len(prompt)] = tokens
        for start in range(0, len(prompt), chunk_size):
            check()
            chunk = tokens[start : start + chunk_size]
            inputs = ForwardInputs.chain(chunk, slot=slot, length=start, prompt_length=len(prompt))
            last = start + chunk_size >= len(prompt)
            output = self.backbone.forward(inputs, self.cache, logits_for=LogitsFor.LAST if last else LogitsFor.NONE)
            self.cache.append(slot, chunk.shape[0])
            if wanted.draft and not last:
                self._observe_prompt(slot, start, output)
        position = torch.tensor([len(prompt)], device=device)
        token = sample(process_logits(output.logits[:, -1], sampling, counts), sampling, position)
        if counts is not None:
            counts.add(token, torch.ones_like(token, dtype=torch.bool))
        self._history[slot, len(prompt)] = token[0]
        batch = RunningBatch(
            slots=torch.tensor([slot], device=device),
            prompt_lengths=position,
            root_tokens=token,
            hidden=output.hidden[:, -1],
            sampling=sampling,
            counts=counts,
            candidates=None,
        )
        root = flatten(token, None, torch.ones_like(token), 1)
        first = Acceptance(path=root.depths, tokens=token[:, None], num_committed=torch.ones_like(token))
        drafted = batch
        if wanted.draft:
            self._observe_prompt(slot, start, output)  # the last chunk, which the root follows
            drafted = self.draft(batch, len(prompt), costly=wanted.costly)
        return _read(drafted, root, first, output.logits[:, -1:], wanted, StepSeconds())

    def verify(self, batch: RunningBatch, tree: TreeBatch, max_length: int) -> ForwardOutput:
        """One pass of the backbone over all nodes; their keys and values go to scratch behind the committed length."""
        inputs = ForwardInputs(
            tokens=tree.tokens,
            depths=tree.depths,
            slots=batch.slots,
            lengths=self.cache.lengths[batch.slots],
            num_rows=tree.num_nodes,
            prompt_lengths=batch.prompt_lengths,
            max_positions=min(_round_up(max_length + tree.tokens.shape[1]), self.cache.keys.shape[3]),
            ancestors=tree.ancestors,
        )
        return self.backbone.forward(inputs, self.cache)

    def accept(self, batch: RunningBatch, tree: TreeBatch, verified: ForwardOutput, rule: AcceptanceRule) -> Acceptance:
        """Walk each tree to the last node that the backbone agrees with."""
        return accept(
            tree,
            verified.logits,
            positions=self.cache.lengths[batch.slots],
            sampling=batch.sampling,
            counts=batch.counts,
            rule=rule,
            max_depth=self.max_depth,
        )

    def commit(self, batch: RunningBatch, verified: ForwardOutput, accepted: Acceptance) -> RunningBatch:
        """Slice the cache to the accepted branch; the bonus token becomes the next root."""
        rows = torch.arange(batch.slots.shape[0], device=batch.slots.device)
        lengths = self.cache.lengths[batch.slots]
        self.cache.commit(batch.slots, accepted.path, accepted.num_committed)
        places = torch.arange(1, accepted.tokens.shape[1] + 1, device=lengths.device)
        self._history[batch.slots[:, None], lengths[:, None] + places] = accepted.tokens
        last = accepted.num_committed - 1
        return replace(
            batch,
            root_tokens=accepted.tokens[rows, last],
            hidden=verified.hidden[rows, accepted.path[rows, last]],
        )

    def observe(self, batch: RunningBatch, verified: ForwardOutput, accepted: Acceptance) -> None:
        """Tell the drafters that remember what was committed, also in steps in which they do not draft: else their
        memory had gaps. Sequences that do not speculate never get here. batch: its slots count."""
        if not self._stateful:
            return
        rows = torch.arange(batch.slots.shape[0], device=batch.slots.device)[:, None]
        committed = Committed(
            slots=batch.slots,
            starts=self.cache.lengths[batch.slots] - accepted.num_committed,
            hidden=verified.hidden[rows, accepted.path],
            next_tokens=accepted.tokens,
            counts=accepted.num_committed,
        )
        for drafter in self._stateful:
            drafter.observe(committed)

    def _observe_prompt(self, slot: int, start: int, output: ForwardOutput) -> None:
        """The chunk of a prompt from `start` on, once the token behind it is in the history."""
        if not self._stateful:
            return
        count, device = output.hidden.shape[1], self.backbone.device
        committed = Committed(
            slots=torch.tensor([slot], device=device),
            starts=torch.tensor([start], device=device),
            hidden=output.hidden,
            next_tokens=self._history[slot, start + 1 : start + count + 1].clone()[None],
            counts=torch.tensor([count], device=device),
        )
        for drafter in self._stateful:
            drafter.observe(committed)

    def draft(self, batch: RunningBatch, max_length: int, *, costly: bool = True) -> RunningBatch:
        """Guess continuations of every root, best first. costly: by the drafters that run a network too."""
        drafters = [drafter for drafter in self.drafters if costly or not drafter.is_costly]
        if not drafters or self.max_nodes == 1:
            return replace(batch, candidates=None)
        bound = min(_round_up(max_length + 1), self._history.shape[1])
        context = DraftContext(
            root_tokens=batch.root_tokens,
            hidden=batch.hidden,
            history=self._history[batch.slots, :bound],
            history_lengths=self.cache.lengths[batch.slots] + 1,
            seeds=batch.sampling.seeds,
            slots=batch.slots,
        )
        forests = [drafter.propose(context, self.max_nodes - 1) for drafter in drafters]
        # On a CPU a look at the guesses costs nothing: where there are none, the next step is a plain one at no cost.
        if batch.slots.device.type == "cpu" and not any(bool((f.log_probs > -torch.inf).any()) for f in forests):
            return replace(batch, candidates=None)
        candidates = merge_candidates(forests, max_nodes=self.max_nodes, max_depth=self.max_depth)
        return replace(batch, candidates=candidates)


def _read(
    after: RunningBatch, tree: TreeBatch, accepted: Acceptance, logits: Tensor, wanted: Wanted, seconds: StepSeconds
) -> StepResult:
    """The step's only device-to-host transfer."""
    tensors = {
        "tokens": accepted.tokens,
        "num_committed": accepted.num_committed,
        "num_nodes": tree.num_nodes,
    }
    if after.candidates is not None:
        tensors["path_probs"] = after.candidates.path_probs()
    if wanted.trace:
        for name in ("parents", "depths", "log_probs", "ranks", "sources"):
            tensors[name] = getattr(tree, name)
        tensors["node_tokens"], tensors["path"] = tree.tokens, accepted.path
    if wanted.num_logprobs is not None:
        tensors |= gather_logprobs(logits, accepted, wanted.num_logprobs)
    read = read_back(tensors)
    num_committed = [int(n) for n in read["num_committed"]]
    tokens = [[int(t) for t in row[:n]] for row, n in zip(read["tokens"].tolist(), num_committed, strict=True)]
    rows = range(len(tokens))
    return StepResult(
        batch=after,
        tokens=tokens,
        num_drafted=[int(n) - 1 for n in read["num_nodes"]],
        path_probs=read["path_probs"].tolist() if "path_probs" in read else [[] for _ in rows],
        logprobs=[token_logprobs(read, row, tokens[row]) for row in rows] if "logprob" in read else None,
        traces=[_trace(read, row, tree.source_names, num_committed[row]) for row in rows] if wanted.trace else None,
        seconds=seconds,
        drafted=wanted.draft,
        drafted_costly=wanted.draft and wanted.costly,
    )


def _trace(read: dict[str, Tensor], row: int, source_names: tuple[str, ...], num_committed: int) -> TreeTrace:
    stop = int(read["num_nodes"][row])
    kept = {int(node) for node in read["path"][row, :num_committed]}

    def column(name: str) -> list[int]:
        return [int(v) for v in read[name][row, 1:stop]]

    return TreeTrace(
        tokens=column("node_tokens"),
        parents=[p - 1 for p in column("parents")],
        depths=column("depths"),
        probabilities=read["log_probs"][row, 1:stop].exp().tolist(),
        ranks=column("ranks"),
        sources=[source_names[s] for s in column("sources")],
        accepted=[node in kept for node in range(1, stop)],
    )


def _round_up(length: int) -> int:
    return -(-length // POSITION_BUCKET) * POSITION_BUCKET


class _Clock:
    """Lap times on a CPU; on a GPU, where a lap would need a synchronisation, zeros."""

    def __init__(self, device: torch.device) -> None:
        self._on = device.type == "cpu"
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        return elapsed if self._on else 0.0
