"""The queue against a model of it, and fairness."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gorgon_engine.detokenizer import IncrementalDetokenizer
from gorgon_engine.queue import FairQueue
from gorgon_engine.sequence import Request, Sequence


def waiting(number: int, client: str, timeout_seconds: float | None = None) -> Sequence:
    request = Request(f"{client}{number}", (1,), client=client, timeout_seconds=timeout_seconds)
    return Sequence(request, IncrementalDetokenizer.__new__(IncrementalDetokenizer))


def ids(queue: FairQueue) -> list[str]:
    return [sequence.request.id for sequence in queue]


def test_clients_take_turns_and_one_of_them_comes_first_come_first_served() -> None:
    queue = FairQueue()
    for number in range(3):
        queue.push(waiting(number, "a"))
    queue.push(waiting(0, "b"))
    queue.push(waiting(0, "c"))
    queue.push(waiting(1, "b"))
    order = ["a0", "b0", "c0", "a1", "b1", "a2"]
    assert ids(queue) == order
    assert [queue.pop().request.id for _ in order] == order


def test_who_sends_a_hundred_delays_another_by_one() -> None:
    queue = FairQueue()
    for number in range(100):
        queue.push(waiting(number, "greedy"))
    assert queue.pop().request.id == "greedy0"
    queue.push(waiting(0, "modest"))
    assert ids(queue)[:2] == ["greedy1", "modest0"]


def test_what_was_taken_back_is_the_next_again() -> None:
    queue = FairQueue()
    for client in "ab":
        for number in range(2):
            queue.push(waiting(number, client))
    queue.push_front(queue.pop())
    assert ids(queue) == ["a0", "b0", "a1", "b1"]
    last = queue.pop(), queue.pop(), queue.pop(), queue.pop()
    for sequence in reversed(last):
        queue.push_front(sequence)
    assert queue.pop() is last[0]


def test_an_empty_queue_gives_nothing() -> None:
    queue = FairQueue()
    with pytest.raises(IndexError, match="nobody waits"):
        queue.pop()
    with pytest.raises(ValueError, match="not in deque"):
        queue.remove(waiting(0, "a"))
    assert (len(queue), ids(queue), queue.overdue()) == (0, [], [])


def test_who_waited_too_long_is_named() -> None:
    queue = FairQueue()
    patient, hasty, endless = waiting(0, "a", 1000.0), waiting(1, "a", 5.0), waiting(0, "b")
    for sequence in (patient, hasty, endless):
        queue.push(sequence)
    assert queue.overdue() == []
    for sequence in (patient, hasty, endless):
        sequence.arrived_at = time.perf_counter() - 6.0
    assert queue.overdue() == [hasty]
    assert len(queue) == 3


@given(st.data())
def test_the_order_that_is_told_is_the_order_that_is_served(data: st.DataObject) -> None:
    """Whatever came before. And within a client nobody overtakes."""
    queue, inside, number = FairQueue(), [], 0
    for action in data.draw(st.lists(st.sampled_from(["push", "push", "pop", "remove", "back"]), max_size=40)):
        if action == "push":
            sequence = waiting(number, data.draw(st.sampled_from("abc")))
            number += 1
            inside.append(sequence)
            queue.push(sequence)
        elif inside and action == "remove":
            queue.remove(inside.pop(data.draw(st.integers(0, len(inside) - 1))))
        elif inside:
            sequence = queue.pop()
            if action == "back":
                queue.push_front(sequence)
            else:
                inside.remove(sequence)
        assert len(queue) == len(inside)
    told = list(queue)
    assert set(told) == set(inside)
    for client in "abc":
        assert [s for s in told if s.request.client == client] == [s for s in inside if s.request.client == client]
    assert [queue.pop() for _ in told] == told
