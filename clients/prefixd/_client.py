"""The blocking client."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import wraps
from pathlib import Path
from time import sleep
from typing import Any, Concatenate, ParamSpec, TypeVar, Unpack

import httpx

from prefixd import _calls as calls
from prefixd._download import Download, PullFormat
from prefixd._errors import PrefixdError, api_error
from prefixd._models import Parameters, StreamEvent, Task
from prefixd._retry import Retry
from prefixd._stream import EventReader, TokenStream
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

__all__ = ["Client"]

P = ParamSpec("P")
T = TypeVar("T")


def _blocking(build: Callable[P, Call[T]]) -> Callable[Concatenate[Client, P], T]:
    """A method that sends what ``build`` describes, with its parameters, types and docstring."""

    @wraps(build)
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._send(build(*args, **kwargs))

    return bound_signature(method, build)


class Client:
    """A prefixd server, over one pool of connections. Safe to share between threads.

    ``timeout`` is in seconds without a byte (or an ``httpx.Timeout``). 429, 503 and failed
    connections are tried again up to ``max_retries`` times, after an exponential backoff that
    honours ``Retry-After``; a request the server may have acted on is not. Every failure is a
    `PrefixdError`.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float | httpx.Timeout = DEFAULT_TIMEOUT,
        max_retries: int = 3,
    ) -> None:
        self._http = httpx.Client(**http_settings(base_url, api_key, timeout))
        self._retry = Retry(max_retries)

    generate = _blocking(calls.generate)
    push = _blocking(calls.push)
    compile = _blocking(calls.compile)
    task = _blocking(calls.task)
    version = _blocking(calls.version)
    activate = _blocking(calls.activate)
    update = _blocking(calls.update)
    delete = _blocking(calls.delete)
    delete_version = _blocking(calls.delete_version)
    info = _blocking(calls.info)
    ready = _blocking(calls.ready)
    live = _blocking(calls.live)
    metrics = _blocking(calls.metrics)

    def stream(
        self,
        task: str,
        inputs: str,
        *,
        version: int | None = None,
        **parameters: Unpack[Parameters],
    ) -> TokenStream:
        """As `generate`, an event a token; the last has the whole text and the usage."""
        return TokenStream(self._events(calls.stream(task, inputs, version=version, **parameters)))

    def tasks(self, prefix: str = "") -> Iterator[Task]:
        """Every task whose name starts with ``prefix``, a page at a time."""
        cursor = None
        while True:
            page = self._send(calls.task_page(prefix, cursor))
            yield from page.tasks
            cursor = page.next_cursor
            if not cursor:
                return

    def pull(
        self,
        task: str,
        path: str | Path,
        *,
        version: int | None = None,
        format: PullFormat = "prefixd",
        progress: Progress | None = None,
    ) -> Path:
        """Download a version (the active one if none is named) and return where it is.

        ``prefixd`` writes the file ``path`` (in it, if it is a folder) after checking its SHA-256;
        ``peft`` makes the folder ``path`` that ``PeftModel.from_pretrained`` loads. Nothing is left
        behind on failure. Raises `DownloadError`, `NotFoundError`.
        """
        number = calls.active_version(self.task(task)) if version is None else version
        call = calls.prefix_bytes(task, number, format)
        with Download(path, self.version(task, number), format, progress) as download:
            response = self._open(call)
            try:
                with translated():
                    for chunk in response.iter_bytes():
                        download.write(chunk)
            finally:
                response.close()
        return download.path

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _events(self, call: Call[None]) -> Generator[StreamEvent, None, None]:
        response = self._open(call)
        reader = EventReader()
        try:
            with reader.failures():
                for chunk in response.iter_bytes():
                    yield from reader.feed(chunk)
            reader.end()
        finally:
            response.close()

    def _send(self, call: Call[T]) -> T:
        if call.upload is None:
            return self._read(call)
        with closing(call.upload.open()):
            return self._read(call)

    def _read(self, call: Call[T]) -> T:
        response = self._open(call)
        try:
            with translated():
                response.read()
        finally:
            response.close()
        return call.parse(response)

    def _open(self, call: Call[Any]) -> httpx.Response:
        """An answer whose body is still to be read; retries what may be retried."""
        attempt = 0
        while True:
            try:
                return self._attempt(call)
            except PrefixdError as error:
                delay = self._retry.delay(error, attempt, call.method)
                if delay is None:
                    raise
            sleep(delay)
            attempt += 1

    def _attempt(self, call: Call[Any]) -> httpx.Response:
        with translated():
            response = self._http.send(call.request(self._http), stream=True)
            if not failure(response, call):
                return response
            try:
                response.read()
            finally:
                response.close()
        raise api_error(response)
