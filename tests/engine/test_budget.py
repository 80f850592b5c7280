"""Costly drafters run while they pay, and hardly at all while they do not."""

import pytest

from gorgon_engine.budget import CostlyDrafting

PASS = 2.0  # seconds of a verification pass
PLAIN_RATE = 1.0  # tokens a second without speculation


def run(drafting: CostlyDrafting, steps: int, tokens_when_drafted: int, *, batch: int = 1) -> int:
    """Steps in which the drafters ran. The step behind each verifies what they guessed: it takes PASS seconds and
    gives each sequence so many tokens; another takes a second a token."""
    ran = 0
    for _ in range(steps):
        wanted, verifies = drafting.wanted(batch), drafting._ran
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
    assert not drafting.wanted(1)
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
