"""The real server for tests: in this process (:class:`LiveServer`) or in one of its own
(:class:`ServerProcess`).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import uvicorn

from prefixd import Client
from prefixd_server.config import CacheConfig, Config, ModelConfig, StoreConfig
from prefixd_server.http.app import create_app
from prefixd_server.kv.allocator import pages_for
from prefixd_server.models.loader import LoadedModel, load_model
from prefixd_server.wiring import Server
from prefixd_store.store import Store, open_store
from tests.support.redis_server import free_port

__all__ = ["LiveServer", "ServerProcess", "wait_until"]

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
KV_BYTES = 32 << 20
"""of a server's KV pool: thousands of pages of a tiny model"""


def wait_until(condition: Callable[[], Any], timeout: float = 20.0, *, what: str = "") -> None:
    """Wait for something that must come about; the time only bounds how long a failure takes."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited too long for {what or condition}"
        time.sleep(0.01)


@cache
def loaded_model(folder: Path) -> LoadedModel:
    """One copy for every server of this process: the weights are frozen."""
    return load_model(ModelConfig(model=str(folder), device="cpu"))


class LiveServer:
    """A server on a free loopback port, in threads of this process, with all of it in reach.

    ``sections`` are sections of :class:`Config`. Leaving the ``with`` block waits until nothing is
    in flight, asserts that nothing is held, evicts every prefix and asserts that no page is left.
    """

    def __init__(self, model: Path, store: str, **sections: Any) -> None:
        sections.setdefault("cache", CacheConfig(kv_cache_bytes=KV_BYTES))
        config = Config(
            model=ModelConfig(model=str(model), device="cpu"),
            store=StoreConfig(store=store),
            **sections,
        )
        self.died = False
        self.server = Server(config, model=loaded_model(model), on_death=self._note_death)
        self.services = self.server.services
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._http = uvicorn.Server(
            uvicorn.Config(
                create_app(self.services),
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=2,
            )
        )
        self._thread = threading.Thread(
            target=self._http.run, args=([self._listener],), name="uvicorn"
        )

    def __enter__(self) -> Self:
        self.server.start()
        self._thread.start()
        wait_until(lambda: self._http.started, what="uvicorn")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.check_nothing_held()
                self.evict_all()
        finally:
            self._http.should_exit = True
            self._thread.join()
            self.server.close()
        assert self.server.allocator.num_used == 0

    def client(self, **options: Any) -> Client:
        return Client(self.url, **{"timeout": 60.0, "max_retries": 0, **options})

    def open_store(self) -> Store:
        """A handle of its own on the store that the server uses, as another replica has."""
        return open_store(self.server.config.store.store)

    # --- looking inside --------------------------------------------------------------------------
    def on_engine(self, call: Callable[[], T]) -> T:
        """Run ``call`` between two steps, on the engine's own thread."""
        engine: Any = self.server.engine
        result: Future[T] = Future()
        step = engine.step

        def step_after_call() -> bool:
            engine.step = step
            try:
                result.set_result(call())
            except BaseException as error:
                result.set_exception(error)
            ran: bool = step()
            return ran

        engine.step = step_after_call
        self.server.mailbox.wake()
        return result.result(20)

    @property
    def idle(self) -> bool:
        engine, services = self.server.engine, self.services
        return not (engine.has_work or services.num_open or services.frontend.num_inflight)

    def check(self) -> None:
        """Assert every invariant of the engine, whatever it is doing."""
        self.on_engine(self.server.engine.check)

    def check_nothing_held(self) -> None:
        """Wait until no request is in flight; then only prefixes may own pages."""
        wait_until(lambda: self.idle or self.died, what="requests to end")
        assert not self.died, "the engine died"
        self.on_engine(self._check_books)
        assert self.services.running == {}
        assert list(self.services.spool.iterdir()) == []

    def _check_books(self) -> None:
        server = self.server
        server.engine.check()
        of_prefixes = sum(len(pages) for pages in server.residency.owned_pages())
        assert server.allocator.num_used == of_prefixes
        assert server.mailbox.num_waiting == 0

    def evict_all(self) -> None:
        """Take the pages of every prefix, once their loads have ended; then none is in use."""
        pages = self.server.allocator.num_pages
        wait_until(
            lambda: self.on_engine(lambda: self.server.residency.make_room(pages, force=True)),
            what="prefixes to be evicted",
        )
        assert self.server.allocator.num_used == 0

    def count_answers(self, status: int) -> int:
        """HTTP answers of that status so far."""
        counters = self.server.metrics.registry.collect()
        samples = [s for family in counters for s in family.samples]
        return sum(
            int(sample.value)
            for sample in samples
            if sample.name == "prefixd_http_requests_total"
            and sample.labels["status"] == str(status)
        )

    def used_pages(self) -> int:
        return self.server.allocator.num_used

    def prefix_pages(self) -> int:
        """Those that prefixes own, whether requests attend to them or not."""
        return self.on_engine(lambda: sum(map(len, self.server.residency.owned_pages())))

    def pages_for(self, num_tokens: int) -> int:
        return pages_for(num_tokens, self.server.allocator.page_size)

    def _note_death(self) -> None:
        self.died = True


class ServerProcess:
    """``prefixd serve`` with ``options`` (``{"drain_timeout_s": 1}``), in a process of its own."""

    def __init__(
        self, *, env: dict[str, str] | None = None, command: str = "serve", **options: Any
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.options = {"port": self.port, "kv_cache_bytes": KV_BYTES, "threads": 1, **options}
        self.env = env or {}
        self.command = command
        self.stdout = self.stderr = ""
        self._process: subprocess.Popen[str] | None = None
        self._readers: list[threading.Thread] = []

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> Self:
        """Start and wait until it is ready."""
        self.spawn()
        wait_until(lambda: self.is_ready() or not self.running, 60, what="the server to be ready")
        assert self.running, f"the server ended: {self.stderr[-2000:]}"
        return self

    def spawn(self) -> Self:
        assert self._process is None
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFIXD_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "prefixd", self.command, *_flags(self.options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**environment, **self.env},
        )
        self._readers = [
            threading.Thread(target=self._read, args=(name,)) for name in ("stdout", "stderr")
        ]
        for reader in self._readers:
            reader.start()
        return self

    def _read(self, name: str) -> None:
        stream = getattr(self._process, name)
        for line in stream:
            setattr(self, name, getattr(self, name) + line)

    def log(self) -> list[dict[str, Any]]:
        """Its log's lines; call it once the process has ended."""
        return [json.loads(line) for line in self.stderr.splitlines() if line.startswith("{")]

    def levels(self) -> set[str]:
        return {line["level"] for line in self.log()}

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def client(self, **options: Any) -> Client:
        return Client(self.url, **{"timeout": 60.0, "max_retries": 0, **options})

    def terminate(self) -> None:
        """SIGTERM; does not wait."""
        self.send(signal.SIGTERM)

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self, timeout: float = 60.0) -> int:
        """The exit status, once it has ended by itself."""
        assert self._process is not None
        status = self._process.wait(timeout)
        self._forget()
        return status

    def kill(self) -> None:
        """kill -9, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._forget()

    def _forget(self) -> None:
        for reader in self._readers:
            reader.join()
        assert self._process is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._process.stdout.close()
        self._process.stderr.close()
        self._process = None


def _flags(options: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        match value:
            case True:
                flags.append(f"--{flag}")
            case False:
                flags.append(f"--no-{flag}")
            case _:
                flags.append(f"--{flag}={value}")
    return flags
