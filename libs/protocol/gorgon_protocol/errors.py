"""The exception tree that every part of Gorgon raises, and that each edge turns into one clear line or response.

    GorgonError
    ├── BadRequestError          the caller asked for something that cannot be
    │   ├── ContextLengthError   prompt and answer do not fit the context
    │   └── TooLargeError        a body or a field over its cap
    ├── AuthenticationError      no key, or one that is not known
    ├── NotAllowedError          a known caller may not do this (origin, quota used up)
    ├── NotFoundError            no such route, model or version
    ├── RateLimitError           too much from one caller for now
    ├── QueueFullError           the engine's queue is full for now
    ├── UnavailableError         loading, draining, or no engine left
    ├── DeadlineError            waited or ran longer than was allowed
    ├── SlowReaderError          a stream's reader stood still for too long
    ├── BusyError                a WebSocket runs one generation at a time
    ├── ModelError               a backbone cannot be found, read or used
    │   └── ModelNotFoundError
    ├── HeadsError               draft heads cannot be read or do not fit the backbone
    ├── CapacityError            no room for this now (KV cache slots or positions)
    ├── FetchError               a download failed, was refused or does not match its checksum
    └── TrainingError            a training job cannot start, go on or end
        └── DataError            training data is missing, damaged, of another run or empty

Every message names the thing and, where there is one, the remedy.
"""

from typing import ClassVar


class GorgonError(Exception):
    """Base of all errors that are the user's or the environment's, never ours."""

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    retry_after_seconds: float | None = None  # where trying again later may help


class BadRequestError(GorgonError):
    code = "invalid_request"
    http_status = 400


class ContextLengthError(BadRequestError):
    code = "context_length_exceeded"


class TooLargeError(BadRequestError):
    code = "too_large"
    http_status = 413


class AuthenticationError(GorgonError):
    code = "invalid_api_key"
    http_status = 401


class NotAllowedError(GorgonError):
    code = "forbidden"
    http_status = 403


class NotFoundError(GorgonError):
    code = "not_found"
    http_status = 404


class _RetryError(GorgonError):
    def __init__(self, message: str, *, retry_after_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class RateLimitError(_RetryError):
    code = "rate_limit_exceeded"
    http_status = 429


class QueueFullError(_RetryError):
    code = "queue_full"
    http_status = 429


class UnavailableError(_RetryError):
    code = "unavailable"
    http_status = 503


class DeadlineError(GorgonError):
    code = "timeout"
    http_status = 504


class SlowReaderError(GorgonError):
    code = "slow_reader"
    http_status = 408


class BusyError(GorgonError):
    code = "busy"
    http_status = 409


class ModelError(GorgonError):
    code = "model_error"


class ModelNotFoundError(ModelError):
    code = "model_not_found"
    http_status = 404


class HeadsError(GorgonError):
    code = "heads_error"


class CapacityError(GorgonError):
    code = "capacity_exceeded"
    http_status = 503


class FetchError(GorgonError):
    code = "fetch_failed"


class TrainingError(GorgonError):
    code = "training_error"


class DataError(TrainingError):
    code = "data_error"
