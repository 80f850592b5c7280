"""Costly drafters run while they pay, and hardly at all while they do not."""

from gorgon_engine.budget import CostlyDrafting

PASS = 2.0  # seconds of a verification pass
PLAIN_RATE = 1.0  # tokens a second without speculation


def run(drafting: CostlyDrafting, steps: int, tokens_when_drafted: int) -> int:
    """Steps in which the drafters ran. A drafted step takes PASS + draft seconds, another one second a token."""
    ran = 0
    for _ in range(steps):
        wanted = drafting.wanted
        ran += wanted
        drafting.observe(
            ran=wanted,
            num_tokens=tokens_when_drafted if wanted else 1,
            seconds=PASS if wanted else 1.0,
            plain_rate=PLAIN_RATE,
            draft_seconds=0.0,
        )
    return ran


def test_what_pays_always_runs() -> None:
    assert run(CostlyDrafting(seconds=0.5), 1000, tokens_when_drafted=3) == 1000


def test_what_does_not_pay_is_tried_less_and_less() -> None:
    drafting = CostlyDrafting(seconds=0.5)
    assert run(drafting, 24, tokens_when_drafted=2) == 24, "a trial is always made"
    assert not drafting.wanted
    assert run(drafting, 48, tokens_when_drafted=2) == 0
    assert run(drafting, 24, tokens_when_drafted=2) == 24
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


def test_measured_drafts_replace_the_calibrated_figure() -> None:
    drafting = CostlyDrafting(seconds=0.1)
    for _ in range(200):
        drafting.observe(ran=True, num_tokens=9, seconds=PASS, plain_rate=PLAIN_RATE, draft_seconds=0.4)
    assert abs(drafting.seconds - 0.4) < 1e-3
