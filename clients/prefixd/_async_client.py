"""The asyncio client: `Client`, awaited."""

from __future__ import annotations

import asyncio
from asyncio import sleep
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import closing
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, Unpack

import httpx

from prefixd import _calls as calls
from prefixd._download import Download, PullFormat
from prefixd._errors import PrefixdError, api_error
from prefixd._models import Parameters, StreamEvent, Task
from prefixd._retry import Retry
from prefixd._stream import AsyncTokenStream, EventReader
from prefixd._transport import (
    DEFAULT_TIMEOUT,
    DEFAULT_URL,
    Call,
    bound_signature,
    failure,
    http_settings,
    translated,
)
from prefixd._upload import Progress

__all__ = ["AsyncClient"]

P = ParamSpec("P")
T = TypeVar("T")


def _awaited(
    build: Callable[P, Call[T]],
) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]:
    """A coroutine method that sends what ``build`` describes."""

    @wraps(build)
    async def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._send(build(*args, **kwargs))

    return bound_signature(method, build)


class AsyncClient:
    """`Client` for asyncio: the same arguments, retries and errors."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float | httpx.Timeout = DEFAULT_TIMEOUT,
        max_retries: int = 3,
    ) -> None:
        self._http = httpx.AsyncClient(**http_settings(base_url, api_key, timeout))
        self._retry = Retry(max_retries)

    generate = _awaited(calls.generate)
    push = _awaited(calls.push)
    compile = _awaited(calls.compile)
    task = _awaited(calls.task)
    version = _awaited(calls.version)
    activate = _awaited(calls.activate)
    update = _awaited(calls.update)
    delete = _awaited(calls.delete)
    delete_version = _awaited(calls.delete_version)
    info = _awaited(calls.info)
    ready = _awaited(calls.ready)
    live = _awaited(calls.live)
    metrics = _awaited(calls.metrics)

    def stream(
        self,
        task: str,
        inputs: str,
        *,
        version: int | None = None,
        **parameters: Unpack[Parameters],
    ) -> AsyncTokenStream:
        """As `generate`, an event a token; the last has the whole text and the usage."""
        call = calls.stream(task, inputs, version=version, **parameters)
        return AsyncTokenStream(self._events(call))

    async def tasks(self, prefix: str = "") -> AsyncIterator[Task]:
        """Every task whose name starts with ``prefix``, a page at a time."""
        cursor = None
        while True:
            page = await self._send(calls.task_page(prefix, cursor))
            for task in page.tasks:
                yield task
            cursor = page.next_cursor
            if not cursor:
                return

    async def pull(
        self,
        task: str,
        path: str | Path,
        *,
        version: int | None = None,
        format: PullFormat = "prefixd",
        progress: Progress | None = None,
    ) -> Path:
        """As `Client.pull`."""
        number = calls.active_version(await self.task(task)) if version is None else version
        call = calls.prefix_bytes(task, number, format)
        with Download(path, await self.version(task, number), format, progress) as download:
            response = await self._open(call)
            try:
                with translated():
                    async for chunk in response.aiter_bytes():
                        download.write(chunk)
            finally:
                await response.aclose()
        return download.path

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _events(self, call: Call[None]) -> AsyncGenerator[StreamEvent, None]:
        response = await self._open(call)
        reader = EventReader()
        try:
            with reader.failures():
                async for chunk in response.aiter_bytes():
                    for event in reader.feed(chunk):
                        yield event
            reader.end()
        finally:
            await response.aclose()

    async def _send(self, call: Call[T]) -> T:
        if call.upload is None:
            return await self._read(call)
        # Converting pickled weights takes a while; it must not hold up the event loop.
        with closing(await asyncio.to_thread(call.upload.open)):
            return await self._read(call)

    async def _read(self, call: Call[T]) -> T:
        response = await self._open(call)
        try:
            with translated():
                await response.aread()
        finally:
            await response.aclose()
        return call.parse(response)

    async def _open(self, call: Call[Any]) -> httpx.Response:
        """An answer whose body is still to be read; retries what may be retried."""
        attempt = 0
        while True:
            try:
                return await self._attempt(call)
            except PrefixdError as error:
                delay = self._retry.delay(error, attempt, call.method)
                if delay is None:
                    raise
            await sleep(delay)
            attempt += 1

    async def _attempt(self, call: Call[Any]) -> httpx.Response:
        with translated():
            response = await self._http.send(call.request(self._http), stream=True)
            if not failure(response, call):
                return response
            try:
                await response.aread()
            finally:
                await response.aclose()
        raise api_error(response)
