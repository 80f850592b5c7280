"""How many drafts would have been accepted in answers that are already there, without running the engine.

At every place of an answer the drafter makes its tree, which is walked along the tokens that in fact follow: as many
drafts are accepted as the tree has of them in a row. Then each answer is gone through as the engine would, from its
first token on: a step that accepts n drafts gives n + 1 tokens, and the next tree is drafted behind them.

Under target sampling a draft is accepted where it equals the token that the backbone draws, whatever else is in the
tree. So the count is exact for the very answers given, greedy or drawn (at another seed other answers would be drawn):
the engine answering the same prompt takes the same steps, up to near-ties where its kernels are not row-invariant.

Letters: S sequences, T tokens of all of them, P places in all answers, B places drafted at together, M candidates,
C hidden size, E drafts that a walk looks for.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from gorgon_engine.backbone.base import Backbone
from gorgon_engine.drafters.base import Committed, DraftContext, Drafter, StatefulDrafter
from gorgon_engine.tree.candidates import CandidateTree
from gorgon_engine.tree.tree import MAX_NODES, MergedCandidates, merge_candidates
from gorgon_protocol.errors import BadRequestError, DataError
from gorgon_trainer.dataset import PackBatch
from gorgon_trainer.features import hidden_states
from gorgon_trainer.shards import TokenSequence

_NO_TOKEN = -1
_MAX_DEPTH = 16  # the engine's default


@dataclass(frozen=True, slots=True)
class Replayed:
    """The steps of some answers. An answer's first token comes from prefill and is in no step."""

    num_steps: int
    num_tokens: int  # given by those steps
    accepted_histogram: tuple[int, ...]  # [i] = steps that accepted i drafts

    @property
    def acceptance_length(self) -> float:
        """Tokens a step: all tokens over all steps, not a mean of answers' means."""
        return self.num_tokens / self.num_steps

    def __add__(self, other: "Replayed") -> "Replayed":
        """Both sets of answers together."""
        longest = max(len(self.accepted_histogram), len(other.accepted_histogram))
        rows = [(*part.accepted_histogram, *[0] * longest)[:longest] for part in (self, other)]
        return Replayed(
            num_steps=self.num_steps + other.num_steps,
            num_tokens=self.num_tokens + other.num_tokens,
            accepted_histogram=tuple(map(sum, zip(*rows, strict=True))),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """Sequences one after another, their hidden states, and the places in their answers at which a tree is drafted.

    A place is the position of the hidden state that the drafter reads; the root is the token behind it. An answer of n
    tokens has n - 1 places: the first one is the prompt's last token, and the last two tokens need no tree behind them.
    """

    tokens: Tensor  # [T] int64
    hidden: Tensor  # [T, C]
    starts: Tensor  # [S] int64, of the sequences in `tokens`
    places: Tensor  # [P] int64, in `tokens`
    sequences: Tensor  # [P] int64: which sequence the place is in
    ends: Tensor  # [P] int64: where the place's answer ends in `tokens`
    lengths: tuple[int, ...]  # [S] tokens
    num_places: tuple[int, ...]  # of each answer that has any, in order

    @classmethod
    def of(cls, backbone: Backbone, sequences: Sequence[TokenSequence]) -> Self:
        """Lay out the answers, which are the stretches of `loss_mask`, and compute and hold all hidden states.

        A sequence's first token is nobody's guess. Raises `DataError` where no answer has a second token.
        """
        lengths = tuple(map(len, sequences))
        starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
        places, owners, ends, counts = [], [], [], []
        for number, (sequence, start) in enumerate(zip(sequences, starts.tolist(), strict=True)):
            for begin, end in _stretches(sequence.loss_mask):
                if end - begin < 2:
                    continue
                here = torch.arange(start + begin - 1, start + end - 2)
                places.append(here)
                owners.append(torch.full_like(here, number))
                ends.append(torch.full_like(here, start + end))
                counts.append(len(here))
        if not counts:
            raise DataError("no answer to replay: give sequences with answers of at least two tokens")
        tokens = torch.cat([sequence.tokens for sequence in sequences]).long()
        batch = PackBatch(tokens, tokens.new_empty((0, len(tokens))), starts, torch.tensor(lengths))
        device = backbone.device
        return cls(
            tokens=tokens.to(device),
            hidden=hidden_states(backbone, batch),
            starts=starts.to(device),
            places=torch.cat(places).to(device),
            sequences=torch.cat(owners).to(device),
            ends=torch.cat(ends).to(device),
            lengths=lengths,
            num_places=tuple(counts),
        )

    def batches(self, size: int) -> list[slice]:
        """All places, `size` at a time."""
        total = len(self.places)
        return [slice(begin, min(begin + size, total)) for begin in range(0, total, size)]

    def of_each_sequence(self) -> list[tuple[int, slice]]:
        """(sequence, its places), sequences without a place left out: for drafters that keep something a sequence."""
        counts = torch.bincount(self.sequences, minlength=len(self.lengths)).tolist()
        ends = torch.tensor(counts).cumsum(0).tolist()
        return [(s, slice(end - n, end)) for s, (n, end) in enumerate(zip(counts, ends, strict=True)) if n]

    def context(self, rows: slice) -> DraftContext:
        """What a drafter knows at some of the places: the text up to the root."""
        places, owners = self.places[rows], self.sequences[rows]
        starts = self.starts[owners]
        known = places - starts + 2
        columns = torch.arange(max(self.lengths), device=places.device)
        history = self.tokens[(starts[:, None] + columns).clamp(max=len(self.tokens) - 1)]  # [B, longest]
        return DraftContext(
            root_tokens=self.tokens[places + 1],
            hidden=self.hidden[places],
            history=torch.where(columns < known[:, None], history, 0),
            history_lengths=known,
            seeds=torch.zeros_like(places),
            slots=owners,
        )

    def known_to(self, drafter: Drafter) -> Drafter:
        """The drafter, told of all sequences where it remembers any: each has a slot of its own. What lies behind a
        place is remembered too, and bounded by the history that a context gives."""
        if not isinstance(drafter, StatefulDrafter):
            return drafter
        drafter = drafter.for_slots(len(self.lengths), max(self.lengths))
        starts = self.starts.tolist()
        for slot, _ in self.of_each_sequence():
            start, length = starts[slot], self.lengths[slot]
            pairs = slice(start, start + length - 1)  # behind the last token nothing is known
            drafter.observe(
                Committed(
                    slots=torch.tensor([slot], device=self.tokens.device),
                    starts=torch.zeros_like(self.starts[:1]),
                    hidden=self.hidden[pairs][None],
                    next_tokens=self.tokens[start + 1 : start + length][None],
                    counts=torch.tensor([length - 1], device=self.tokens.device),
                )
            )
        return drafter

    def continuations(self, rows: slice, count: int) -> Tensor:
        """[B, count] the tokens behind the roots that a draft can be accepted for, -1 where there are none.

        The answer's last token is not one of them: the step that reaches it gives it as its last, drafted or not.
        """
        wanted = self.places[rows, None] + torch.arange(2, count + 2, device=self.places.device)
        inside = wanted < self.ends[rows, None] - 1
        return torch.where(inside, self.tokens[wanted.clamp(max=len(self.tokens) - 1)], _NO_TOKEN)


@torch.inference_mode()
def replay(
    drafter: Drafter,
    backbone: Backbone,
    sequences: Sequence[TokenSequence],
    *,
    max_nodes: int,
    batch_positions: int = 2048,
) -> Replayed:
    """The steps that the engine would take over the sequences' answers with trees of `max_nodes` rows, root included.

    Holds the hidden states of all sequences; drafts at `batch_positions` places together. Raises `DataError` where
    there is nothing to replay, `BadRequestError` for a number of nodes that no tree has.
    """
    answers = Answers.of(backbone, sequences)
    drafter = answers.known_to(drafter)
    return replay_answers(
        answers,
        lambda rows: drafter.propose(answers.context(rows), max_nodes - 1),
        batches=answers.batches(batch_positions),
        max_nodes=max_nodes,
    )


@torch.inference_mode()
def replay_answers(
    answers: Answers,
    propose: Callable[[slice], CandidateTree],
    *,
    batches: Iterable[slice],
    max_nodes: int,
    max_depth: int = _MAX_DEPTH,
) -> Replayed:
    """`replay` with the drafts of `propose`, which is called with each batch of places; all of them, in order.

    Of more candidates than `max_nodes - 1` the likeliest count, as in the engine.
    """
    if not 1 <= max_nodes <= MAX_NODES:
        raise BadRequestError(f"max_nodes must be between 1 and {MAX_NODES}: got {max_nodes}")
    accepted: list[int] = []
    for rows in batches:
        if max_nodes == 1:
            accepted += [0] * (rows.stop - rows.start)
            continue
        tree = merge_candidates([propose(rows)], max_nodes=max_nodes, max_depth=max_depth)
        continuations = answers.continuations(rows, min(max_depth, max_nodes - 1))
        accepted += count_accepted(tree, continuations).tolist()
    assert len(accepted) == len(answers.places), (len(accepted), len(answers.places))
    return _walk(accepted, answers.num_places)


def count_accepted(tree: CandidateTree | MergedCandidates, continuations: Tensor) -> Tensor:
    """How far each tree holds the tokens that follow its root: [B] int64.

    continuations: [B, E] int64, -1 where no draft can be accepted any more.
    """
    real = tree.log_probs > -torch.inf
    # Column 0 is the root; of equal siblings all are reached.
    reached = torch.zeros((real.shape[0], 1 + real.shape[1]), dtype=torch.bool, device=real.device)
    reached[:, 0] = True
    accepted = torch.zeros_like(continuations[:, 0])
    for token in continuations.unbind(dim=1):
        nodes = reached.gather(1, tree.parents + 1) & real & (tree.tokens == token[:, None])  # [B, M]
        accepted += nodes.any(dim=1)
        reached = torch.nn.functional.pad(nodes, (1, 0))
    return accepted


def _walk(accepted: Sequence[int], num_places: Sequence[int]) -> Replayed:
    """From every answer's first place on, each step behind the tokens of the one before."""
    counts = [0] * (1 + max(accepted))
    num_steps, end = 0, 0
    for count in num_places:
        place, end = end, end + count
        while place < end:
            counts[accepted[place]] += 1
            num_steps += 1
            place += accepted[place] + 1
        assert place == end, "a step went beyond its answer"
    return Replayed(num_steps=num_steps, num_tokens=sum(num_places), accepted_histogram=tuple(counts))


def _stretches(loss_mask: Tensor) -> list[tuple[int, int]]:
    """(begin, end) of every run of ones in a mask [T], the first position never in one."""
    said = loss_mask.bool().long()
    said[0] = 0
    steps = torch.nn.functional.pad(said, (1, 1)).diff()
    begins, ends = (steps == 1).nonzero().flatten(), (steps == -1).nonzero().flatten()
    return list(zip(begins.tolist(), ends.tolist(), strict=True))
