"""The only thing that the event loop and the engine thread share.

The frontend posts commands from any thread; the engine thread drains them at the start of a step
and hands back one list of outputs at its end. The queue is bounded by the number of sequences that
are waiting, which the engine keeps up to date.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from prefixd_server.errors import Draining, EngineDead, Overloaded
from prefixd_server.types import EngineRequest, Output

__all__ = ["Abort", "Command", "Mailbox", "Submit"]


class Submit(NamedTuple):
    request: EngineRequest


class Abort(NamedTuple):
    request_id: str


Command = Submit | Abort


class Mailbox:
    """``deliver`` is called on the engine thread with each step's outputs; it must not block."""

    def __init__(self, max_queue: int) -> None:
        self.max_queue = max_queue
        self.deliver: Callable[[Sequence[Output]], None] = lambda outputs: None
        self.num_waiting = 0
        """sequences the engine has drained but not yet admitted; set by the engine each step"""
        self._commands: deque[Command] = deque()
        self._num_submitted = 0
        self._woken = False
        self._condition = threading.Condition()
        self._closed: type[Draining] | type[EngineDead] | None = None

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        """Enqueue all or none. Raises Overloaded (queue full), Draining, EngineDead."""
        with self._condition:
            if self._closed is EngineDead:
                raise EngineDead("the engine has stopped")
            if self._closed is Draining:
                raise Draining("the server is shutting down")
            queued = self.num_waiting + self._num_submitted
            if queued + len(requests) > self.max_queue:
                raise Overloaded(
                    f"{queued} sequences are waiting and the queue holds {self.max_queue}"
                )
            self._num_submitted += len(requests)
            self._commands.extend(map(Submit, requests))
            self._condition.notify()

    def abort(self, request_ids: Sequence[str]) -> None:
        """Ask the engine to end requests; unknown and finished ones are ignored."""
        with self._condition:
            self._commands.extend(map(Abort, request_ids))
            self._condition.notify()

    def wake(self) -> None:
        """Make a waiting engine look again (a prefix has loaded)."""
        with self._condition:
            self._woken = True
            self._condition.notify()

    def wait(self, timeout: float | None) -> bool:
        """Block the engine until there is something to drain; False: ``timeout`` passed first."""
        with self._condition:
            return self._condition.wait_for(lambda: bool(self._commands) or self._woken, timeout)

    def drain(self) -> list[Command]:
        """All commands so far, in order."""
        with self._condition:
            self._woken = False
            commands = list(self._commands)
            self._commands.clear()
            self.num_waiting += self._num_submitted
            self._num_submitted = 0
            return commands

    def close(self, reason: type[Draining] | type[EngineDead]) -> None:
        """Refuse new requests from now on."""
        with self._condition:
            self._closed = reason
            self._condition.notify()

    @property
    def closed(self) -> type[Draining] | type[EngineDead] | None:
        return self._closed
