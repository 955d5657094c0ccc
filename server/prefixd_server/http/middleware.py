"""Around every request, in pure ASGI: its id, its log line, its count, and the last resort."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from typing import Any

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefixd_server.errors import Draining
from prefixd_server.http.errors import error_response
from prefixd_server.http.services import Services

__all__ = ["RequestMiddleware"]

_log = structlog.get_logger("prefixd.access")
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}\Z")
_WATCHING = frozenset({"/livez", "/readyz", "/metrics"})
"""answered while draining, and logged at debug"""


class RequestMiddleware:
    """Sets ``request.state.request_id`` and ``request.state.log``, the fields of the access log."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self.app = app
        self.services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, send)
        watching = scope["path"] in _WATCHING
        self.services.num_open += not watching
        try:
            if self.services.draining and not watching:
                error = Draining("the server is shutting down")
                await error_response(error)(scope, receive, exchange.send)
            else:
                await self._run(scope, receive, exchange)
        finally:
            self.services.num_open -= not watching
            status = exchange.log.pop("status", exchange.status or 499)
            self.services.metrics.http_request(scope["method"], exchange.route, status)
            exchange.write_log(status)

    async def _run(self, scope: Scope, receive: Receive, exchange: _Exchange) -> None:
        try:
            await self.app(scope, receive, exchange.send)
        except asyncio.CancelledError:
            if not self.services.draining:
                raise
            _log.warning("cut off by the shutdown", request_id=exchange.request_id)
        except Exception as error:
            _log.exception("unexpected error", request_id=exchange.request_id)
            # With the answer half sent nothing can be said; the server then cuts the connection.
            if exchange.status is None:
                await error_response(error)(scope, receive, exchange.send)


class _Exchange:
    """One request and what is known of its answer."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self._began = time.monotonic()
        self.request_id = _request_id(scope)
        self.status: int | None = None
        self.log: dict[str, Any] = {}
        scope.setdefault("state", {}).update(request_id=self.request_id, log=self.log)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [
                *message.get("headers", ()),
                (b"x-request-id", self.request_id.encode()),
            ]
        await self._send(message)

    @property
    def route(self) -> str:
        """The route's template: a path as sent would make as many series as there are names."""
        return getattr(self._scope.get("route"), "path", "unmatched")

    def write_log(self, status: int) -> None:
        write = _log.debug if self._scope["path"] in _WATCHING else _log.info
        write(
            "request",
            request_id=self.request_id,
            method=self._scope["method"],
            route=self.route,
            path=self._scope["path"][:200],
            duration_ms=round((time.monotonic() - self._began) * 1e3, 1),
            status=status,
            **self.log,
        )


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.match(given) else uuid.uuid4().hex
