"""The budget of a step: how many nodes each sequence verifies, whether costly drafters are worth their time, and how
much of a prompt may run beside the streams."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

from gorgon_engine.buckets import Buckets
from gorgon_engine.outcome import StepResult
from gorgon_engine.sequence import Sequence
from gorgon_engine.tree.cost_model import CostModel, Curve, Effort, Price

# Weight of one step in the running comparison of promised and real acceptance, and how fast a verdict fades while the
# engine decodes plainly and learns nothing new.
_LEARNING_RATE = 0.05
_FADING_RATE = 0.01
_TRUST_LIMITS = (0.05, 2.0)

# Positions of a prompt that run beside streams: at least, and where nothing was measured.
_LEAST_PREFILL_ROWS = 16
_UNMEASURED_PREFILL_ROWS = 64

_LEAST_TRIAL_STEPS = 4

# How long the time of a plain step is believed: contexts grow.
_PACE_STEPS = 256

# What speculation must promise, and bring, to be preferred: less than the promises are wrong by is no gain.
_LEAST_GAIN = 1.04


@dataclass(slots=True)
class _Trial:
    """How drafting does at one size of batch."""

    steps_left: int = 0  # of the trial, or of the pause
    paused: bool = True
    pause: int = 0  # length of the last one
    tokens: float = 0.0
    plain: float = 0.0  # tokens that plain decoding would have given in that time


@dataclass(slots=True)
class Trials:
    """Whether a way of drafting pays for itself on what is being generated.

    It runs in trials of some steps. A trial that brought fewer tokens a second than plain decoding would have is
    followed by a pause, twice as long each time in a row, so that text which cannot be guessed costs next to nothing.
    What pays for one stream may not pay for sixteen: batches of 1, 2-3, 4-7, ... sequences are judged apart, and the
    more there are, the fewer steps tell.
    """

    trial_steps: int  # of one sequence
    first_pause: int
    longest_pause: int
    least_gain: float = _LEAST_GAIN
    _ran: bool = field(default=False)  # in the step before: what this step verifies is its
    _trials: dict[int, _Trial] = field(default_factory=dict)  # by the bits of the number of sequences

    def wanted(self, batch: int) -> bool:
        """Whether it should run at the end of a step of so many sequences."""
        trial = self._trial(batch)
        return not trial.paused or trial.steps_left == 0

    def observe(self, *, batch: int, ran: bool, num_tokens: int, seconds: float, plain_rate: float) -> None:
        """Count one step. ran: at its end. seconds: of the step, with one such draft; plain_rate: tokens a second
        without speculation."""
        trial, verified = self._trial(batch), self._ran
        self._ran = ran
        if not ran:
            if trial.paused:
                trial.steps_left = max(trial.steps_left - 1, 0)
            return
        if trial.paused:  # the pause is over
            trial.paused = False
            self._begin(trial, batch)
        if not verified:
            return
        trial.tokens += num_tokens
        trial.plain += plain_rate * seconds
        trial.steps_left -= 1
        if trial.steps_left > 0:
            return
        if trial.tokens < self.least_gain * trial.plain:
            trial.pause = min(max(2 * trial.pause, self.first_pause), self.longest_pause)
            trial.paused, trial.steps_left = True, trial.pause
        else:
            trial.pause //= 2  # luck is no reason to forget what all the trials before have shown
            self._begin(trial, batch)

    def _begin(self, trial: _Trial, batch: int) -> None:
        trial.steps_left = max(-(-self.trial_steps // batch), min(_LEAST_TRIAL_STEPS, self.trial_steps))
        trial.tokens = trial.plain = 0.0

    def _trial(self, batch: int) -> _Trial:
        return self._trials.setdefault(batch.bit_length(), _Trial())


@dataclass(slots=True)
class CostlyDrafting:
    """Drafters that run a network: what they cost, and whether they pay."""

    seconds: float  # of one sequence's draft, as calibrated
    seconds_each: float = 0.0  # what each further sequence adds
    trials: Trials = field(default_factory=lambda: Trials(trial_steps=24, first_pause=48, longest_pause=768))
    _scale: float = field(default=1.0)  # observed over calibrated seconds

    def draft_seconds(self, batch: int) -> float:
        """What they cost at the end of a step."""
        return self._scale * (self.seconds + (batch - 1) * self.seconds_each)

    def observe(
        self, *, batch: int, ran: bool, num_tokens: int, seconds: float, plain_rate: float, draft_seconds: float
    ) -> None:
        """As `Trials.observe`, with the seconds of the step without drafts. draft_seconds: as measured, 0 where
        measuring would mean waiting for the device."""
        if ran and draft_seconds > 0.0:
            observed = draft_seconds / max(self.seconds + (batch - 1) * self.seconds_each, 1e-9)
            self._scale += _LEARNING_RATE * (observed - self._scale)
        seconds += self.draft_seconds(batch)
        self.trials.observe(batch=batch, ran=ran, num_tokens=num_tokens, seconds=seconds, plain_rate=plain_rate)


@dataclass(slots=True)
class _PlainPace:
    """What plain steps take now: start-up knew nothing of temperatures, contexts and other work on the machine."""

    _seconds: dict[int, float] = field(default_factory=dict)  # by number of sequences
    _ages: dict[int, int] = field(default_factory=dict)  # steps since the last plain one

    def observe(self, batch: int, seconds: float, *, is_plain: bool) -> None:
        self._ages[batch] = 0 if is_plain else self._ages.get(batch, 0) + 1
        if is_plain:
            known = self._seconds.setdefault(batch, seconds)
            self._seconds[batch] += _LEARNING_RATE * (min(seconds, 2.0 * known) - known)  # a hiccup tells nothing

    def seconds(self, batch: int) -> float | None:
        """None where none was seen lately."""
        return self._seconds.get(batch) if self._ages.get(batch, _PACE_STEPS) < _PACE_STEPS else None


@dataclass(slots=True)
class TreeBudget:
    """Chooses tree sizes by the cost model, or always the largest (`cost_model` None: for measurements and proofs).

    The drafters' probabilities are estimates made for other texts and temperatures; `_trust` is what they turned out
    to be worth: accepted over promised, as a running ratio.
    """

    max_nodes: int
    cost_model: CostModel | None
    costly: CostlyDrafting | None = None  # None: no drafter is, or they always run
    prefill: Curve | None = None  # seconds of a pass by positions of prompts
    max_stall_steps: float = 2.0  # plain steps that such a pass may take while others decode
    # Looking guesses up costs a few percent of a plain step: nothing where it pays, too much where it never does.
    _cheap: Trials = field(default_factory=lambda: Trials(192, first_pause=96, longest_pause=768, least_gain=1.0))
    _pace: _PlainPace = field(default_factory=_PlainPace)
    _accepted: float = field(default=1.0)
    _promised: float = field(default=1.0)

    @property
    def trust(self) -> float:
        low, high = _TRUST_LIMITS
        return min(max(self._accepted / self._promised, low), high)

    def start_over(self, costly: CostlyDrafting | None) -> None:
        """Other drafters: what was learnt of the last ones says nothing of them."""
        self.costly = costly
        self._cheap = replace(self._cheap, _ran=False, _trials={})
        self._accepted = self._promised = 1.0

    def effort(self, batch: int) -> Effort:
        """What the draft that closes a step of so many sequences may cost. Its price is in the drafters' own
        probabilities."""
        costly = self.costly is None or self.costly.trials.wanted(batch)
        if self.cost_model is None:
            return Effort(costly=costly)
        cheap = self._cheap.wanted(batch)
        if not (costly or cheap):
            return Effort(costly=False, cheap=False)
        price = self.cost_model.price(batch, spent_seconds=self._spent_seconds(batch), least_gain=_LEAST_GAIN)
        return Effort(costly=costly, cheap=cheap, price=Price(row=price.row / self.trust, tree=price.tree / self.trust))

    def plain_tokens_per_second(self, batch: int) -> float | None:
        """Of each of so many sequences, decoded plainly; None where nothing was measured."""
        return None if self.cost_model is None else 1.0 / self.cost_model.plain_seconds(batch)

    def prefill_rows(self, num_decoding: int) -> int:
        """Positions of prompts that may run in a pass of their own between two steps of so many sequences."""
        if self.prefill is None or self.cost_model is None:
            return _UNMEASURED_PREFILL_ROWS
        seconds = self.max_stall_steps * self.cost_model.plain_seconds(num_decoding)
        return self.prefill.longest_within(seconds, least=_LEAST_PREFILL_ROWS, most=65536)

    def choose(self, sequences: Seq[Sequence], buckets: Buckets | None = None) -> list[int]:
        """Rows for each sequence in the next verification pass, root included.

        buckets: where a pass is as wide for all sequences and rounded up: each may then verify as much as fits, its
        candidates the likeliest that it will have by then, not only those that are known now.
        """
        limits = [self._limit(sequence) for sequence in sequences]
        drafted = [sequence.path_probs[: limit - 1] for sequence, limit in zip(sequences, limits, strict=True)]
        model, batch = self.cost_model, len(sequences)
        if model is None:
            nodes = [1 + len(probs) for probs in drafted]
            width = max(nodes)
        else:
            trust = self.trust
            worth = [[min(p * trust, 1.0) for p in probs] for probs in drafted]
            spent = self._spent_seconds(batch)
            if buckets is None:
                return model.choose_nodes(worth, max_nodes=self.max_nodes, spent_seconds=spent, least_gain=_LEAST_GAIN)
            width = model.choose_width(
                worth,
                widths=buckets.widths,
                num_padded=buckets.batch(batch),
                spent_seconds=spent,
                least_gain=_LEAST_GAIN,
            )
        return nodes if buckets is None else [min(limit, buckets.width(width)) for limit in limits]

    def observe(self, sequences: Seq[Sequence], result: StepResult) -> None:
        """Learn from a step how far the drafters' probabilities can be trusted, and what they are worth.

        sequences: with the probabilities of what this step verified.
        """
        promise = sum(sum(s.path_probs[:n]) for s, n in zip(sequences, result.num_drafted, strict=True))
        if promise > 0.0:
            accepted = sum(len(tokens) - 1 for tokens in result.tokens)
            self._accepted += _LEARNING_RATE * (accepted - self._accepted)
            self._promised += _LEARNING_RATE * (promise - self._promised)
        elif result.drafted:
            self._accepted += _FADING_RATE * (self._promised - self._accepted)
        if self.cost_model is not None:
            self._judge(self.cost_model, result, drafting=any(s.request.speculation.may_draft for s in sequences))

    def _spent_seconds(self, batch: int) -> float:
        """What a step of so many sequences costs beside its pass whatever is verified."""
        return 0.0 if self.costly is None or not self.costly.trials.wanted(batch) else self.costly.draft_seconds(batch)

    def _judge(self, model: CostModel, result: StepResult, *, drafting: bool) -> None:
        """In seconds as at start-up: a machine that is slower now is so for drafts, trees and plain steps alike."""
        batch, measured, num_drafted = len(result.tokens), result.seconds, sum(result.num_drafted)
        plain, seconds = model.plain_seconds(batch), model.step_seconds(batch + num_drafted, batch)
        trees, costly = model.tree_seconds(batch) if num_drafted else 0.0, 0.0
        passed = measured.verify + measured.accept + measured.commit
        self._pace.observe(batch, passed, is_plain=num_drafted == 0)
        pace = self._pace.seconds(batch)
        if passed > 0.0:  # else on a GPU, where nothing is measured
            # What was measured of plain steps is nearer to the truth than the model.
            scale = seconds / passed if pace is None else plain / pace
            seconds = passed * scale
            trees = min(measured.draft * scale, model.tree_seconds(batch))
            costly = measured.draft * scale - trees
        if not drafting:
            return
        num_tokens, rate = sum(map(len, result.tokens)), batch / plain
        if self.costly is not None:
            self.costly.observe(
                batch=batch,
                ran=result.drafted_costly,
                num_tokens=num_tokens,
                seconds=seconds + trees,
                plain_rate=rate,
                draft_seconds=costly,
            )
        # A step that verifies what the costly ones guessed says nothing of the others.
        self._cheap.observe(
            batch=batch,
            ran=result.drafted and not result.drafted_costly,
            num_tokens=num_tokens,
            seconds=seconds + trees + costly,
            plain_rate=rate,
        )

    def _limit(self, sequence: Sequence) -> int:
        speculation = sequence.request.speculation
        if not speculation.enabled:
            return 1
        return min(self.max_nodes, speculation.max_nodes or self.max_nodes)
