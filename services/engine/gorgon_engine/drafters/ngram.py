"""Prompt lookup: what followed the last time that the text stood here (Saxena 2023; LLMA, 2304.04487).

The current suffix, root last, is looked up in the sequence's own prompt and output; what followed its longest earlier
occurrences is the guess. No parameters, no training, and on repetitive text hard to beat.

Letters: B sequences, S history positions, A alternatives (chains), D depth of a chain.
"""

import torch
from torch import Tensor

from gorgon_engine.drafters.base import DraftContext
from gorgon_engine.kernels import dispatch
from gorgon_engine.kernels.cpu.library import available_library
from gorgon_engine.kernels.cpu.lookup import lookup
from gorgon_engine.tree.candidates import CandidateTree

# P(next token right | length of the match, drafts before it right). Rows: matches of at least 1, 2, 3, 4, 5, 7 tokens;
# columns: the first draft, later ones, and the first draft of a further chain that differs from the first's. Measured
# over 160 answers of SmolLM2-135M to MT-bench, half greedy, half at temperature 0.7 (docs/experiments.md; the first
# two columns by benchmarks/engine/ngram_confidence.py).
MATCH_CLASSES = (1, 2, 3, 4, 5, 7)
_CONFIDENCE = (
    (0.20, 0.62, 0.09),
    (0.47, 0.71, 0.13),
    (0.58, 0.78, 0.15),
    (0.69, 0.81, 0.16),
    (0.76, 0.83, 0.16),
    (0.91, 0.95, 0.28),
)


class NgramDrafter:
    """Up to `num_chains` continuations of the longest, then most recent, earlier occurrences of the suffix."""

    name = "lookup"
    is_costly = False

    def __init__(
        self, *, max_match: int = 8, num_chains: int = 4, depth: int = 12, device: torch.device | None = None
    ) -> None:
        self.max_match = max_match
        self.num_chains = num_chains
        self.depth = depth
        # Made once: a constant made during a step would be a synchronising copy on a GPU.
        match = torch.arange(max_match + 1)
        row = (torch.searchsorted(torch.tensor(MATCH_CLASSES), match, right=True) - 1).clamp(min=0)
        self._log_confidence = torch.tensor(_CONFIDENCE)[row].log().to(device)  # [1 + max_match, 3], by match length

    def propose(self, context: DraftContext, max_nodes: int) -> CandidateTree:
        """As `Drafter.propose`. Chains that were not found, and what lies behind the known text, are padding."""
        depth = min(self.depth, max_nodes)
        num_chains = min(self.num_chains, context.history.shape[1], max(1, max_nodes // depth))
        if dispatch.uses_triton(context.history):
            from gorgon_engine.kernels.triton.lookup import lookup as triton_lookup

            found = triton_lookup(
                context.history, context.history_lengths, self._log_confidence, num_chains=num_chains, depth=depth
            )
            return CandidateTree(**found._asdict(), source=self.name)
        library = available_library() if context.history.device.type == "cpu" else None
        if library is None:
            return self.propose_reference(context, num_chains, depth)
        history, lengths = context.history.contiguous(), context.history_lengths
        chains = lookup(library, history, lengths, self._log_confidence, num_chains=num_chains, depth=depth)
        return CandidateTree(**chains._asdict(), source=self.name)

    def propose_reference(self, context: DraftContext, num_chains: int, depth: int) -> CandidateTree:
        """`num_chains` chains of `depth` candidates, in tensor operations on any device."""
        history, lengths = context.history, context.history_lengths
        batch, num_positions = history.shape
        device = history.device
        matched = match_lengths(history, lengths, self.max_match)  # [B, S]
        position = torch.arange(num_positions, device=device)
        # Longest match first, the most recent of equals: one key that sorts both ways.
        best = torch.topk(matched * num_positions + position, num_chains, dim=1).values  # [B, A]
        ends, match = best % num_positions, best // num_positions

        step = torch.arange(1, depth + 1, device=device)
        source = ends[:, :, None] + step  # [B, A, D]
        known = (source < lengths[:, None, None]) & (match > 0)[:, :, None]
        source = source.clamp(max=num_positions - 1).flatten(1)
        tokens = history.gather(1, source)  # [B, A * D]
        first, later, further = self._log_confidence[match].unbind(dim=2)  # [B, A]
        # Chains that begin like the first are joined with it, at its confidence; where they part, theirs counts.
        first = torch.cat([first[:, :1], further[:, 1:]], dim=1)
        log_probs = first[:, :, None] + later[:, :, None] * (step - 1)
        log_probs = log_probs.masked_fill(~known, -torch.inf)
        index = torch.arange(num_chains * depth, device=device).expand(batch, -1)
        parents = torch.where(index % depth == 0, -1, index - 1)
        return CandidateTree(
            tokens=tokens,
            parents=parents,
            log_probs=log_probs.flatten(1),
            ranks=index // depth,
            source=self.name,
        )


def match_lengths(history: Tensor, lengths: Tensor, max_match: int) -> Tensor:
    """[B, S] int64: how many tokens before and at each position equal the sequence's own end, at most `max_match`.

    history: [B, S]; lengths: [B]. Zero at the end itself and behind it: there is nothing to copy.
    """
    num_positions = history.shape[1]
    back = torch.arange(max_match, device=history.device)
    last = (lengths - 1)[:, None]
    suffix = history.gather(1, (last - back).clamp(min=0))  # [B, m], newest first
    windows = torch.nn.functional.pad(history, (max_match - 1, 0), value=-1).unfold(1, max_match, 1)  # [B, S, m]
    equal = (windows == suffix.flip(1)[:, None]) & (back <= last).flip(1)[:, None]
    run = equal.flip(2).cumprod(dim=2).sum(dim=2)
    return run.masked_fill_(torch.arange(num_positions, device=history.device) >= last, 0)
