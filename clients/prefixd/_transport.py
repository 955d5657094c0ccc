"""What the sync and the async client share: a call as data, the request it makes, its failures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from prefixd._errors import (
    APIConnectionError,
    APITimeoutError,
    InvalidArgumentError,
    InvalidResponseError,
)
from prefixd._upload import Upload
from prefixd._version import __version__

__all__ = [
    "DEFAULT_TIMEOUT",
    "DEFAULT_URL",
    "Call",
    "answer",
    "bound_signature",
    "failure",
    "http_settings",
    "no_answer",
    "text_answer",
    "translated",
]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", bound=BaseModel)

DEFAULT_URL = "http://127.0.0.1:8000"
# A long generation that does not stream sends nothing until it is done.
DEFAULT_TIMEOUT = httpx.Timeout(600.0, connect=10.0)


@dataclass(frozen=True)
class Call(Generic[T]):
    """One HTTP request and how to read its answer."""

    method: str
    path: str
    parse: Callable[[httpx.Response], T]
    params: Mapping[str, Any] = field(default_factory=dict)
    json: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    upload: Upload | None = None
    accept: frozenset[int] = frozenset()
    """Error statuses that are an answer here, not a failure."""

    def request(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        """The request of one attempt; raises InvalidArgumentError for what JSON cannot say."""
        body: dict[str, Any] = {}
        if self.upload is not None:
            body = self.upload.request(asynchronous=isinstance(http, httpx.AsyncClient))
        elif self.json is not None:
            body = {"json": self.json}
        headers = {**body.pop("headers", {}), **self.headers}
        try:
            return http.build_request(
                self.method, self.path, params=self.params, headers=headers, **body
            )
        except (TypeError, ValueError) as error:  # NaN, a set, half a surrogate pair, …
            raise InvalidArgumentError(f"{self.method} {self.path}: {error}") from error


def http_settings(base_url: str, api_key: str | None, timeout: Any) -> dict[str, Any]:
    """Arguments of ``httpx.Client`` and ``httpx.AsyncClient``."""
    if not base_url.startswith(("http://", "https://")):
        raise InvalidArgumentError(f"base_url {base_url!r} must start with http:// or https://")
    headers = {"user-agent": f"prefixd/{__version__}", "accept": "application/json, */*"}
    if api_key is not None:
        if not (api_key.isascii() and api_key.isprintable()):
            raise InvalidArgumentError("api_key holds characters that no HTTP header can carry")
        headers["authorization"] = f"Bearer {api_key}"
    return {"base_url": base_url, "headers": headers, "timeout": timeout}


def failure(response: httpx.Response, call: Call[Any]) -> bool:
    return not response.is_success and response.status_code not in call.accept


@contextmanager
def translated() -> Iterator[None]:
    """``httpx`` errors as ours, with the original as ``__cause__``."""
    try:
        yield
    except httpx.TimeoutException as error:
        raise APITimeoutError(_describe("timed out", error)) from error
    except httpx.RequestError as error:
        raise APIConnectionError(_describe("connection failed", error)) from error


def _describe(what: str, error: httpx.RequestError) -> str:
    detail = str(error) or type(error).__name__
    return f"{error.request.method} {error.request.url}: {what}: {detail}"


def answer(model: type[M]) -> Callable[[httpx.Response], M]:
    """A parser of JSON answers. It raises InvalidResponseError for what does not fit ``model``."""

    def parse(response: httpx.Response) -> M:
        try:
            return model.model_validate_json(response.content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "body"
            raise InvalidResponseError(
                f"{response.request.method} {response.request.url}: the answer is not a "
                f"{model.__name__} ({where}: {first['msg']}); is this a prefixd server?"
            ) from error

    return parse


def no_answer(_: httpx.Response) -> None:
    """The parser of 204."""


def text_answer(response: httpx.Response) -> str:
    return response.text


def bound_signature(method: F, build: Callable[..., Call[Any]]) -> F:
    """Give ``method`` the signature of ``build`` after ``self``, for ``help()`` and editors."""
    described = inspect.signature(build)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    returns = str(described.return_annotation).removeprefix("Call[").removesuffix("]")
    method.__signature__ = described.replace(  # type: ignore[attr-defined]
        parameters=[own, *described.parameters.values()], return_annotation=returns
    )
    return method
