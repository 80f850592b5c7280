"""The budget of a step: how many nodes each sequence verifies, and whether costly drafters are worth their time."""

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
class CostlyDrafting:
    """Whether drafters that run a network pay for themselves on what is being generated.

    They run in trials of some steps. A trial that brought fewer tokens a second than plain decoding would have is
    followed by a pause, twice as long each time in a row, so that text which they cannot guess costs next to nothing.
    """

    seconds: float  # of one draft, as calibrated; then as observed
    trial_steps: int = 24
    first_pause: int = 48
    longest_pause: int = 768
    _steps_left: int = field(default=0)
    _paused: bool = field(default=True)
    _pause: int = field(default=0)
    _tokens: float = field(default=0.0)
    _spent: float = field(default=0.0)  # seconds of the trial, by the cost model
    _plain: float = field(default=0.0)  # tokens that plain decoding would have given in that time

    @property
    def wanted(self) -> bool:
        """Whether they should run in the step at hand."""
        return not self._paused or self._steps_left == 0

    def observe(self, *, ran: bool, num_tokens: int, seconds: float, plain_rate: float, draft_seconds: float) -> None:
        """Count one step. seconds: of the step without its draft; plain_rate: tokens a second without speculation;
        draft_seconds: as measured, 0 where measuring would mean waiting for the device."""
        if not ran:
            self._steps_left = max(self._steps_left - 1, 0)
            return
        if self._paused:  # the pause is over
            self._paused, self._steps_left = False, self.trial_steps
            self._tokens = self._plain = 0.0
        if draft_seconds > 0.0:
            self.seconds += _LEARNING_RATE * (draft_seconds - self.seconds)
        self._tokens += num_tokens
        self._plain += plain_rate * (seconds + self.seconds)
        self._steps_left -= 1
        if self._steps_left > 0:
            return
        if self._tokens < self._plain:
            self._pause = min(max(2 * self._pause, self.first_pause), self.longest_pause)
            self._paused, self._steps_left = True, self._pause
        else:
            self._pause = 0
            self._steps_left = self.trial_steps
        self._tokens = self._plain = 0.0


@dataclass(slots=True)
class TreeBudget:
    """Chooses tree sizes by the cost model, or always the largest (`cost_model` None: for measurements and proofs).

    The drafters' probabilities are estimates made for other texts and temperatures; `_trust` is what they turned out
    to be worth: accepted over promised, as a running ratio.
    """

    max_nodes: int
    cost_model: CostModel | None
    costly: CostlyDrafting | None = None  # None: no drafter is, or they always run
    _accepted: float = field(default=1.0)
    _promised: float = field(default=1.0)
    _last_promise: float = field(default=0.0)

    @property
    def trust(self) -> float:
        low, high = _TRUST_LIMITS
        return min(max(self._accepted / self._promised, low), high)

    @property
    def wants_costly(self) -> bool:
        """Whether the draft that closes the next step should run the costly drafters too."""
        return self.costly is None or self.costly.wanted

    def choose(self, sequences: Seq[Sequence]) -> list[int]:
        """Rows for each sequence in the next verification pass, root included."""
        limits = [self._limit(sequence) for sequence in sequences]
        drafted = [sequence.path_probs[: limit - 1] for sequence, limit in zip(sequences, limits, strict=True)]
        if self.cost_model is None:
            nodes = [1 + sum(p > 0.0 for p in probs) for probs in drafted]
        else:
            trust = self.trust
            worth = [[min(p * trust, 1.0) for p in probs] for probs in drafted]
            spent = self.costly.seconds if self.costly is not None and self.costly.wanted else 0.0
            nodes = self.cost_model.choose_nodes(worth, max_nodes=self.max_nodes, spent_seconds=spent)
        self._last_promise = sum(sum(probs[: n - 1]) for probs, n in zip(drafted, nodes, strict=True))
        return nodes

    def observe(self, sequences: Seq[Sequence], result: StepResult) -> None:
        """Learn from a step how far the drafters' probabilities can be trusted, and what they are worth."""
        if self._last_promise > 0.0:
            accepted = sum(len(tokens) - 1 for tokens in result.tokens)
            self._accepted += _LEARNING_RATE * (accepted - self._accepted)
            self._promised += _LEARNING_RATE * (self._last_promise - self._promised)
        elif any(sequence.path_probs for sequence in sequences):
            self._accepted += _FADING_RATE * (self._promised - self._accepted)
        if self.costly is not None and self.cost_model is not None and result.drafted:
            batch = len(sequences)
            plain_seconds = self.cost_model.step_seconds(batch)
            rows = batch + sum(result.num_drafted)
            self.costly.observe(
                ran=result.drafted_costly,
                num_tokens=sum(map(len, result.tokens)),
                seconds=self.cost_model.step_seconds(rows),
                plain_rate=batch / plain_seconds,
                draft_seconds=result.seconds.draft,
            )

    def _limit(self, sequence: Sequence) -> int:
        speculation = sequence.request.speculation
        if not speculation.enabled:
            return 1
        return min(self.max_nodes, speculation.max_nodes or self.max_nodes)
