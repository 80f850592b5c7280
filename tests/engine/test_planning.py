"""What a pass is asked for: portions of prompts that share it, and rows of a batch that want something."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gorgon_engine.detokenizer import IncrementalDetokenizer
from gorgon_engine.drafting import ALL_ROWS, DraftRows
from gorgon_engine.planning import plan_chunks, wanted_of
from gorgon_engine.sampling import SamplingParams
from gorgon_engine.sequence import Request, Sequence, SpeculationParams
from gorgon_engine.tree.cost_model import FULL, Effort

PLAIN = SpeculationParams(enabled=False)


def sequence(
    length: int = 4,
    *,
    done: int = 0,
    epoch: int = 0,
    sampling: SamplingParams | None = None,
    speculation: SpeculationParams | None = None,
    trace: bool = False,
) -> Sequence:
    request = Request(
        "one", tuple(range(length)), sampling or SamplingParams(), speculation or SpeculationParams(), trace
    )
    made = Sequence(request, IncrementalDetokenizer.__new__(IncrementalDetokenizer), drafters_epoch=epoch)
    made.num_prefilled = done
    return made


def shares(lengths: list[int], portion: int) -> list[int]:
    """Of each prompt, 0 for those that wait."""
    prefilling = [sequence(length) for length in lengths]
    planned = {id(one): chunk for one, chunk in plan_chunks(prefilling, portion, drafters_epoch=0)}
    return [chunk.stop - chunk.start if (chunk := planned.get(id(one))) else 0 for one in prefilling]


@pytest.mark.parametrize(
    ("lengths", "portion", "expected"),
    [
        ([100], 16, [16]),
        ([5], 16, [5]),
        ([5, 6, 7], 100, [5, 6, 7]),
        ([100, 3], 16, [13, 3]),
        ([100, 100], 16, [8, 8]),
        ([100, 90, 4], 16, [8, 4, 4]),
        ([3, 100, 200], 16, [3, 13, 0]),
        ([100, 50], 1, [1, 0]),
    ],
)
def test_the_first_has_half_and_the_shortest_the_rest(lengths: list[int], portion: int, expected: list[int]) -> None:
    assert shares(lengths, portion) == expected


@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=9), portion=st.integers(1, 300))
def test_a_portion_is_used_up_and_never_more(lengths: list[int], portion: int) -> None:
    shared = shares(lengths, portion)
    assert sum(shared) == min(portion, sum(lengths))
    assert all(share <= length for share, length in zip(shared, lengths, strict=True))
    assert shared[0] >= min(lengths[0], portion // 2, 1), "it gets on at every step"


def test_a_part_knows_where_it_is() -> None:
    old, new, plain = (
        sequence(10, done=6, epoch=1),
        sequence(10, done=6, epoch=2),
        sequence(10, done=6, epoch=2, speculation=PLAIN),
    )
    chunks = [chunk for _, chunk in plan_chunks([old, new, plain], 100, drafters_epoch=2)]
    assert [(chunk.start, chunk.stop, chunk.is_last) for chunk in chunks] == [(6, 10, True)] * 3
    assert [chunk.remember for chunk in chunks] == [False, True, False]


def test_only_those_are_reported_and_drafted_for_that_want_it() -> None:
    wanted = wanted_of(
        [
            sequence(epoch=1, trace=True),
            sequence(epoch=2, sampling=SamplingParams(logprobs=3)),
            sequence(epoch=2, speculation=PLAIN),
            sequence(epoch=2, speculation=SpeculationParams(max_nodes=1), sampling=SamplingParams(logprobs=0)),
        ],
        2,
        FULL,
    )
    assert (wanted.num_logprobs, wanted.logprob_rows) == (3, (1, 3))
    assert (wanted.trace, wanted.trace_rows) == (True, (0,))
    assert (wanted.draft, wanted.rows) == (True, DraftRows((0, 1), (1,)))


def test_who_all_want_the_same_are_not_told_apart() -> None:
    wanted = wanted_of([sequence(), sequence()], 0, Effort(costly=False))
    assert (wanted.num_logprobs, wanted.trace, wanted.draft, wanted.effort.costly) == (None, False, True, False)
    assert wanted.rows == ALL_ROWS
    assert wanted_of([sequence(speculation=PLAIN)], 0, FULL).rows.are_none
    assert not wanted_of([sequence(speculation=PLAIN)], 0, FULL).draft
