"""The waiters: which requests are with the engine, and who hears of their outputs.

The engine thread hands over one list of outputs a step; the event loop is woken once for it. All
the rest runs on the event loop, so nothing here needs a lock. A request is in flight from
``submit`` until exactly one of: its end, its error, an abort.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from prefixd_server.engine.mailbox import Mailbox
from prefixd_server.errors import DeadlineExceeded, EngineDead, PrefixdError, Unavailable
from prefixd_server.types import EngineRequest, FinishReason, Output

__all__ = ["Flights", "NoObserver", "Observer", "Receiver"]

log = logging.getLogger(__name__)

T = TypeVar("T")


class Receiver(Protocol):
    """Hears of one request; called on the event loop, must not block."""

    def receive(self, output: Output) -> FinishReason | None:
        """Take one output; returns why, once the request has ended well."""

    def fail(self, error: PrefixdError) -> None:
        """The request ended with ``error``; nothing follows."""


class Observer(Protocol):
    """Metrics hooks, called on the event loop. Times are in seconds."""

    def first_token(self, seconds: float) -> None:
        """From arrival to the first token."""

    def inter_token(self, seconds: float, count: int) -> None:
        """So long between two tokens of a sequence, so many times."""

    def finished(
        self,
        reason: FinishReason,
        seconds: float,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        tenant: str,
        task: str | None,
    ) -> None:
        """A sequence left, for whatever reason, ``seconds`` after it arrived."""


class NoObserver:
    def first_token(self, seconds: float) -> None: ...

    def inter_token(self, seconds: float, count: int) -> None: ...

    def finished(
        self,
        reason: FinishReason,
        seconds: float,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        tenant: str,
        task: str | None,
    ) -> None: ...


@dataclass(slots=True)
class _Flight:
    request: EngineRequest
    receiver: Receiver
    timer: asyncio.TimerHandle
    num_tokens: int = 0
    last_token_at: float = 0.0


class Flights:
    def __init__(self, mailbox: Mailbox, observer: Observer, *, grace_s: float) -> None:
        self._mailbox = mailbox
        self._observer = observer
        self._grace_s = grace_s
        self._flights: dict[str, _Flight] = {}
        self._landed = asyncio.Event()
        self._landed.set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._mailbox.deliver = self._deliver

    def __len__(self) -> int:
        return len(self._flights)

    def submit(self, requests: Sequence[EngineRequest], receivers: Sequence[Receiver]) -> None:
        """Hand all requests to the engine, or none. Raises what ``Mailbox.submit`` raises."""
        assert self._loop is not None, "attach() comes first"
        for request, receiver in zip(requests, receivers, strict=True):
            assert request.request_id not in self._flights
            # The engine ends late requests; this is for an engine that no longer answers.
            overdue = max(0.0, request.deadline - time.monotonic()) + self._grace_s
            timer = self._loop.call_later(overdue, self._overdue, request.request_id)
            self._flights[request.request_id] = _Flight(request, receiver, timer)
        self._landed.clear()
        try:
            self._mailbox.submit(requests)
        except PrefixdError:
            for request in requests:
                self._forget(request.request_id)
            raise

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests whose client has left; finished and unknown ones are ignored."""
        ids = [request_id for request_id in request_ids if request_id in self._flights]
        for request_id in ids:
            self._land(request_id, FinishReason.ABORTED)
        if ids:
            self._mailbox.abort(ids)

    def abort_all(self, error: PrefixdError) -> None:
        """End every request now: the engine drops them and their clients get ``error``."""
        self._mailbox.abort(list(self._flights))
        self._fail_all(error)

    def fail_all(self, error: PrefixdError) -> None:
        """The engine has died: every client gets ``error``. From any thread."""
        self._call_on_loop(self._fail_all, error)

    async def join(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight; False if that took longer than ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._landed.wait()
        except TimeoutError:
            return False
        return True

    # --- from the engine -------------------------------------------------------------------------

    def _deliver(self, outputs: Sequence[Output]) -> None:
        self._call_on_loop(self._dispatch, outputs)

    def _call_on_loop(self, call: Callable[[T], None], argument: T) -> None:
        assert self._loop is not None
        # A closed loop means that the server is gone: nobody is left to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, argument)

    def _dispatch(self, outputs: Sequence[Output]) -> None:
        now = time.monotonic()
        ended_early: list[str] = []
        gaps: dict[float, int] = defaultdict(int)  # of all sequences of a step mostly one
        for output in outputs:
            flight = self._flights.get(output.request_id)
            if flight is None:
                continue  # aborted, or ended by a stop string, while this was on its way
            if count := _num_tokens(output):
                self._note_tokens(flight, count, now, gaps)
            if self._receive(flight, output) and output.finish is None:
                ended_early.append(output.request_id)
        for seconds, count in gaps.items():
            self._observer.inter_token(seconds, count)
        if ended_early:
            self._mailbox.abort(ended_early)

    def _receive(self, flight: _Flight, output: Output) -> bool:
        """Returns whether the request is over."""
        try:
            reason = flight.receiver.receive(output)
        except Exception:
            # Our bug; one request must not take the others of this step with it.
            log.exception("an output of request %s could not be used", output.request_id)
            self._fail(output.request_id, PrefixdError("internal error", code="internal_error"))
            return True
        if reason is not None:
            self._land(output.request_id, reason)
        elif output.finish is not None:
            error = output.finish.error or Unavailable("the engine aborted the request")
            self._fail(output.request_id, error)
        return reason is not None or output.finish is not None

    # --- the ways out ----------------------------------------------------------------------------

    def _overdue(self, request_id: str) -> None:
        error: PrefixdError = DeadlineExceeded(
            "the request's deadline passed", param="parameters.timeout_s"
        )
        if self._mailbox.closed is EngineDead:
            error = EngineDead("the engine has stopped")
        self._mailbox.abort([request_id])
        self._fail(request_id, error)

    def _fail_all(self, error: PrefixdError) -> None:
        for request_id in list(self._flights):
            self._fail(request_id, copy.copy(error))  # each is raised on its own

    def _fail(self, request_id: str, error: PrefixdError) -> None:
        self._land(request_id, FinishReason.ERROR).receiver.fail(error)

    def _land(self, request_id: str, reason: FinishReason) -> _Flight:
        flight = self._forget(request_id)
        request = flight.request
        self._observer.finished(
            reason,
            time.monotonic() - request.arrival,
            prompt_tokens=len(request.prompt_token_ids),
            completion_tokens=flight.num_tokens,
            tenant=request.tenant,
            task=request.task,
        )
        return flight

    def _forget(self, request_id: str) -> _Flight:
        flight = self._flights.pop(request_id)
        flight.timer.cancel()
        if not self._flights:
            self._landed.set()
        return flight

    def _note_tokens(self, flight: _Flight, count: int, now: float, gaps: dict[float, int]) -> None:
        if not flight.num_tokens:
            self._observer.first_token(now - flight.request.arrival)
        else:
            gaps[(now - flight.last_token_at) / count] += count
        flight.num_tokens += count
        flight.last_token_at = now


def _num_tokens(output: Output) -> int:
    """A beam search has its tokens in its end."""
    if output.finish is None:
        return len(output.tokens)
    hypotheses = output.finish.hypotheses
    return len(output.tokens) + sum(len(hypothesis.tokens) for hypothesis in hypotheses)
