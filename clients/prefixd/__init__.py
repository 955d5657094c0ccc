"""The Python client of prefixd, a server for trained prefixes.

>>> from prefixd import Client
>>> with Client("http://127.0.0.1:8000") as client:  # doctest: +SKIP
...     client.push("e2e", "checkpoints/e2e")
...     print(client.generate("e2e", "name : Blue Spice").generated_text)
"""

from prefixd._async_client import AsyncClient
from prefixd._client import Client
from prefixd._download import PullFormat
from prefixd._errors import (
    APIConnectionError,
    APIError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    CheckpointError,
    ConflictError,
    DeadlineError,
    DownloadError,
    InvalidArgumentError,
    InvalidResponseError,
    InvalidValueError,
    NotFoundError,
    PermissionDeniedError,
    PrefixdError,
    RateLimitError,
    RequestTooLargeError,
    ServerError,
    StreamError,
    UnavailableError,
)
from prefixd._models import (
    CacheInfo,
    Details,
    EncoderInfo,
    Generation,
    Health,
    ModelInfo,
    Parameters,
    Sequence,
    ServerInfo,
    StreamDetails,
    StreamEvent,
    Task,
    Token,
    UploadResult,
    Usage,
    Version,
)
from prefixd._stream import AsyncTokenStream, TokenStream
from prefixd._upload import Progress
from prefixd._version import __version__

__all__ = [
    "APIConnectionError",
    "APIError",
    "APITimeoutError",
    "AsyncClient",
    "AsyncTokenStream",
    "AuthenticationError",
    "BadRequestError",
    "CacheInfo",
    "CheckpointError",
    "Client",
    "ConflictError",
    "DeadlineError",
    "Details",
    "DownloadError",
    "EncoderInfo",
    "Generation",
    "Health",
    "InvalidArgumentError",
    "InvalidResponseError",
    "InvalidValueError",
    "ModelInfo",
    "NotFoundError",
    "Parameters",
    "PermissionDeniedError",
    "PrefixdError",
    "Progress",
    "PullFormat",
    "RateLimitError",
    "RequestTooLargeError",
    "Sequence",
    "ServerError",
    "ServerInfo",
    "StreamDetails",
    "StreamError",
    "StreamEvent",
    "Task",
    "Token",
    "TokenStream",
    "UnavailableError",
    "UploadResult",
    "Usage",
    "Version",
    "__version__",
]
