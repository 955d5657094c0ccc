"""Token streams: reading events out of bytes, and the iterators a caller holds."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import contextmanager

import httpx
from pydantic import ValidationError

from prefixd._errors import StreamError, error_fields
from prefixd._models import StreamEvent
from prefixd._sse import EventParser

__all__ = ["AsyncTokenStream", "EventReader", "TokenStream"]


class EventReader:
    """Bytes → events. It knows the text so far and whether the stream came to its proper end."""

    def __init__(self) -> None:
        self._parser = EventParser()
        self._text = ""
        self._finished = False

    def feed(self, chunk: bytes) -> Iterator[StreamEvent]:
        for data in self._parser.feed(chunk):
            event = self._decode(data)
            self._text += event.text
            self._finished = event.final
            yield event

    def end(self) -> None:
        """Call at the end of the body: one that stops before its last event was cut off."""
        if not self._finished:
            raise StreamError("the stream ended before its last event", text=self._text)

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Connection errors while the body is read, as StreamError."""
        try:
            yield
        except httpx.RequestError as error:
            detail = str(error) or type(error).__name__
            raise StreamError(
                f"the stream broke: {detail}", type="connection_error", text=self._text
            ) from error

    def _decode(self, data: str) -> StreamEvent:
        try:
            body = json.loads(data)
            if isinstance(body, dict) and "error" in body:
                fields = error_fields(body)
                message = fields.pop("message") or "the server reported a failure"
                raise StreamError(message, text=self._text, **fields)
            return StreamEvent.model_validate(body)
        except (ValueError, ValidationError) as error:
            shown = data if len(data) <= 80 else data[:80] + "…"
            raise StreamError(f"unreadable event {shown!r}", text=self._text) from error


class TokenStream(Iterator[StreamEvent]):
    """Events as they arrive. The request is sent by the first ``next``.

    Leaving a ``with`` block, ``close()``, or dropping the iterator closes the connection, which
    aborts the request on the server. Iterating raises `APIError` before the first event and
    `StreamError` after it.
    """

    def __init__(self, events: Generator[StreamEvent, None, None]) -> None:
        self._events = events

    def __next__(self) -> StreamEvent:
        return next(self._events)

    def close(self) -> None:
        self._events.close()

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncTokenStream(AsyncIterator[StreamEvent]):
    """`TokenStream` for ``async for`` and ``async with``."""

    def __init__(self, events: AsyncGenerator[StreamEvent, None]) -> None:
        self._events = events

    async def __anext__(self) -> StreamEvent:
        return await anext(self._events)

    async def aclose(self) -> None:
        await self._events.aclose()

    async def __aenter__(self) -> AsyncTokenStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
