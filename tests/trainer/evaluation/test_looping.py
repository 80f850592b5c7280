"""Loops are found by their tail, whatever stands before it."""

import pytest

from gorgon_trainer.evaluation.looping import is_looping

NOVEL = list(range(1000, 1400))  # never repeats


def looped(period: int, length: int) -> list[int]:
    return [i % period for i in range(length)]


@pytest.mark.parametrize("period", [1, 2, 7, 47, 48])
@pytest.mark.parametrize("before", [32, 33, 200])
def test_a_tail_of_rounds_is_a_loop(period: int, before: int) -> None:
    assert is_looping(NOVEL[:before] + looped(period, 96))


@pytest.mark.parametrize(
    "token_ids",
    [
        pytest.param([], id="empty"),
        pytest.param([5] * 127, id="too short to judge"),
        pytest.param(NOVEL, id="no repetition"),
        pytest.param(NOVEL[:100] + looped(49, 96), id="period too long"),
        pytest.param(NOVEL[:100] + looped(3, 95), id="tail too short"),
        pytest.param(NOVEL[:100] + looped(3, 150) + [9], id="the loop was left"),
        pytest.param(looped(3, 100) + NOVEL[:96], id="looped earlier"),
    ],
)
def test_everything_else_is_none(token_ids: list[int]) -> None:
    assert not is_looping(token_ids)


def test_one_different_token_in_the_tail_is_enough() -> None:
    answer = looped(12, 200)
    assert is_looping(answer)
    for place in (104, 150, 199):
        changed = [*answer[:place], 99, *answer[place + 1 :]]
        assert not is_looping(changed)
