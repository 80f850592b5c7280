"""Being cancelled for certain, for every process that talks to Redis."""

import asyncio


def heed_cancellation() -> None:
    """To be called behind a Redis command. Raises `CancelledError` where the task was cancelled meanwhile: the client
    waits with `asyncio.wait_for`, which can swallow that before Python 3.12 (python/cpython#86296)."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
