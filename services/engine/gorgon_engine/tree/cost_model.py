"""How many nodes a step should verify: expected tokens over measured step time (Sequoia, 2402.12374, section 4.2).

A step over r rows of b sequences takes `step_seconds(r, b)` on this machine, measured at start-up. A tree whose nodes
are accepted with probabilities p_1 >= p_2 >= ... gives 1 + sum p_i tokens on average (OPT-Tree, 2406.17276). The best
budget maximises the ratio over all sequences of the step, which share its rows; one node a sequence, plain decoding, is
always among the choices.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

_LEAST_SECONDS = 1e-9


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds measured at some counts, linear in between; beyond the last with its slope."""

    counts: tuple[int, ...]  # ascending
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.counts) == len(self.seconds) >= 1
        assert list(self.counts) == sorted(set(self.counts))

    def at(self, count: int) -> float:
        if len(self.counts) == 1:
            return self.seconds[0]
        right = min(max(bisect_left(self.counts, count), 1), len(self.counts) - 1)
        c0, c1 = self.counts[right - 1], self.counts[right]
        s0, s1 = self.seconds[right - 1], self.seconds[right]
        return max(s0 + (s1 - s0) * (count - c0) / (c1 - c0), _LEAST_SECONDS)

    def longest_within(self, seconds: float, *, least: int, most: int) -> int:
        """The largest count from `least` to `most` that takes at most `seconds`; `least` where none does."""
        low, high = least, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.at(middle) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low


@dataclass(frozen=True, slots=True)
class Price:
    """Accepted tokens that speculation must bring to be worth its time."""

    row: float = 0.0  # of each node,
    tree: float = 0.0  # and of all trees of a step together besides


FREE = Price()


@dataclass(frozen=True, slots=True)
class Effort:
    """What may be spent on looking for a next tree."""

    costly: bool = True  # drafters that run a network are asked,
    cheap: bool = True  # and those that look guesses up, which are also where the costly ones are
    price: Price = FREE  # what promises less is not put together

    @property
    def is_none(self) -> bool:
        return not (self.costly or self.cheap)


FULL = Effort()


@dataclass(frozen=True, slots=True)
class CostModel:
    """Step time by number of rows and of sequences."""

    rows: tuple[int, ...]  # ascending
    seconds: tuple[float, ...]  # of a step of one sequence over so many rows
    draft_seconds: float = 0.0  # what building and walking a tree adds to a plain step,
    draft_seconds_each: float = 0.0  # and each further sequence's
    plain: Curve | None = None  # plain steps by number of sequences; None: as so many rows of one

    @property
    def _passes(self) -> Curve:
        return Curve(self.rows, self.seconds)

    def step_seconds(self, num_rows: int, num_sequences: int = 1) -> float:
        """Seconds of one step over `num_rows` rows of `num_sequences` sequences together."""
        return self._pricing(num_sequences).at(num_rows)

    def plain_seconds(self, num_sequences: int) -> float:
        """Seconds of a step of plain decoding."""
        return self.step_seconds(num_sequences, num_sequences)

    def tree_seconds(self, num_sequences: int) -> float:
        """What trees for so many sequences cost beside the pass over them."""
        return self.draft_seconds + (num_sequences - 1) * self.draft_seconds_each

    def price(self, num_sequences: int, *, spent_seconds: float = 0.0, least_gain: float = 1.0) -> "Price":
        """What trees for so many sequences must promise to be chosen at all, by the cheapest that rows ever are; the
        arguments are those of `choose_nodes`."""
        pricing, plain = self._pricing(num_sequences), self.plain_seconds(num_sequences)
        rate = least_gain * num_sequences / (plain + spent_seconds)
        # Linear between what was measured: the mean is least at one of those, or further on, where it nears the slope.
        beyond = max(self.rows[-1], num_sequences)
        knots = [count for count in self.rows if count > num_sequences]
        row_seconds = min(
            [pricing.at(beyond + 1) - pricing.at(beyond)]
            + [(pricing.at(count) - pricing.at(num_sequences)) / (count - num_sequences) for count in knots]
        )
        tree = rate * (plain + spent_seconds + self.tree_seconds(num_sequences)) - num_sequences
        return Price(row=rate * row_seconds, tree=tree)

    def choose_nodes(
        self,
        path_probs: Sequence[Sequence[float]],
        *,
        max_nodes: int,
        spent_seconds: float = 0.0,
        least_gain: float = 1.0,
    ) -> list[int]:
        """Nodes for each sequence (root included), from its candidates' probabilities in descending order.

        Sequences share the pass, so the next row goes wherever it is likeliest to be accepted. spent_seconds: what the
        step costs beside the pass whatever is chosen, such as drafters that run in any case. least_gain: how many
        times the rate of plain decoding trees must promise.
        """
        batch = len(path_probs)
        ranked = sorted(
            ((p, b) for b, probs in enumerate(path_probs) for p in probs[: max_nodes - 1] if p > 0.0),
            key=lambda item: -item[0],
        )
        pricing = self._pricing(batch)
        tokens, tree_seconds = float(batch), self.tree_seconds(batch) + spent_seconds
        best_rate, best_count = least_gain * tokens / (pricing.at(batch) + spent_seconds), 0
        for count, (probability, _) in enumerate(ranked, start=1):
            tokens += probability
            rate = tokens / (pricing.at(batch + count) + tree_seconds)
            if rate > best_rate:
                best_rate, best_count = rate, count
        nodes = [1] * batch
        for _, b in ranked[:best_count]:
            nodes[b] += 1
        return nodes

    def choose_width(
        self,
        path_probs: Sequence[Sequence[float]],
        *,
        widths: Sequence[int],
        num_padded: int,
        spent_seconds: float = 0.0,
        least_gain: float = 1.0,
    ) -> int:
        """As `choose_nodes` where all sequences verify trees of one width (root included), of which there are few.

        widths: ascending, the first is plain decoding. num_padded: sequences that such a step runs, the padding
        counted.
        """
        batch = len(path_probs)
        pricing, tree_seconds = self._pricing(num_padded), self.tree_seconds(num_padded) + spent_seconds
        best_rate, best_width = least_gain * batch / (pricing.at(num_padded) + spent_seconds), widths[0]
        for width in widths[1:]:
            tokens = batch + sum(sum(probs[: width - 1]) for probs in path_probs)
            rate = tokens / (pricing.at(num_padded * width) + tree_seconds)
            if rate > best_rate:
                best_rate, best_width = rate, width
        return best_width

    def _pricing(self, num_sequences: int) -> "_Pricing":
        passes = self._passes
        base = passes.at(num_sequences)
        return _Pricing(passes, base, base if self.plain is None else self.plain.at(num_sequences))


@dataclass(frozen=True, slots=True)
class _Pricing:
    """The steps of a number of sequences: a plain one, and what more rows add to it."""

    passes: Curve
    pass_seconds: float  # over one row a sequence
    plain_seconds: float

    def at(self, num_rows: int) -> float:
        return self.plain_seconds + max(self.passes.at(num_rows) - self.pass_seconds, 0.0)
