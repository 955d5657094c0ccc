"""prefixd's engine, fed through its mailbox: no HTTP, no text. Speaks ``peer.serve``'s lines.

Takes the flags of ``prefixd serve``, and ``--ungrouped``: a prefix is read again for each sequence
of a step. Its tasks are ``task-0``, ``task-1`` … of the store. Beside
the tokens it reports the most KV memory that a run held, and what it keeps for prefixes.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence

import peer  # isort: skip

import typer
from engine_flags import UNGROUPED
from prompts import prompts

from prefixd_server.attention.native import NativeBackend
from prefixd_server.cli import freeze_heap, load_config, register
from prefixd_server.config import Config
from prefixd_server.kv.pool import KVPool
from prefixd_server.types import EngineRequest, Output, SamplingParams
from prefixd_server.wiring import Server


class Engine:
    def __init__(self, config: Config) -> None:
        self.server = Server(config)
        self.server.mailbox.deliver = self._deliver
        self._tokens: dict[str, list[int]] = {}
        self._unfinished: set[str] = set()
        self._error: Exception | None = None
        self._done = threading.Event()
        self._most_pages = 0
        self._runs = 0

    def run(self, requests: int, new_tokens: int, tasks: int) -> peer.TokenIds:
        """Submit all at once and wait for the last output."""
        self._runs += 1
        work = [
            self._request(f"{self._runs}-{number}", prompt, number, new_tokens, tasks)
            for number, prompt in enumerate(prompts(requests))
        ]
        self._tokens = {request.request_id: [] for request in work}
        self._unfinished = set(self._tokens)
        self._most_pages = 0
        self._done.clear()
        self.server.mailbox.submit(work)
        self._done.wait()
        if self._error is not None:
            raise self._error
        return list(self._tokens.values())

    def memory(self) -> dict[str, int]:
        """Bytes of KV memory: the most that the last run held, and what its prefixes keep."""
        allocator, geometry = self.server.allocator, self.server.model.geometry
        page = KVPool.bytes_per_page(
            geometry.num_kv_layers,
            geometry.num_kv_heads,
            geometry.head_dim,
            allocator.page_size,
            self.server.model.dtype,
        )
        return {
            "kv_peak_bytes": self._most_pages * page,
            "kv_prefix_bytes": sum(map(len, self.server.residency.owned_pages())) * page,
        }

    def _request(
        self, name: str, prompt: str, number: int, new_tokens: int, tasks: int
    ) -> EngineRequest:
        return EngineRequest(
            request_id=name,
            tenant="default",
            task=f"task-{number % tasks}" if tasks else None,
            version=None,
            prompt_token_ids=tuple(self.server.model.tokenizer(prompt)["input_ids"]),
            sampling=SamplingParams(max_new_tokens=new_tokens, ignore_eos=True),
            deadline=time.monotonic() + 600,
            arrival=time.monotonic(),
        )

    def _deliver(self, outputs: Sequence[Output]) -> None:
        self._most_pages = max(self._most_pages, self.server.allocator.num_used)
        for output in outputs:
            self._tokens[output.request_id] += [token.id for token in output.tokens]
            if output.finish is not None:
                self._unfinished.discard(output.request_id)
                self._error = self._error or output.finish.error
        if not self._unfinished:
            self._done.set()


def config_of(flags: Sequence[str]) -> Config:
    """What ``prefixd serve`` makes of the same flags."""
    app = typer.Typer()
    register(app)
    command = typer.main.get_group(app).commands["serve"]
    options = command.make_context("serve", list(flags)).params
    return load_config(options.pop("config_file"), options)


def main() -> None:
    engine = Engine(config_of([flag for flag in sys.argv[1:] if flag != UNGROUPED]))
    if UNGROUPED in sys.argv:
        backend = engine.server.engine.runner.backend
        assert isinstance(backend, NativeBackend)
        backend.grouped = False
    engine.server.start()
    freeze_heap()
    try:
        settings = {"attention": engine.server.config.model.attention}
        peer.serve(engine.run, peer.versions("prefixd", "torch") | settings, engine.memory)
    finally:
        engine.server.close()


if __name__ == "__main__":
    main()
