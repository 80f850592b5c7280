"""How many nodes a step should verify: expected tokens over measured step time (Sequoia, 2402.12374, section 4.2).

A step over r rows takes `seconds(r)` on this machine, measured at start-up. A tree whose nodes are accepted with
probabilities p_1 >= p_2 >= ... gives 1 + sum p_i tokens on average (OPT-Tree, 2406.17276). The best budget maximises
the ratio; one node a sequence, plain decoding, is always among the choices.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CostModel:
    """Step time by number of rows in the verification pass, linear between the measured points."""

    rows: tuple[int, ...]  # ascending
    seconds: tuple[float, ...]
    draft_seconds: float = 0.0  # what building and walking a tree adds to a plain step

    def __post_init__(self) -> None:
        assert len(self.rows) == len(self.seconds) >= 1
        assert list(self.rows) == sorted(set(self.rows))

    def step_seconds(self, num_rows: int) -> float:
        """Seconds of one verification pass over `num_rows` rows; extrapolates with the last slope."""
        if len(self.rows) == 1:
            return self.seconds[0]
        right = min(max(bisect_left(self.rows, num_rows), 1), len(self.rows) - 1)
        r0, r1 = self.rows[right - 1], self.rows[right]
        s0, s1 = self.seconds[right - 1], self.seconds[right]
        return max(s0 + (s1 - s0) * (num_rows - r0) / (r1 - r0), 1e-9)

    def choose_nodes(
        self, path_probs: Sequence[Sequence[float]], *, max_nodes: int, spent_seconds: float = 0.0
    ) -> list[int]:
        """Nodes for each sequence (root included), from its candidates' probabilities in descending order.

        Sequences share the pass, so the next row goes wherever it is likeliest to be accepted. spent_seconds: what the
        step costs beside the pass whatever is chosen, such as drafters that run in any case.
        """
        batch = len(path_probs)
        ranked = sorted(
            ((p, b) for b, probs in enumerate(path_probs) for p in probs[: max_nodes - 1] if p > 0.0),
            key=lambda item: -item[0],
        )
        tokens = float(batch)
        best_rate, best_count = tokens / (self.step_seconds(batch) + spent_seconds), 0
        for count, (probability, _) in enumerate(ranked, start=1):
            tokens += probability
            rate = tokens / (self.step_seconds(batch + count) + self.draft_seconds + spent_seconds)
            if rate > best_rate:
                best_rate, best_count = rate, count
        nodes = [1] * batch
        for _, b in ranked[:best_count]:
            nodes[b] += 1
        return nodes
