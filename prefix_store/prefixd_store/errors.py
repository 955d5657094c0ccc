"""Everything that prefixd raises on purpose is one tree; each leaf is one entry of the HTTP table.

PrefixdError
├── InvalidRequest           the caller's value is wrong; ``param`` names it
│   ├── InvalidPrefix        an upload that is damaged, unsafe or does not fit
│   └── TooLarge             over a size limit
├── NotFound                 task, version or blob unknown (or another tenant's)
├── Conflict                 If-Match failed, or a version is still the active one
└── Unavailable              try again later
    ├── StoreUnavailable     Redis or the disk does not answer
    └── CorruptBlob          stored bytes no longer match their SHA-256; never served
"""

from __future__ import annotations

__all__ = [
    "Conflict",
    "CorruptBlob",
    "InvalidPrefix",
    "InvalidRequest",
    "NotFound",
    "PrefixdError",
    "StoreUnavailable",
    "TooLarge",
    "Unavailable",
]


class PrefixdError(Exception):
    """Base class. ``code`` is a stable machine-readable word, ``param`` the field at fault."""

    code = "error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequest(PrefixdError):
    code = "invalid_value"


class InvalidPrefix(InvalidRequest):
    code = "invalid_prefix"


class TooLarge(InvalidRequest):
    code = "too_large"


class NotFound(PrefixdError):
    code = "not_found"


class Conflict(PrefixdError):
    code = "conflict"


class Unavailable(PrefixdError):
    code = "unavailable"


class StoreUnavailable(Unavailable):
    code = "store_unavailable"


class CorruptBlob(Unavailable):
    code = "corrupt_blob"
