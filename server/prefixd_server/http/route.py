"""A route that takes exactly what it declares: its query parameters, its content type, its size."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from prefixd_server.errors import InvalidRequest, TooLarge
from prefixd_server.http.errors import (
    ClientDisconnected,
    Malformed,
    UnsupportedMediaType,
    shown,
)
from prefixd_server.http.inputs import Inputs

__all__ = ["StrictRoute", "limited_body", "router"]


class StrictRoute(APIRoute):
    """FastAPI ignores unknown query parameters, parses lenient JSON, reads any size; we refuse.

    It declares and documents the route; what answers is ours, in a third of its time (inputs.py).
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        self._inputs = Inputs(self.dependant)
        self._answer = TypeAdapter(self.response_model) if self.response_model else None
        self.app = self._run

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        inputs = self._inputs
        request = (_JsonRequest if inputs.takes_json else Request)(scope, receive)
        _check_query(request, inputs.query_names)
        if inputs.takes_json:
            _check_content_type(request)
        response = Response(status_code=self.status_code or 200)
        answer = await self.endpoint(**await inputs.read(request, response))
        if isinstance(answer, Response):
            response = answer
        elif self._answer is not None:
            response.body = self._answer.dump_json(answer, by_alias=True)
            response.headers["content-length"] = str(len(response.body))
            response.headers["content-type"] = "application/json"
        await response(scope, receive, send)


def router(tag: str) -> APIRouter:
    return APIRouter(route_class=StrictRoute, tags=[tag])


async def limited_body(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body in chunks as they arrive. Raises TooLarge as soon as it is over ``limit`` bytes."""
    announced = request.headers.get("content-length", "")
    total = int(announced) if announced.isdecimal() else 0
    if total > limit:
        raise TooLarge(f"body of {total} bytes, at most {limit} allowed", param="body")
    total = 0
    try:
        async for chunk in request.stream():
            total += len(chunk)
            if total > limit:
                raise TooLarge(f"body of over {limit} bytes", param="body")
            yield chunk
    except ClientDisconnect:
        raise ClientDisconnected("the client left before its body was complete") from None


class _JsonRequest(Request):
    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            limit = self.app.state.services.config.limits.max_body_bytes
            self._body = b"".join([chunk async for chunk in limited_body(self, limit)])
        return self._body

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = _parse(await self.body())
        return self._json


def _parse(body: bytes) -> Any:
    if not body:
        raise Malformed("the body is empty; expected a JSON object", param="body")
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if "surrogate in string" in error.msg:  # JSON by its grammar, but no text
            raise InvalidRequest(f"a string is not Unicode: {error}", param="body") from None
        raise Malformed(f"malformed JSON: {error}", param="body") from None


def _check_query(request: Request, known: frozenset[str]) -> None:
    for name in request.query_params:
        if name not in known:
            allowed = f"; known are {', '.join(sorted(known))}" if known else ""
            raise InvalidRequest(f"unknown query parameter {shown(name)}{allowed}", param=name)
    for name in known:
        if len(request.query_params.getlist(name)) > 1:
            raise InvalidRequest(f"query parameter {name} is given more than once", param=name)


def _check_content_type(request: Request) -> None:
    given = request.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if kind != "application/json":
        raise UnsupportedMediaType(f"content type {shown(given)}; expected application/json")
