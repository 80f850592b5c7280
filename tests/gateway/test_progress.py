"""The gateway's own count of a generation adds up however it was cut into parts and messages."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gorgon_gateway.progress import Progress
from gorgon_protocol.messages import FinishedMessage

STEP = st.tuples(st.integers(0, 4), st.integers(0, 12))  # accepted, nodes beside the accepted ones and the root
PART = st.lists(STEP, max_size=12)


def message(num_tokens: int, num_accepted: int, num_nodes: int) -> dict[str, Any]:
    return {"token_ids": [7] * num_tokens, "num_accepted": num_accepted, "num_nodes": num_nodes}


def finished_by_an_engine(num_tokens: int) -> dict[str, Any]:
    return {
        "type": "finished",
        "finish_reason": "length",
        "text": "",
        "stop": None,
        "usage": {"prompt_tokens": 3, "completion_tokens": num_tokens, "total_tokens": 3 + num_tokens},
        "metrics": {
            "speculative_decoding": None,
            "tokens_per_second": 100.0,
            "speedup": 2.0,
            "queue_seconds": 0.5,
            "prefill_seconds": 0.1,
            "ttft_seconds": 0.2,
            "decode_seconds": 1.0,
            "heads": "some@1",
            "num_resumptions": 0,
        },
        "request_id": "r",
        "seed": 1,
    }


@given(parts=st.lists(PART, min_size=1, max_size=4), num_given=st.integers(0, 3), merge=st.integers(1, 4))
def test_identities_hold_over_all_parts(parts: list[list[tuple[int, int]]], num_given: int, merge: int) -> None:
    """Each part: the token of its prefill, then steps. merge: so many steps share a message."""
    progress = Progress([1] * num_given)
    now = 0.0
    num_tokens = num_given
    num_drafted = 0
    for number, steps in enumerate(parts):
        if number:
            progress.interrupted()
        now += 1.0
        progress.take(message(1, 0, 1), now)
        num_tokens += 1
        for first in range(0, len(steps), merge):
            together = steps[first : first + merge]
            accepted = sum(a for a, _ in together)
            drafted = sum(a + others for a, others in together)
            now += 1.0
            progress.take(message(accepted + len(together), accepted, drafted + len(together)), now)
            num_tokens += accepted + len(together)
            num_drafted += drafted
    end = FinishedMessage.model_validate(progress.finished(finished_by_an_engine(num_tokens), started_at=0.5))
    metrics = end.metrics.speculative_decoding
    assert sum(metrics.acceptance_histogram) == metrics.num_spec_steps
    assert sum(i * n for i, n in enumerate(metrics.acceptance_histogram)) == metrics.num_accepted_draft_tokens
    assert metrics.num_accepted_draft_tokens == sum(a for steps in parts for a, _ in steps)
    assert metrics.num_draft_tokens == num_drafted
    assert end.usage.completion_tokens == num_tokens
    assert num_tokens - num_given == 1 + metrics.num_spec_steps + metrics.num_accepted_draft_tokens
    assert end.metrics.num_resumptions == len(parts) - 1
    assert end.metrics.ttft_seconds == 0.5
    assert end.metrics.decode_seconds == now - 1.0
    if now > 1.0:
        assert end.metrics.tokens_per_second == (num_tokens - num_given - 1) / (now - 1.0)
        assert end.metrics.speedup == end.metrics.tokens_per_second / 50.0 or end.metrics.tokens_per_second == 0.0
    # What only the engine knows is the engine's.
    assert (end.metrics.heads, end.metrics.queue_seconds) == ("some@1", 0.5)


def test_the_last_step_may_end_inside_its_drafts() -> None:
    """A stop in an accepted draft: every token of the message is a draft, there is no bonus token."""
    progress = Progress([])
    progress.take(message(1, 0, 1), 1.0)
    progress.take(message(2, 2, 16), 2.0)
    metrics = progress.cancelled(0.0, num_prompt_tokens=4)["metrics"]["speculative_decoding"]
    assert (metrics["num_spec_steps"], metrics["num_accepted_draft_tokens"]) == (1, 1)


def test_a_merged_message_may_begin_with_the_token_of_the_prefill() -> None:
    progress = Progress([])
    progress.take(message(1 + 3 + 2, 3, 1 + 16 + 16), 1.0)
    metrics = progress.cancelled(0.0, num_prompt_tokens=4)["metrics"]["speculative_decoding"]
    assert (metrics["num_spec_steps"], metrics["num_accepted_draft_tokens"]) == (2, 3)
    assert metrics["num_draft_tokens"] == 30


def test_cancelled_before_anything_came() -> None:
    end = progress = Progress([])
    end = FinishedMessage.model_validate(progress.cancelled(0.0, num_prompt_tokens=0))
    assert end.usage.total_tokens == 0
    assert end.metrics.tokens_per_second is end.metrics.ttft_seconds is end.metrics.speedup is None


def test_messages_without_tokens_count_nothing() -> None:
    progress = Progress([])
    progress.take(message(0, 0, 1), 1.0)
    assert (progress.num_received, progress.first_token_at) == (0, None)
