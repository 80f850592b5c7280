"""The exception tree that every part of Gorgon raises, and that each edge turns into one clear line or response.

    GorgonError
    ├── BadRequestError          the caller asked for something that cannot be
    │   └── ContextLengthError   prompt and answer do not fit the context
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


class BadRequestError(GorgonError):
    code = "invalid_request"


class ContextLengthError(BadRequestError):
    code = "context_length_exceeded"


class ModelError(GorgonError):
    code = "model_error"


class ModelNotFoundError(ModelError):
    code = "model_not_found"


class HeadsError(GorgonError):
    code = "heads_error"


class CapacityError(GorgonError):
    code = "capacity_exceeded"


class FetchError(GorgonError):
    code = "fetch_failed"


class TrainingError(GorgonError):
    code = "training_error"


class DataError(TrainingError):
    code = "data_error"
