"""The identities that readers of the metrics rely on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gorgon_protocol.metrics import MetricsAccumulator, SpeculativeDecodingMetrics, Usage

steps = st.lists(
    st.integers(0, 127).flatmap(lambda drafted: st.tuples(st.integers(0, drafted), st.just(drafted))), max_size=60
)


@given(steps)
def test_the_identities_hold_for_any_steps(steps: list[tuple[int, int]]) -> None:
    accumulator = MetricsAccumulator()
    for accepted, drafted in steps:
        accumulator.record(num_accepted=accepted, num_drafted=drafted)
    metrics = accumulator.summary()
    histogram = metrics.acceptance_histogram
    assert sum(histogram) == metrics.num_spec_steps == accumulator.num_steps == len(steps)
    assert sum(i * count for i, count in enumerate(histogram)) == metrics.num_accepted_draft_tokens
    assert metrics.num_accepted_draft_tokens == sum(accepted for accepted, _ in steps)
    assert metrics.num_draft_tokens == sum(drafted for _, drafted in steps)
    assert metrics.num_spec_tokens == max((drafted for _, drafted in steps), default=0)
    assert not histogram or histogram[-1] > 0
    if steps:
        # Every step emits its accepted drafts and one bonus token.
        emitted = sum(accepted + 1 for accepted, _ in steps)
        assert metrics.mean_acceptance_length == pytest.approx(emitted / len(steps))
    if metrics.num_draft_tokens:
        rate = metrics.num_accepted_draft_tokens / metrics.num_draft_tokens
        assert metrics.draft_acceptance_rate == pytest.approx(rate)
    assert SpeculativeDecodingMetrics.model_validate_json(metrics.model_dump_json()) == metrics


def test_nothing_verified_is_all_zeros() -> None:
    assert MetricsAccumulator().summary().model_dump() == {
        "mean_acceptance_length": 0.0,
        "draft_acceptance_rate": 0.0,
        "acceptance_histogram": [],
        "num_spec_steps": 0,
        "num_accepted_draft_tokens": 0,
        "num_draft_tokens": 0,
        "num_spec_tokens": 0,
    }


def test_a_summary_does_not_change_with_what_comes_later() -> None:
    accumulator = MetricsAccumulator()
    accumulator.record(num_accepted=2, num_drafted=5)
    before = accumulator.summary()
    accumulator.record(num_accepted=2, num_drafted=9)
    assert before.acceptance_histogram == [0, 0, 1]
    assert accumulator.summary().acceptance_histogram == [0, 0, 2]


def test_more_accepted_than_drafted_is_our_bug() -> None:
    with pytest.raises(AssertionError):
        MetricsAccumulator().record(num_accepted=3, num_drafted=2)


def test_unknown_and_negative_fields_are_refused() -> None:
    with pytest.raises(ValidationError):
        Usage(prompt_tokens=1, completion_tokens=-1, total_tokens=0)
    with pytest.raises(ValidationError):
        Usage.model_validate({"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2, "cached": 3})
