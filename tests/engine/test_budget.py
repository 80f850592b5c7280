"""Costly drafters run while they pay, and hardly at all while they do not; trees are as large as pays for all."""

import pytest

from gorgon_engine.batch import RunningBatch
from gorgon_engine.buckets import Buckets
from gorgon_engine.budget import CostlyDrafting, TreeBudget
from gorgon_engine.detokenizer import IncrementalDetokenizer
from gorgon_engine.outcome import StepResult, StepSeconds
from gorgon_engine.sequence import Request, Sequence, SpeculationParams
from gorgon_engine.tree.cost_model import FREE, FULL, CostModel, Curve

PASS = 2.0  # seconds of a verification pass
PLAIN_RATE = 1.0  # tokens a second without speculation


def run(drafting: CostlyDrafting, steps: int, tokens_when_drafted: int, *, batch: int = 1) -> int:
    """Steps in which the drafters ran. The step behind each verifies what they guessed: it takes PASS seconds and
    gives each sequence so many tokens; another takes a second a token."""
    ran = 0
    for _ in range(steps):
        wanted, verifies = drafting.trials.wanted(batch), drafting.trials._ran
        ran += wanted
        drafting.observe(
            batch=batch,
            ran=wanted,
            num_tokens=batch * (tokens_when_drafted if verifies else 1),
            seconds=PASS if verifies else 1.0,
            plain_rate=batch * PLAIN_RATE,
            draft_seconds=0.0,
        )
    return ran


def test_what_pays_always_runs() -> None:
    assert run(CostlyDrafting(seconds=0.5), 1000, tokens_when_drafted=3) == 1000


def test_what_does_not_pay_is_tried_less_and_less() -> None:
    drafting = CostlyDrafting(seconds=0.5)
    assert run(drafting, 25, tokens_when_drafted=2) == 25, "a trial is always made, of what 24 steps verify"
    assert not drafting.trials.wanted(1)
    assert run(drafting, 48, tokens_when_drafted=2) == 0
    assert run(drafting, 25, tokens_when_drafted=2) == 25
    assert run(drafting, 96, tokens_when_drafted=2) == 0, "the second pause is twice as long"
    late = run(drafting, 20_000, tokens_when_drafted=2)
    assert 24 * 20 < late < 20_000 * 0.05, "never given up, and in the end a few percent of the steps"


def test_text_that_becomes_easy_is_noticed() -> None:
    drafting = CostlyDrafting(seconds=0.5)
    run(drafting, 5_000, tokens_when_drafted=1)
    assert run(drafting, 3_000, tokens_when_drafted=4) > 2_000
    assert run(drafting, 200, tokens_when_drafted=4) == 200


def test_the_draft_itself_is_what_may_not_pay() -> None:
    """Three tokens for a pass of two seconds: worth a draft of 0.3 seconds, not one of 1.2."""
    assert run(CostlyDrafting(seconds=0.3), 500, tokens_when_drafted=3) == 500
    drafting = CostlyDrafting(seconds=1.2)
    assert run(drafting, 500, tokens_when_drafted=3) < 200


def test_what_pays_for_one_may_not_pay_for_many() -> None:
    drafting = CostlyDrafting(seconds=0.3, seconds_each=1.0)
    assert run(drafting, 500, tokens_when_drafted=3) == 500
    assert run(drafting, 500, tokens_when_drafted=3, batch=8) < 100
    assert run(drafting, 500, tokens_when_drafted=3) == 500, "judged apart"


def test_measured_drafts_correct_the_calibrated_figure() -> None:
    drafting = CostlyDrafting(seconds=0.1, seconds_each=0.05)
    for _ in range(300):
        drafting.observe(batch=1, ran=True, num_tokens=9, seconds=PASS, plain_rate=PLAIN_RATE, draft_seconds=0.4)
    assert drafting.draft_seconds(1) == pytest.approx(0.4, rel=1e-3)
    assert drafting.draft_seconds(3) == pytest.approx(0.8, rel=1e-3), "of larger batches too"


def sequences(path_probs: list[list[float]], speculation: SpeculationParams | None = None) -> list[Sequence]:
    request = Request("one", (1,), speculation=speculation or SpeculationParams())
    made = [Sequence(request, IncrementalDetokenizer.__new__(IncrementalDetokenizer)) for _ in path_probs]
    for sequence, probs in zip(made, path_probs, strict=True):
        sequence.path_probs = probs
    return made


class TestTreeBudget:
    """A machine on which rows are free up to 8, and then cost as much as a sequence of their own."""

    model = CostModel(rows=(1, 8, 64), seconds=(1.0, 1.0, 8.0), plain=Curve((1, 8, 16), (1.0, 1.0, 2.0)))

    def test_everything_is_verified_where_nothing_was_measured(self) -> None:
        budget = TreeBudget(max_nodes=4, cost_model=None)
        assert budget.choose(sequences([[0.9, 0.1, 0.01, 0.001], [0.2], []])) == [4, 2, 1]
        assert budget.plain_tokens_per_second(1) is None
        assert budget.prefill_rows(3) == 64
        assert budget.effort(7) == FULL

    def test_trees_shrink_to_plain_decoding_as_streams_come(self) -> None:
        budget = TreeBudget(max_nodes=32, cost_model=self.model)
        guesses = [0.5, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1]
        nodes = [sum(budget.choose(sequences([guesses] * count))) / count for count in (1, 2, 4, 8, 16)]
        assert nodes == [8, 4, 2, 1, 1]

    def test_requests_have_limits_of_their_own(self) -> None:
        budget = TreeBudget(max_nodes=32, cost_model=self.model)
        assert budget.choose(sequences([[0.9, 0.8, 0.7]], SpeculationParams(max_nodes=2))) == [2]
        assert budget.choose(sequences([[0.9, 0.8, 0.7]], SpeculationParams(enabled=False))) == [1]

    def test_where_passes_are_rounded_up_all_that_fits_is_verified(self) -> None:
        """Rows are free up to 8: two sequences get 4 each, whether their guesses are known or still to come."""
        buckets = Buckets(batches=(1, 2, 4), widths=(1, 2, 4, 8, 32), lengths=(512,))
        budget = TreeBudget(max_nodes=32, cost_model=self.model)
        guesses = [0.5, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1]
        assert budget.choose(sequences([guesses]), buckets) == [8]
        assert budget.choose(sequences([guesses, []]), buckets) == [4, 4]
        assert budget.choose(sequences([guesses[:2]] * 3), buckets) == [2, 2, 2], "a step of three runs four"
        assert budget.choose(sequences([[0.001]]), buckets) == [1]
        assert budget.choose(sequences([guesses], SpeculationParams(max_nodes=3)), buckets) == [3]
        whole = TreeBudget(max_nodes=32, cost_model=None)
        assert whole.choose(sequences([guesses[:5], []]), buckets) == [8, 8]
        assert whole.choose(sequences([[], []]), buckets) == [1, 1]

    def test_prompts_run_for_as_long_as_some_plain_steps(self) -> None:
        prefill = Curve((10, 110), (0.5, 5.5))
        budget = TreeBudget(32, self.model, prefill=prefill, max_stall_steps=2.0)
        assert budget.prefill_rows(1) == 40
        assert budget.prefill_rows(16) == 80
        assert TreeBudget(32, self.model, prefill=prefill, max_stall_steps=0.0).prefill_rows(1) == 16, "it gets on"

    def test_other_drafters_start_over(self) -> None:
        budget = TreeBudget(32, self.model, CostlyDrafting(0.1))
        for _ in range(40):
            budget.choose(sequences([[0.9]]))
            budget.observe(sequences([[0.9]]), result(tokens=[[1]], num_drafted=[1]))
        assert budget.trust < 0.5
        other = CostlyDrafting(0.2)
        budget.start_over(other)
        assert (budget.trust, budget.costly) == (1.0, other)

    def test_a_bad_verdict_fades_where_nothing_is_put_together_any_more(self) -> None:
        budget = TreeBudget(32, self.model)
        for _ in range(60):
            budget.choose(sequences([[0.9]]))
            budget.observe(sequences([[0.9]]), result(tokens=[[1]], num_drafted=[1]))
        dear = budget.effort(2).price
        for _ in range(300):
            budget.choose(sequences([[]]))
            budget.observe(sequences([[]]), result(tokens=[[1]], num_drafted=[0]))
        assert budget.effort(2).price.tree < dear.tree / 2

    def test_looking_up_rests_where_it_never_helps(self) -> None:
        """A lookup costs a twentieth of a step and finds nothing."""
        budget = TreeBudget(32, self.model)
        looked = 0
        for _ in range(2000):
            wanted = budget.effort(8).cheap
            looked += wanted
            seconds = StepSeconds(draft=0.05 if wanted else 0.0, verify=0.9, accept=0.1)
            ended = result(tokens=[[1]] * 8, num_drafted=[0] * 8, seconds=seconds, drafted=wanted, costly=False)
            budget.observe(sequences([[]] * 8), ended)
        assert 24 <= looked < 200
        assert TreeBudget(max_nodes=4, cost_model=None).effort(8).cheap, "always, where nothing was measured"

    def test_looking_up_goes_on_where_it_helps(self) -> None:
        budget = TreeBudget(32, self.model)
        for _ in range(500):
            assert budget.effort(2).cheap
            seconds = StepSeconds(draft=0.05, verify=0.9, accept=0.1)
            budget.observe(sequences([[0.9]] * 2), result([[1, 2], [1]], [1, 1], seconds, costly=False))

    def test_what_plain_steps_take_now_is_what_trees_are_measured_by(self) -> None:
        """By the model a tree step takes as long as a plain one; it takes twice as long: 1.5 tokens do not pay."""
        costly = CostlyDrafting(seconds=0.0)
        budget = TreeBudget(32, self.model, costly)
        plain, tree = StepSeconds(verify=3.0), StepSeconds(verify=6.0)
        verifies, ran = False, 0
        for step in range(1000):
            wanted = step >= 20 and budget.effort(2).costly
            ran += wanted
            tokens, nodes = ([[1, 2], [1]], [3, 3]) if verifies else ([[1], [1]], [0, 0])
            ended = result(tokens, nodes, tree if verifies else plain, drafted=wanted, costly=wanted)
            budget.observe(sequences([[0.5]] * 2), ended)
            verifies = wanted
        assert ran < 100

    def test_where_nothing_was_measured_guesses_cost_nothing(self) -> None:
        assert TreeBudget(max_nodes=4, cost_model=None).effort(3).price == FREE

    def test_a_machine_that_is_slower_now_is_so_for_drafts_and_passes(self) -> None:
        """Everything takes ten times as long as at start-up: drafts cost no more than they did."""
        costly = CostlyDrafting(seconds=0.25)
        budget = TreeBudget(32, self.model, costly)
        for _ in range(100):
            budget.choose(sequences([[0.9]]))
            seconds = StepSeconds(draft=2.5, verify=9.0, accept=0.7, commit=0.3)
            budget.observe(sequences([[0.9]]), result(tokens=[[1, 2]], num_drafted=[1], seconds=seconds))
        assert costly.draft_seconds(1) == pytest.approx(0.25)


def result(
    tokens: list[list[int]],
    num_drafted: list[int],
    seconds: StepSeconds | None = None,
    *,
    drafted: bool = True,
    costly: bool = True,
) -> StepResult:
    return StepResult(
        batch=RunningBatch.__new__(RunningBatch),
        tokens=tokens,
        num_drafted=num_drafted,
        path_probs=[],
        logprobs=None,
        traces=None,
        seconds=seconds or StepSeconds(),
        drafted=drafted,
        drafted_costly=costly,
    )
