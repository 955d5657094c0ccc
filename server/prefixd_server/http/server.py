"""Running it: listen, and on a signal drain before leaving.

First SIGTERM or SIGINT: ``/readyz`` says ``draining``, new requests get 503, those in flight have
``drain_timeout_s`` to finish, what is left is ended, exit 0. A second signal: what is left is
ended now. A third: without a word.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import structlog
import uvicorn
from fastapi import FastAPI

from prefixd_server.config import HttpConfig
from prefixd_server.errors import Draining
from prefixd_server.http.services import Services

__all__ = ["bind", "serve"]

_log = structlog.get_logger("prefixd.http")
_POLL_S = 0.05
_LAST_ANSWERS_S = 5
"""how long clients have to take the answers of requests that the end of the drain cut off"""


def bind(config: HttpConfig) -> socket.socket:
    """A listening socket; ``port=0`` picks a free one. Raises OSError: the address is taken."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.create_server((config.host, config.port), family=family, backlog=2048)
    listener.setblocking(False)
    return listener


def serve(
    app: FastAPI,
    services: Services,
    listener: socket.socket,
    *,
    on_drain: Callable[[], None],
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until a signal, then drain; returns when all is answered and closed.

    ``on_drain`` is called once, before the wait: it stops what takes in new work (the mailbox).
    ``on_ready`` is called when requests are taken.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        proxy_headers=False,  # nothing here asks where a request came from
        timeout_graceful_shutdown=_LAST_ANSWERS_S,
    )
    server = _Server(config, services, on_drain, on_ready)
    with contextlib.closing(listener):
        server.run(sockets=[listener])


class _Server(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        services: Services,
        on_drain: Callable[[], None],
        on_ready: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._services = services
        self._on_drain = on_drain
        self._on_ready = on_ready
        self._signalled = asyncio.Event()
        self._hurry = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's own, never raises the signal again at the end: a drain is a success."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        self.force_exit = self._hurry
        if self._signalled.is_set():
            self._hurry = True
            self.config.timeout_graceful_shutdown = 1
        self._signalled.set()

    async def main_loop(self) -> None:
        self._on_ready()
        ticking = asyncio.create_task(self._tick())
        try:
            await self._signalled.wait()
            await self._drain()
        finally:
            self.should_exit = True
            await ticking

    async def _tick(self) -> None:
        counter = 0
        while not await self.on_tick(counter):
            counter += 1
            await asyncio.sleep(0.1)

    async def _drain(self) -> None:
        services = self._services
        services.draining = True
        self._on_drain()
        limit = services.config.http.drain_timeout_s
        _log.info("draining", requests=services.num_open, timeout_s=limit)
        deadline = asyncio.get_running_loop().time() + limit
        while services.num_open and not self._hurry:
            if asyncio.get_running_loop().time() >= deadline:
                _log.warning("drain timed out", requests=services.num_open)
                break
            await asyncio.sleep(_POLL_S)
        services.frontend.abort_all(Draining("the server is shutting down"))
