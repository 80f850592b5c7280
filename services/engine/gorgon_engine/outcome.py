"""What a step leaves on its device, how the host reads it, and what it learns.

A step's figures go to the host in one transfer, packed side by side; nothing here looks at a value before `read`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from gorgon_engine.acceptance import Acceptance
from gorgon_engine.backbone.base import RowLogits
from gorgon_engine.batch import RunningBatch
from gorgon_engine.logprobs import TokenLogprobs, gather_logprobs, token_logprobs
from gorgon_engine.transfer import Reading, pack, shapes_of, to_device
from gorgon_engine.tree.tree import TreeBatch

if TYPE_CHECKING:
    from gorgon_engine.step import Wanted

T = TypeVar("T")


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
    logprobs: list[list[TokenLogprobs] | None] | None
    traces: list[TreeTrace | None] | None
    seconds: StepSeconds
    drafted: bool = False  # a next tree was looked for,
    drafted_costly: bool = False  # and by the drafters that run a network too


@dataclass(frozen=True, slots=True)
class Advanced:
    """What the device part of a step leaves on its device."""

    batch: RunningBatch  # the state after the step
    figures: dict[str, Tensor]  # [B, ...]: what the host wants to know
    source_names: tuple[str, ...]  # of the verified tree's nodes
    seconds: StepSeconds


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step under way: the next one may be launched from its state before it is read."""

    batch: RunningBatch  # the state after it; good until the next step is launched from it
    max_tokens: int  # most that a sequence may have got
    reading: Reading
    source_names: tuple[str, ...]  # of the verified tree's nodes
    wanted: "Wanted"
    seconds: StepSeconds

    def read(self) -> StepResult:
        """Wait for it, and learn what it gave."""
        read = self.reading.wait(self.batch.slots.shape[0])
        return _result(read, self.batch, self.source_names, self.wanted, self.seconds)


def figures_of(
    after: RunningBatch, tree: TreeBatch, accepted: Acceptance, logits: RowLogits, wanted: "Wanted"
) -> dict[str, Tensor]:
    """What the host reads of a step: its only device-to-host transfer."""
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
        chosen = None if wanted.logprob_rows is None else to_device(wanted.logprob_rows, logits.flat.device)
        tensors |= gather_logprobs(logits, accepted, wanted.num_logprobs, chosen)
    return tensors


def launched(advanced: Advanced, wanted: "Wanted") -> LaunchedStep:
    figures = advanced.figures
    return LaunchedStep(
        batch=advanced.batch,
        max_tokens=figures["tokens"].shape[1],
        reading=Reading(pack(figures), shapes_of(figures)),
        source_names=advanced.source_names,
        wanted=wanted,
        seconds=advanced.seconds,
    )


def _result(
    read: dict[str, Tensor],
    after: RunningBatch,
    source_names: tuple[str, ...],
    wanted: "Wanted",
    seconds: StepSeconds,
) -> StepResult:
    """The figures as the host uses them."""
    num_committed = [int(n) for n in read["num_committed"]]
    tokens = [[int(t) for t in row[:n]] for row, n in zip(read["tokens"].tolist(), num_committed, strict=True)]
    rows = range(len(tokens))
    return StepResult(
        batch=after,
        tokens=tokens,
        num_drafted=[int(n) - 1 for n in read["num_nodes"]],
        path_probs=_without_padding(read["path_probs"]) if "path_probs" in read else [[] for _ in rows],
        logprobs=_of_rows(wanted.logprob_rows, rows, lambda row: token_logprobs(read, row, tokens[row]))
        if wanted.num_logprobs is not None
        else None,
        traces=_of_rows(wanted.trace_rows, rows, lambda row: _trace(read, row, source_names, num_committed[row]))
        if wanted.trace
        else None,
        seconds=seconds,
        drafted=wanted.drafts,
        drafted_costly=wanted.draft and wanted.effort.costly,
    )


def _without_padding(path_probs: Tensor) -> list[list[float]]:
    """path_probs: [B, M], descending, 0 behind each sequence's last candidate."""
    counts = (path_probs > 0.0).sum(dim=1).tolist()
    return [row[:count] for row, count in zip(path_probs.tolist(), counts, strict=True)]


def _of_rows(chosen: tuple[int, ...] | None, rows: range, make: Callable[[int], T]) -> list[T | None]:
    """What each of the chosen rows wants; None for the others."""
    return [make(row) if chosen is None or row in chosen else None for row in rows]


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
