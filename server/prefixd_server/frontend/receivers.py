"""Who hears of a request: a stream, a whole completion, a compiled prefix."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Self

from prefixd_server.errors import PrefixdError
from prefixd_server.frontend.calls import Chunk, Completion
from prefixd_server.frontend.sequence import SequenceText
from prefixd_server.types import (
    CompileOutput,
    Finish,
    FinishReason,
    Hypothesis,
    Output,
    Started,
)

__all__ = ["Compiled", "Found", "Stream", "Whole"]


class Stream:
    """The chunks of one request, one a token; the last one carries the completion.

    Iterating raises what the request ended with, if it failed. Leaving early, by ``aclose()``, the
    ``async with`` block or cancellation of a pending ``__anext__``, aborts the request at once. A
    slow reader holds back nobody: its chunks wait here, at most ``max_new_tokens`` of them.
    """

    def __init__(self, text: SequenceText, abort: Callable[[], None]) -> None:
        self._text = text
        self._abort = abort
        self._chunks: deque[Chunk] = deque()
        self._error: PrefixdError | None = None
        self._ended = False
        self._reader: asyncio.Future[None] | None = None
        """of the task that waits for news"""

    def receive(self, output: Output) -> FinishReason | None:
        self._chunks.extend(self._text.feed(output))
        completion = self._text.completion
        self._ended = completion is not None
        self._wake()
        return completion.finish_reason if completion else None

    def fail(self, error: PrefixdError) -> None:
        self._error = error
        self._ended = True
        self._wake()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        while not self._chunks:
            if self._ended:
                raise self._take_error() or StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            except asyncio.CancelledError:
                self._close()
                raise
        return self._chunks.popleft()

    def ready(self, most: int) -> list[Chunk]:
        """Takes the next chunks, at most so many, that are here by now; often none. Never waits."""
        if not self._chunks:
            return []
        return [self._chunks.popleft() for _ in range(min(most, len(self._chunks)))]

    async def aclose(self) -> None:
        """Abort the request if it is still running. Any number of times."""
        self._close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._abort()
        self._chunks.clear()
        self._error = None
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _take_error(self) -> PrefixdError | None:
        error, self._error = self._error, None
        return error


class Whole:
    """One sequence of a call that is answered when complete: its task wakes once, at the end."""

    def __init__(self, text: SequenceText, future: asyncio.Future[Completion]) -> None:
        self._text = text
        self._future = future

    def receive(self, output: Output) -> FinishReason | None:
        self._text.feed(output)
        completion = self._text.completion
        if completion is None:
            return None
        if not self._future.done():
            self._future.set_result(completion)
        return completion.finish_reason

    def fail(self, error: PrefixdError) -> None:
        if not self._future.done():
            self._future.set_exception(error)


class Found:
    """The hypotheses of a beam search, each a completion; all come at its end.

    ``new_text`` gives each hypothesis a text of its own.
    """

    def __init__(
        self, new_text: Callable[[], SequenceText], future: asyncio.Future[list[Completion]]
    ) -> None:
        self._new_text = new_text
        self._future = future
        self._started: Started | None = None

    def receive(self, output: Output) -> FinishReason | None:
        self._started = output.started or self._started
        if output.finish is None or not output.finish.hypotheses:
            return None
        if not self._future.done():
            found = [self._completion(output.request_id, h) for h in output.finish.hypotheses]
            self._future.set_result(found)
        return output.finish.reason

    def fail(self, error: PrefixdError) -> None:
        if not self._future.done():
            self._future.set_exception(error)

    def _completion(self, request_id: str, found: Hypothesis) -> Completion:
        text = self._new_text()
        text.feed(Output(request_id, self._started, found.tokens, Finish(found.reason)))
        assert text.completion is not None
        return replace(text.completion, score=found.score)


class Compiled:
    """The KV of a text."""

    def __init__(self, future: asyncio.Future[CompileOutput]) -> None:
        self._future = future

    def receive(self, output: Output) -> FinishReason | None:
        if output.finish is None or output.finish.compiled is None:
            return None
        if not self._future.done():
            self._future.set_result(output.finish.compiled)
        return output.finish.reason

    def fail(self, error: PrefixdError) -> None:
        if not self._future.done():
            self._future.set_exception(error)
