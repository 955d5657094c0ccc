"""Stand-ins for the engine on the far side of a real mailbox: one played by hand, one a thread."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

from prefixd_server.engine.mailbox import Abort, Mailbox, Submit
from prefixd_server.errors import DeadlineExceeded
from prefixd_server.types import EngineRequest, Finish, FinishReason, Output, Started, Token


def started(request: EngineRequest, **changes: Any) -> Started:
    fields: dict[str, Any] = {
        "version": 3,
        "prefix_tokens": 20,
        "prompt_token_ids": request.prompt_token_ids,
    }
    return Started(**fields | changes)


class HandEngine:
    """The test is the engine: it looks into the mailbox and says what to deliver."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self.requests: list[EngineRequest] = []
        self.aborted: list[str] = []

    def look(self) -> None:
        for command in self._mailbox.drain():
            match command:
                case Submit(request):
                    self.requests.append(request)
                case Abort(request_id):
                    self.aborted.append(request_id)

    async def request(self, index: int = 0) -> EngineRequest:
        """The ``index``-th request, as soon as it has been submitted."""
        while len(self.requests) <= index:
            self.look()
            await asyncio.sleep(0)
        return self.requests[index]

    async def deliver(self, *outputs: Output) -> None:
        """One step's outputs; returns when the event loop has dispatched them."""
        self._mailbox.deliver(outputs)
        await asyncio.sleep(0)
        self.look()


Script = Callable[[EngineRequest], Iterator[Token]]


class ScriptedEngine:
    """A thread that runs all requests at once, a token a step, as their script says.

    A script that ends, ends its request with EOS at its last token; ``max_new_tokens`` with LENGTH.
    """

    def __init__(self, mailbox: Mailbox, script: Script) -> None:
        self._mailbox = mailbox
        self._script = script
        self._running: dict[str, tuple[EngineRequest, Iterator[tuple[Token, bool]]]] = {}
        self._counts: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._main, name="scripted-engine")
        self.most_at_once = 0
        self.aborted: set[str] = set()

    def __enter__(self) -> ScriptedEngine:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._mailbox.wake()
        self._thread.join()

    @property
    def num_running(self) -> int:
        return len(self._running)

    def _main(self) -> None:
        while not self._stop.is_set():
            self._mailbox.wait(0.0005 if self._running else None)
            outputs = self._receive()
            self.most_at_once = max(self.most_at_once, len(self._running))
            outputs += [self._step(*running) for running in list(self._running.values())]
            if outputs:
                self._mailbox.deliver(outputs)

    def _receive(self) -> list[Output]:
        outputs = []
        for command in self._mailbox.drain():
            match command:
                case Submit(request):
                    script = with_last(self._script(request))
                    self._running[request.request_id] = (request, script)
                    self._counts[request.request_id] = 0
                case Abort(request_id) if self._running.pop(request_id, None):
                    self.aborted.add(request_id)
                    outputs.append(Output(request_id, finish=Finish(FinishReason.ABORTED)))
        self._mailbox.num_waiting = 0
        return outputs

    def _step(self, request: EngineRequest, script: Iterator[tuple[Token, bool]]) -> Output:
        request_id = request.request_id
        try:
            token, is_last = next(script)
        except DeadlineExceeded as error:
            del self._running[request_id]
            return Output(request_id, finish=Finish(FinishReason.ERROR, error))
        count = self._counts[request_id] = self._counts[request_id] + 1
        finish = None
        if is_last or count == request.sampling.max_new_tokens:
            finish = Finish(FinishReason.EOS if is_last else FinishReason.LENGTH)
            del self._running[request_id]
        return Output(request_id, started(request) if count == 1 else None, (token,), finish)


def with_last(tokens: Iterator[Token]) -> Iterator[tuple[Token, bool]]:
    """Each token and whether it is the last."""
    for token, following in itertools.pairwise(itertools.chain(tokens, [None])):
        yield token, following is None
