"""The tree budget of a step: how many nodes each sequence verifies."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from gorgon_engine.sequence import Sequence
from gorgon_engine.step import StepResult
from gorgon_engine.tree.cost_model import CostModel

# Weight of one step in the running comparison of promised and real acceptance, and how fast a verdict fades while the
# engine decodes plainly and learns nothing new.
_LEARNING_RATE = 0.05
_FADING_RATE = 0.01
_TRUST_LIMITS = (0.05, 2.0)


@dataclass(slots=True)
class TreeBudget:
    """Chooses tree sizes by the cost model, or always the largest (`cost_model` None: for measurements and proofs).

    The drafters' probabilities are estimates made for other texts and temperatures; `_trust` is what they turned out
    to be worth: accepted over promised, as a running ratio.
    """

    max_nodes: int
    cost_model: CostModel | None
    _accepted: float = field(default=1.0)
    _promised: float = field(default=1.0)
    _last_promise: float = field(default=0.0)

    @property
    def trust(self) -> float:
        low, high = _TRUST_LIMITS
        return min(max(self._accepted / self._promised, low), high)

    def choose(self, sequences: Seq[Sequence]) -> list[int]:
        """Rows for each sequence in the next verification pass, root included."""
        limits = [self._limit(sequence) for sequence in sequences]
        drafted = [sequence.path_probs[: limit - 1] for sequence, limit in zip(sequences, limits, strict=True)]
        if self.cost_model is None:
            nodes = [1 + sum(p > 0.0 for p in probs) for probs in drafted]
        else:
            trust = self.trust
            worth = [[min(p * trust, 1.0) for p in probs] for probs in drafted]
            nodes = self.cost_model.choose_nodes(worth, max_nodes=self.max_nodes)
        self._last_promise = sum(sum(probs[: n - 1]) for probs, n in zip(drafted, nodes, strict=True))
        return nodes

    def observe(self, sequences: Seq[Sequence], result: StepResult) -> None:
        """Learn from a step how far the drafters' probabilities can be trusted."""
        if self._last_promise > 0.0:
            accepted = sum(len(tokens) - 1 for tokens in result.tokens)
            self._accepted += _LEARNING_RATE * (accepted - self._accepted)
            self._promised += _LEARNING_RATE * (self._last_promise - self._promised)
        elif any(sequence.path_probs for sequence in sequences):
            self._accepted += _FADING_RATE * (self._promised - self._accepted)

    def _limit(self, sequence: Sequence) -> int:
        speculation = sequence.request.speculation
        if not speculation.enabled:
            return 1
        return min(self.max_nodes, speculation.max_nodes or self.max_nodes)
