"""Every error this package raises, and the one table from HTTP status to class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

__all__ = [
    "STATUS_ERRORS",
    "APIConnectionError",
    "APIError",
    "APITimeoutError",
    "AuthenticationError",
    "BadRequestError",
    "CheckpointError",
    "ConflictError",
    "DeadlineError",
    "DownloadError",
    "InvalidArgumentError",
    "InvalidResponseError",
    "InvalidValueError",
    "NotFoundError",
    "PermissionDeniedError",
    "PrefixdError",
    "RateLimitError",
    "RequestTooLargeError",
    "ServerError",
    "StreamError",
    "UnavailableError",
    "api_error",
    "error_fields",
]


class PrefixdError(Exception):
    """The root of the tree.

    ::

        PrefixdError
        ├── InvalidArgumentError (ValueError)   refused here, nothing was sent
        │   └── CheckpointError                 a file or folder that cannot be pushed
        ├── APIConnectionError                  no answer: refused, reset, unresolved
        │   └── APITimeoutError                 … or not in time
        ├── APIError                            the server answered with an error status
        │   ├── BadRequestError                 400
        │   ├── AuthenticationError             401
        │   ├── PermissionDeniedError           403
        │   ├── NotFoundError                   404
        │   ├── ConflictError                   409
        │   ├── RequestTooLargeError            413
        │   ├── InvalidValueError               422
        │   ├── RateLimitError                  429
        │   └── ServerError                     5xx
        │       ├── UnavailableError            503
        │       └── DeadlineError               504
        ├── InvalidResponseError                a success that is not what the API describes
        ├── StreamError                         a stream that failed after it began
        └── DownloadError                       bytes that do not have their SHA-256, a bad zip
    """


class InvalidArgumentError(PrefixdError, ValueError):
    """An argument that no server would take; nothing was sent."""


class CheckpointError(InvalidArgumentError):
    """A file or folder from which no upload can be made; the message lists what was found."""


class APIConnectionError(PrefixdError):
    """The request got no answer. The ``httpx`` error is the ``__cause__``."""

    @property
    def was_sent(self) -> bool:
        """False if the server cannot have seen the request: no connection was ever made."""
        return not isinstance(self.__cause__, httpx.ConnectError | httpx.ConnectTimeout)

    @property
    def timed_out(self) -> bool:
        return isinstance(self, APITimeoutError)


class APITimeoutError(APIConnectionError):
    """The client's own ``timeout`` passed. A deadline of the server's is `DeadlineError`."""


class InvalidResponseError(PrefixdError):
    """A successful answer that cannot be read: most often the URL is not a prefixd server's."""


class DownloadError(PrefixdError):
    """Downloaded bytes are not what the server announced; nothing was kept."""


class StreamError(PrefixdError):
    """A stream broke after it began: the server's error event, or a lost connection.

    ``text`` is what had arrived until then. Never retried: the tokens may have been used.
    """

    def __init__(
        self,
        message: str,
        *,
        type: str = "stream_error",
        code: str | None = None,
        param: str | None = None,
        text: str = "",
    ) -> None:
        super().__init__(message)
        self.message, self.type, self.code, self.param = message, type, code, param
        self.text = text


class APIError(PrefixdError):
    """The server refused or failed; the fields are those of its error body."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        type: str = "",
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status = message, status
        self.type, self.code, self.param = type, code, param
        self.request_id = request_id
        self.retry_after = retry_after
        """Seconds the server asked to be left alone, or None."""


class BadRequestError(APIError):
    """400: malformed, or a prompt too long for the model."""


class AuthenticationError(APIError):
    """401: no key, or one the server does not know."""


class PermissionDeniedError(APIError):
    """403: a key without that right."""


class NotFoundError(APIError):
    """404: the task or version is unknown, or another tenant's."""


class ConflictError(APIError):
    """409: ``if_match`` failed, or the version still takes traffic."""


class RequestTooLargeError(APIError):
    """413: the body is over the server's limit."""


class InvalidValueError(APIError):
    """422: an invalid value, or a prefix that is damaged or does not fit the model."""


class RateLimitError(APIError):
    """429: the queue is full."""


class ServerError(APIError):
    """5xx."""


class UnavailableError(ServerError):
    """503: draining, the store or the engine is away, or a prefix could not be loaded."""


class DeadlineError(ServerError):
    """504: the request's ``timeout_s`` or the server's deadline passed."""


STATUS_ERRORS: Mapping[int, type[APIError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    413: RequestTooLargeError,
    422: InvalidValueError,
    429: RateLimitError,
    503: UnavailableError,
    504: DeadlineError,
}


def api_error(response: httpx.Response) -> APIError:
    """The exception for a (read) answer with an error status, whatever its body looks like."""
    fields = error_fields(response)
    status = response.status_code
    fallback = ServerError if status >= 500 else APIError
    return STATUS_ERRORS.get(status, fallback)(
        fields.pop("message") or f"{status} {response.reason_phrase}".rstrip(),
        status=status,
        request_id=response.headers.get("x-request-id"),
        retry_after=_seconds(response.headers.get("retry-after")),
        **fields,
    )


def error_fields(source: httpx.Response | dict[str, Any]) -> dict[str, Any]:
    """``message, type, code, param`` of an error body, empty where it has none."""
    body = source if isinstance(source, dict) else _json_or_none(source)
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, str):  # text-generation-inference's shape, sent by proxies too
        error = {"message": error}
    if not isinstance(error, dict):
        error = {}
    text = {key: str(error.get(key) or "") for key in ("message", "type", "code", "param")}
    return {**text, "code": text["code"] or None, "param": text["param"] or None}


def _json_or_none(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:  # a proxy's HTML page
        return None


def _seconds(header: str | None) -> float | None:
    # The date form of Retry-After is not used by this server; a proxy's is ignored.
    try:
        return max(0.0, float(header)) if header is not None else None
    except ValueError:
        return None
