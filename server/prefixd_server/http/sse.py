"""Server-sent events: one ``data:`` line a token, ended by whoever leaves first."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson
import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from prefixd_server.errors import PrefixdError
from prefixd_server.http.disconnect import unless_disconnected
from prefixd_server.http.errors import ClientDisconnected, error_body, kind_of

__all__ = ["EventStream", "event"]

_log = structlog.get_logger("prefixd.http")


def event(data: Any) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


class EventStream(Response):
    """Sends ``events`` as they come. ``close`` is awaited whatever happens, once.

    starlette's own StreamingResponse cancels the iterator wherever it stands and leaves cleaning up
    to the garbage collector; here an abandoned stream is closed, so its request aborted, at once.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        close: Callable[[], Awaitable[None]],
        log: dict[str, Any],
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._close = close
        self._log_fields = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        try:
            await send(start)
            await unless_disconnected(receive, self._pump(send))
        except (ClientDisconnected, OSError):
            self._log_fields["status"] = kind_of(ClientDisconnected("")).status
        finally:
            await self._close()

    async def _pump(self, send: Send) -> None:
        try:
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except OSError:
            raise
        except Exception as error:
            self._log_fields["error"] = kind_of(error).type
            if not isinstance(error, PrefixdError):
                _log.exception("unexpected error in a stream")
            failed = event(error_body(error))
            await send({"type": "http.response.body", "body": failed, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
