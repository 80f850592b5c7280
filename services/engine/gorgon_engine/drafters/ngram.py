"""Prompt lookup: guess that what followed an earlier copy of the text's end follows it again.

The drafter of PLD (apoorvumang/prompt-lookup-decoding) as a tree: several earlier places instead of one, the longest
match first, the most recent among equals. No weights; it lives off texts that repeat themselves or their prompt.

Letters: B sequences, S history positions, W match length looked at, P places kept, D depth, M nodes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gorgon_engine.drafters.base import DraftContext
from gorgon_engine.tree.candidates import CandidateTree
from gorgon_protocol.errors import BadRequestError

_MAX_MATCH = 64
_MAX_CHAINS = 16
_MAX_DEPTH = 64
# Places looked at for each chain wanted: repeated text offers the same continuation many times.
_PLACES_PER_CHAIN = 4


@dataclass(frozen=True, slots=True)
class LookupTable:
    """How far a lookup can be trusted, by the length of the match that found it.

    Row i holds for matches of at least `match_lengths[i]` tokens: `next_token[i][d]`, the chance that the continuation's
    token at depth d + 1 is right when those before it are (the last column also serves deeper ones), and `other[i]`,
    the chance of a continuation that leaves a better one, at the place where it does.
    """

    match_lengths: tuple[int, ...]
    next_token: tuple[tuple[float, ...], ...]
    other: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.match_lengths) == len(self.next_token) == len(self.other)
        assert self.match_lengths[0] == 1
        assert list(self.match_lengths) == sorted(set(self.match_lengths))


MEASURED = None


class NgramDrafter:
    """Looks up the end of each sequence (1..`max_match` tokens, the root last) in the sequence itself.

    Up to `num_chains` distinct continuations of `depth` tokens each, joined where they begin alike. A continuation that
    reaches the end of the known text goes on in the guess itself, as looking up token by token would.
    """

    def __init__(
        self, *, max_match: int = 12, num_chains: int = 4, depth: int = 10, table: LookupTable | None = MEASURED
    ) -> None:
        for name, value, high in (
            ("max_match", max_match, _MAX_MATCH),
            ("num_chains", num_chains, _MAX_CHAINS),
            ("depth", depth, _MAX_DEPTH),
        ):
            if not 1 <= value <= high:
                raise BadRequestError(f"{name} of the lookup drafter must be between 1 and {high}: got {value}")
        self._max_match = max_match
        self._num_chains = num_chains
        self._depth = depth
        self._next_token, self._other = _tensors(table, max_match, depth)

    @property
    def name(self) -> str:
        return "lookup"

    def propose(self, context: DraftContext, max_nodes: int) -> CandidateTree:
        """Best first; all padding where the end of a sequence occurs nowhere before it."""
        if max_nodes < 1:
            raise BadRequestError(f"max_nodes must be at least 1: got {max_nodes}")
        history, last = context.history, context.history_lengths - 1
        matches = _match_lengths(history, last, self._max_match)  # [B, S]
        places, matches = _best_places(matches, self._num_chains * _PLACES_PER_CHAIN)  # [B, P] twice
        chains = _continuations(history, last, places, self._depth)  # [B, P, D]
        return self._join(chains, matches, max_nodes)

    def _join(self, chains: Tensor, matches: Tensor, max_nodes: int) -> CandidateTree:
        """A prefix tree of chains [B, P, D] found by matches [B, P] (0: nothing found), sorted by probability."""
        batch, num_places, depth = chains.shape
        index = torch.arange(num_places, device=chains.device)
        found = matches > 0
        alike = (chains[:, :, None] == chains[:, None]).cumprod(dim=3).bool()  # [B, P, P, D]: same tokens down to here
        alike &= found[:, None, :, None]
        # The node of a path belongs to the first chain that takes it.
        owner = torch.where(alike, index[:, None], num_places).amin(dim=2)  # [B, P, D]
        own = (owner == index[:, None]) & found[:, :, None]
        kept = own[:, :, -1] & (own[:, :, -1].cumsum(dim=1) <= self._num_chains)
        own &= kept[:, :, None]
        above = torch.cat([torch.full_like(owner[:, :, :1], -1), owner[:, :, :-1]], dim=2)  # owner of the parent

        # A chain's first own node is another choice beside an earlier chain's, unless the chain is the very first.
        branches = own & (above != index[:, None]) & (index > 0)[:, None]
        row = (matches - 1).clamp(min=0)
        conditional = torch.where(branches, self._other.to(row.device)[row][:, :, None], self._next_token.to(row.device)[row])
        conditional = conditional.gather(1, owner.clamp(max=num_places - 1))
        log_probs = conditional.cumsum(dim=2).masked_fill(~own, -torch.inf)
        siblings = own[:, None] & (above[:, :, None] == above[:, None]) & (index < index[:, None])[:, :, None]
        ranks = siblings.sum(dim=2)

        parents = torch.where(above < 0, -1, above * depth + torch.arange(-1, depth - 1, device=above.device))
        # Stable: a parent comes before its children, so it does among equals too.
        count = min(max_nodes, self._num_chains * depth, num_places * depth)
        log_probs, order = log_probs.flatten(1).sort(dim=1, descending=True, stable=True)
        log_probs, order = log_probs[:, :count], order[:, :count]
        place = torch.zeros((batch, num_places * depth), dtype=torch.int64, device=chains.device)
        place.scatter_(1, order, torch.arange(count, device=chains.device).expand_as(order))
        parents = parents.flatten(1).gather(1, order)
        parents = torch.where(parents < 0, -1, place.gather(1, parents.clamp(min=0)))
        valid = log_probs > -torch.inf
        return CandidateTree(
            tokens=chains.flatten(1).gather(1, order),
            parents=torch.where(valid, parents, -1),
            log_probs=log_probs,
            ranks=torch.where(valid, ranks.flatten(1).gather(1, order), 0),
            source=self.name,
        )


def _match_lengths(history: Tensor, last: Tensor, max_match: int) -> Tensor:
    """[B, S] int64: how many tokens up to position s equal those up to `last[b]`; 0 from `last[b]` on."""
    num_positions = history.shape[1]
    # Positions before the text compare unequal to real tokens, which ends every match there.
    padded = torch.nn.functional.pad(history, (max_match - 1, 0), value=-1)
    back = torch.arange(max_match, device=history.device)
    suffix = padded.gather(1, (last[:, None] + max_match - 1) - back)  # [B, W], newest first
    windows = padded.unfold(1, num_positions, 1).flip(1)  # [B, W, S]: row w is the history shifted by w
    equal = windows == suffix[:, :, None]
    length = torch.where(equal, max_match, back[:, None]).amin(dim=1)  # the first unequal one
    before = torch.arange(num_positions, device=history.device) < last[:, None]
    return torch.where(before, length, 0)


def _best_places(matches: Tensor, num_places: int) -> tuple[Tensor, Tensor]:
    """Positions [B, P] of the longest matches, the most recent first among equals, and their lengths [B, P]."""
    num_positions = matches.shape[1]
    score = matches * num_positions + torch.arange(num_positions, device=matches.device)
    score = score.topk(min(num_places, num_positions), dim=1).values
    return score % num_positions, score // num_positions


def _continuations(history: Tensor, last: Tensor, places: Tensor, depth: int) -> Tensor:
    """[B, P, D] tokens after the places, repeating with the distance to the end where they reach it."""
    distance = (last[:, None] - places).clamp(min=1)  # [B, P]
    steps = torch.arange(depth, device=history.device) % distance[:, :, None]
    index = (places[:, :, None] + 1 + steps).clamp(max=history.shape[1] - 1)
    return history.gather(1, index.flatten(1)).view(index.shape)


def _tensors(table: LookupTable, max_match: int, depth: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities [max_match, depth] of the next token and [max_match] of another choice, by match length - 1."""
    rows = [sum(length <= match for length in table.match_lengths) - 1 for match in range(1, max_match + 1)]
    next_token = [[table.next_token[row][min(d, len(table.next_token[row]) - 1)] for d in range(depth)] for row in rows]
    return torch.tensor(next_token).log(), torch.tensor([table.other[row] for row in rows]).log()
