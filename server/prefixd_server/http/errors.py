"""One table from exception to HTTP, and the handlers that make every failure one shape.

``{"error": {"message", "type", "code", "param"}}``, whatever failed: our own exceptions, a request
that does not validate, an unknown route. A 500 tells nothing but that it happened: the traceback is
in the log.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from prefixd_server.errors import (
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    PrefixdError,
    PromptTooLong,
    TooLarge,
    Unavailable,
)

__all__ = [
    "ClientDisconnected",
    "Malformed",
    "MethodNotAllowed",
    "RouteUnknown",
    "UnsupportedMediaType",
    "error_body",
    "error_response",
    "install_error_handlers",
    "shown",
]

_MAX_SHOWN = 200
_MAX_MESSAGE = 2000
_LINGER_BYTES = 16 << 20


class Malformed(PrefixdError):
    """The body is not what its content type says."""

    code = "malformed_body"


class UnsupportedMediaType(PrefixdError):
    code = "unsupported_media_type"


class MethodNotAllowed(PrefixdError):
    code = "method_not_allowed"


class RouteUnknown(NotFound):
    code = "route_not_found"


class ClientDisconnected(PrefixdError):
    """Nobody reads the answer; its status is for the log."""

    code = "client_disconnected"


class Kind(NamedTuple):
    status: int
    type: str


# The most specific class of an exception's own wins.
TABLE: Mapping[type[BaseException], Kind] = {
    Malformed: Kind(400, "invalid_request_error"),
    PromptTooLong: Kind(400, "invalid_request_error"),
    NotFound: Kind(404, "not_found_error"),
    MethodNotAllowed: Kind(405, "invalid_request_error"),
    Conflict: Kind(409, "conflict_error"),
    TooLarge: Kind(413, "invalid_request_error"),
    UnsupportedMediaType: Kind(415, "invalid_request_error"),
    InvalidRequest: Kind(422, "invalid_request_error"),
    Overloaded: Kind(429, "overloaded_error"),
    ClientDisconnected: Kind(499, "client_error"),
    Unavailable: Kind(503, "unavailable_error"),
    DeadlineExceeded: Kind(504, "timeout_error"),
    BaseException: Kind(500, "internal_error"),
}

_RETRY_AFTER = 1.0


def kind_of(error: BaseException) -> Kind:
    return next(TABLE[cls] for cls in type(error).__mro__ if cls in TABLE)


def error_body(error: BaseException) -> dict[str, Any]:
    """The answer's JSON. What is not ours is told as an internal error and nothing more."""
    kind = kind_of(error)
    if not isinstance(error, PrefixdError) or kind.status == 500:
        return _body("internal error; the server's log has more", kind.type, "internal_error", None)
    return _body(error.message, kind.type, error.code, error.param)


def _body(message: str, type_: str, code: str, param: str | None) -> dict[str, Any]:
    message = _cut(message, _MAX_MESSAGE)
    param = param if param is None else _cut(param, _MAX_SHOWN)
    return {"error": {"message": message, "type": type_, "code": code, "param": param}}


def error_response(error: BaseException, headers: Mapping[str, str] | None = None) -> Response:
    status = kind_of(error).status
    fields = dict(headers or {})
    if status in (429, 503):
        fields["retry-after"] = str(max(1, round(getattr(error, "retry_after", _RETRY_AFTER))))
    content = orjson.dumps(_encodable(error_body(error)))
    cls = _ClosingResponse if status == 413 else Response
    return cls(content, status, fields, media_type="application/json")


def shown(value: object) -> str:
    """A value as a message may repeat it: short, whatever a client sent."""
    return _cut(_REPR.repr(value), _MAX_SHOWN)


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(PrefixdError, _on_prefixd_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def _on_prefixd_error(request: Request, error: Exception) -> Response:
    return error_response(error)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(invalid_request(error.errors()))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method, shown(request.url.path)
    match error.status_code:
        case 404:
            ours: PrefixdError = RouteUnknown(f"no route {path}")
        case 405:
            ours = MethodNotAllowed(f"{method} is not allowed on {path}")
            return error_response(ours, _allow(request) or error.headers)
        case status if status < 500:
            ours = Malformed(str(error.detail))
        case status:
            ours = Unavailable(HTTPStatus(status).phrase)
    return error_response(ours, error.headers)


def _allow(request: Request) -> dict[str, str]:
    """All methods of the path; starlette tells only those of the first route that has it."""
    path = getattr(request.scope.get("route"), "path", None)
    methods = request.app.state.methods.get(path)
    return {"allow": ", ".join(sorted(methods))} if methods else {}


def invalid_request(details: Sequence[Any], root: str = "", *, subject: str = "") -> InvalidRequest:
    """Pydantic's findings as one error that names the first field and describes up to five."""
    parts = [f"{_where(d['loc'], root)}: {_what(d)}" for d in details[:5]]
    if len(details) > 5:
        parts.append(f"and {len(details) - 5} more")
    param = _where(details[0]["loc"], root)
    return InvalidRequest(subject + "; ".join(parts), param=param)


def _where(location: Sequence[int | str], root: str) -> str:
    steps = [str(step) for step in location]
    if not root and steps and steps[0] in {"body", "query", "path", "header"}:
        steps = steps[1:] or ["body"]
    return _cut(".".join([root, *steps] if root else steps), _MAX_SHOWN)


def _what(detail: Mapping[str, Any]) -> str:
    match detail["type"]:
        case "extra_forbidden":
            return "unknown field"
        case "missing":
            return "required"
        case "none_required":
            return "not implemented"
    return f"{detail['msg']}, got {shown(detail['input'])}"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _encodable(value: Any) -> Any:
    """Lone surrogates from a client's JSON cannot be written as UTF-8: show them escaped."""
    if isinstance(value, dict):
        return {key: _encodable(item) for key, item in value.items()}
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return value


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 120
_REPR.maxlevel = 3


class _ClosingResponse(Response):
    """Answers while the client may still be sending, then closes.

    Closing with unread bytes makes TCP reset the connection and can destroy the answer on its way,
    so a bounded amount is read and dropped first.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [*self.raw_headers, (b"connection", b"close")]
        start = {"type": "http.response.start", "status": self.status_code, "headers": headers}
        await send(start)
        await send({"type": "http.response.body", "body": bytes(self.body), "more_body": True})
        await _drop(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _drop(receive: Receive) -> None:
    dropped = 0
    while dropped < _LINGER_BYTES:
        message = await receive()
        dropped += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return
