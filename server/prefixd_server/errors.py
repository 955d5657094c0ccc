"""The server's own leaves of the exception tree; root and other leaves: prefixd_store.errors.

PrefixdError
├── InvalidRequest
│   └── PromptTooLong        prompt, prefix and new tokens exceed the model's context
├── Overloaded               the queue is full; ``retry_after`` seconds
├── DeadlineExceeded         the request's own or the server's time limit passed
└── Unavailable
    ├── Draining             the server is shutting down
    └── EngineDead           the engine thread ended; the process should be restarted
"""

from __future__ import annotations

from prefixd_store.errors import (
    Conflict,
    CorruptBlob,
    InvalidPrefix,
    InvalidRequest,
    NotFound,
    PrefixdError,
    StoreUnavailable,
    TooLarge,
    Unavailable,
)

__all__ = [
    "Conflict",
    "CorruptBlob",
    "DeadlineExceeded",
    "Draining",
    "EngineDead",
    "InvalidPrefix",
    "InvalidRequest",
    "NotFound",
    "Overloaded",
    "PrefixdError",
    "PromptTooLong",
    "StoreUnavailable",
    "TooLarge",
    "Unavailable",
    "UnsupportedModel",
]


class PromptTooLong(InvalidRequest):
    code = "context_length_exceeded"


class Overloaded(PrefixdError):
    code = "queue_full"
    retry_after = 1.0


class DeadlineExceeded(PrefixdError):
    code = "deadline_exceeded"


class Draining(Unavailable):
    code = "draining"


class EngineDead(Unavailable):
    code = "engine_dead"


class UnsupportedModel(PrefixdError):
    """The model cannot be served; raised at start-up, by name and with the reason."""

    code = "unsupported_model"
