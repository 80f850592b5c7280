"""Answers that repeat themselves for ever, as small models' greedy ones do.

Whatever drafts from the text so far is always right there, so that loops flatter every figure of acceptance: they are
reported beside, never instead of, the answers that do not loop.
"""

from collections.abc import Sequence

MIN_TOKENS = 128  # shorter answers are taken as they are
TAIL_TOKENS = 96
MAX_PERIOD = 48  # two whole rounds at least


def is_looping(token_ids: Sequence[int]) -> bool:
    """Whether an answer of at least 128 tokens ends in 96 that repeat with a period of at most 48.

    Both tokens of every compared pair lie in those 96, so that what stands before a loop does not matter.
    """
    if len(token_ids) < MIN_TOKENS:
        return False
    tail = list(token_ids[-TAIL_TOKENS:])
    return any(tail[period:] == tail[:-period] for period in range(1, MAX_PERIOD + 1))
