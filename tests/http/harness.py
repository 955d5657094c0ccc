"""The real application on a real socket, with the registry, store, mailbox and frontend that serve.

Only the model is missing: an engine thread that repeats the prompt's tokens is in its place.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import uvicorn
from fastapi import FastAPI

from prefixd_server.config import Config
from prefixd_server.engine.mailbox import Mailbox, Submit
from prefixd_server.errors import Draining, EngineDead, PrefixdError
from prefixd_server.frontend.service import Frontend
from prefixd_server.frontend.text import TextCodec
from prefixd_server.http.app import create_app
from prefixd_server.http.metrics import EngineGauges, Metrics, PromptCacheUsage
from prefixd_server.http.services import ModelInfo, PoolUsage, Services
from prefixd_server.prefix.registry import Registry
from prefixd_server.types import (
    CompileOutput,
    EngineRequest,
    Finish,
    FinishReason,
    Hypothesis,
    Output,
    PrefixState,
    Started,
    Token,
)
from prefixd_store.arrays import PrefixArray
from prefixd_store.disk import DiskStore
from prefixd_store.format import write_prefix
from prefixd_store.geometry import Geometry
from tests.frontend.tokenizers_ import byte_level

GEOMETRY = Geometry(num_layers=3, num_kv_heads=2, head_dim=16, max_positions=512)
FINGERPRINT = "fingerprint-of-the-test-model"
MAX_MODEL_LEN = 512


class EchoEngine:
    """Answers with the prompt's own tokens, around and around, one a step.

    ``hold()`` lets it emit so many tokens of each sequence and no more until ``release()``.
    ``burst`` is how many steps' outputs it delivers at once, as to a loop that has fallen behind.
    ``fail_with`` ends the next sequences with an error, after ``fail_after`` tokens.
    """

    def __init__(self, mailbox: Mailbox, registry: Registry) -> None:
        self.mailbox = mailbox
        self.registry = registry
        self.running: dict[str, EngineRequest] = {}
        self.aborted: list[str] = []
        self.requests: list[EngineRequest] = []
        self.fail_with: PrefixdError | None = None
        self.fail_after = 0
        self.burst = 1
        self._emitted: dict[str, int] = {}
        self._allowed: int | None = None
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._run, name="echo-engine", daemon=True)

    def hold(self, tokens: int) -> None:
        self._allowed = tokens

    def release(self) -> None:
        self._allowed = None
        self.mailbox.wake()

    def close(self) -> None:
        self._stop.set()
        self.mailbox.wake()
        self.thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            outputs: list[Output] = []
            self.mailbox.wait(0.001 if self.running else None)
            for command in self.mailbox.drain():
                if isinstance(command, Submit):
                    outputs += self._admit(command.request)
                elif self.running.pop(command.request_id, None):
                    self.aborted.append(command.request_id)
            self.mailbox.num_waiting = 0
            for _ in range(self.burst):
                for request in list(self.running.values()):
                    outputs += self._step(request)
            if outputs:
                self.mailbox.deliver(outputs)

    def _admit(self, request: EngineRequest) -> list[Output]:
        self.requests.append(request)
        if request.capture_kv:
            compiled = Finish(
                FinishReason.LENGTH, compiled=_compiled(len(request.prompt_token_ids))
            )
            return [Output(request.request_id, finish=compiled)]
        try:
            version, prefix_tokens = self._resolve(request)
        except PrefixdError as error:
            return [Output(request.request_id, finish=Finish(FinishReason.ERROR, error))]
        self.running[request.request_id] = request
        self._emitted[request.request_id] = 0
        logprobs = tuple(-1.0 for _ in request.prompt_token_ids[1:])
        started = Started(
            version,
            prefix_tokens,
            request.prompt_token_ids,
            logprobs if request.sampling.prompt_logprobs else (),
        )
        return [Output(request.request_id, started=started)]

    def _resolve(self, request: EngineRequest) -> tuple[int | None, int]:
        if request.task is None:
            return None, 0
        found = self.registry.resolve(request.tenant, request.task, request.version, 0.0)
        return found.version, found.num_virtual_tokens

    def _step(self, request: EngineRequest) -> list[Output]:
        if request.sampling.beams is not None:
            del self.running[request.request_id]
            return [Output(request.request_id, finish=_found(request))]
        done = self._emitted[request.request_id]
        if self.fail_with is not None and done >= self.fail_after:
            del self.running[request.request_id]
            return [Output(request.request_id, finish=Finish(FinishReason.ERROR, self.fail_with))]
        if self._allowed is not None and done >= self._allowed:
            return []
        self._emitted[request.request_id] = done + 1
        token = request.prompt_token_ids[done % len(request.prompt_token_ids)]
        top = tuple((token, -0.5) for _ in range(request.sampling.top_n_tokens))
        finish = None
        if done + 1 == request.sampling.max_new_tokens:
            finish = Finish(FinishReason.LENGTH)
            del self.running[request.request_id]
        return [Output(request.request_id, tokens=(Token(token, -0.5, top),), finish=finish)]


def _found(request: EngineRequest) -> Finish:
    """Hypothesis i is the prompt's tokens from the i-th on."""
    assert request.sampling.beams is not None
    tokens = [Token(id_, -0.5) for id_ in request.prompt_token_ids]
    stop = request.sampling.max_new_tokens
    found = [
        Hypothesis(tuple(tokens[i : i + stop]), -0.5 - i, FinishReason.LENGTH)
        for i in range(request.sampling.beams.n)
    ]
    return Finish(FinishReason.LENGTH, hypotheses=tuple(found))


def _compiled(tokens: int) -> CompileOutput:
    g = GEOMETRY
    shape = (g.num_layers, g.num_kv_heads, tokens, g.head_dim)
    values = np.arange(np.prod(shape), dtype="<f4").tobytes()
    return CompileOutput(shape, "float32", values, values)


@dataclass
class Stack:
    """One server's parts, for tests to look into."""

    app: FastAPI
    services: Services
    engine: EchoEngine
    mailbox: Mailbox
    store: DiskStore

    @property
    def spooled(self) -> list[str]:
        spool = self.services.spool
        return sorted(path.name for path in spool.iterdir()) if spool.exists() else []


@contextmanager
def stack(root: Path, config: Config | None = None) -> Iterator[Stack]:
    config = config or Config()
    codec = TextCodec(byte_level())
    store = DiskStore(root / "store")
    registry = Registry(store, config.limits, poll_s=0.1)
    mailbox = Mailbox(config.scheduler.max_queue)
    metrics = Metrics("tiny", max_tasks=config.http.metrics_max_tasks)
    frontend = Frontend(mailbox, codec, max_model_len=MAX_MODEL_LEN, observer=metrics)
    engine = EchoEngine(mailbox, registry)
    metrics.bind_engine(
        lambda: EngineGauges(
            running=len(engine.running),
            waiting=0,
            kv_cache_usage=0.25,
            preemptions=0,
            resident={"device": 1, "host": 2},
            resident_bytes={"device": 100, "host": 200},
            loads={"queued": 0, "fetching": 0, "copying": 0},
            tasks=1,
            prompt_cache=PromptCacheUsage(queries=30, hits=20, pages=5, evictions=1),
        )
    )
    registry.on_change(metrics.task_changed)
    model = ModelInfo(
        name="tiny",
        fingerprint=FINGERPRINT,
        architecture="LlamaForCausalLM",
        geometry=GEOMETRY,
        vocab_size=codec.vocab_size,
        max_model_len=MAX_MODEL_LEN,
        dtype="float32",
        device="cpu",
    )
    services = Services(
        config=config,
        frontend=frontend,
        registry=registry,
        store=store,
        model=model,
        residency=lambda key: PrefixState.STORED,
        pool=lambda: PoolUsage(16, 100, 75),
        engine_alive=lambda: mailbox.closed is not EngineDead,
        metrics=metrics,
        spool=root / "spool",
    )
    registry.start()
    engine.thread.start()
    try:
        yield Stack(create_app(services), services, engine, mailbox, store)
    finally:
        engine.close()
        frontend.close()
        registry.close()
        store.close()


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """Serve ``app`` from a thread; its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), name="uvicorn")
    thread.start()
    try:
        wait_until(lambda: server.started)
        host, port = listener.getsockname()
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()


def wait_until(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def prefix_file(
    folder: Path, *, tokens: int = 5, shift: float = 0.0, fingerprint: str | None = FINGERPRINT
) -> bytes:
    """Our file, of the test model's geometry; ``shift`` makes another of the same shape."""
    g = GEOMETRY
    values = np.arange(g.num_layers * g.num_kv_heads * tokens * g.head_dim, dtype=np.float32)
    shape = (g.num_layers, g.num_kv_heads, tokens, g.head_dim)
    arrays = {
        name: PrefixArray.of(values.reshape(shape) + shift)
        for name in ("decoder.key", "decoder.value")
    }
    path = folder / "prefix.safetensors"
    write_prefix(path, arrays, query_offset=tokens, base_fingerprint=fingerprint, base_model="tiny")
    content = path.read_bytes()
    path.unlink()
    return content


def drain(stack: Stack) -> None:
    """What a server does on SIGTERM before it waits."""
    stack.services.draining = True
    stack.mailbox.close(Draining)
