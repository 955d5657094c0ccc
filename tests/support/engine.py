"""The real server without HTTP and without its thread: tests step the engine by hand."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal

from prefixd_server.config import CacheConfig, Config, ModelConfig, SchedulerConfig, StoreConfig
from prefixd_server.kv.pool import KVPool
from prefixd_server.models.loader import LoadedModel
from prefixd_server.types import EngineRequest, Finish, Output, SamplingParams, Started, Token
from prefixd_server.wiring import Server
from prefixd_store.importers import import_checkpoint
from prefixd_store.records import DEFAULT_TENANT

__all__ = ["EngineRun", "Result", "request"]

_STUCK_S = 120.0


@dataclass
class Result:
    """All that one request got."""

    tokens: list[Token] = field(default_factory=list)
    started: Started | None = None
    finishes: list[Finish] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def finish(self) -> Finish:
        assert len(self.finishes) == 1, self.finishes
        return self.finishes[0]


def request(
    request_id: str, task: str | None, prompt: Sequence[int], **sampling: object
) -> EngineRequest:
    params = SamplingParams(**sampling)  # type: ignore[arg-type]
    now = time.monotonic()
    return EngineRequest(
        request_id, DEFAULT_TENANT, task, None, tuple(prompt), params, now + 600, arrival=now
    )


class EngineRun:
    """A context manager; on leaving it, asserts that nothing but resident prefixes holds pages."""

    def __init__(
        self,
        model: LoadedModel,
        store: Path,
        *,
        num_pages: int = 2000,
        page_size: int = 16,
        max_num_seqs: int = 128,
        max_num_batched_tokens: int = 512,
        attention: Literal["auto", "native", "triton", "sdpa"] = "auto",
        cuda_graphs: bool = True,
        prompt_cache: bool = True,
    ) -> None:
        geometry = model.geometry
        page = KVPool.bytes_per_page(
            geometry.num_kv_layers,
            geometry.num_kv_heads,
            geometry.head_dim,
            page_size,
            model.dtype,
        )
        config = Config(
            model=ModelConfig(attention=attention, cuda_graphs=cuda_graphs),
            store=StoreConfig(store=str(store)),
            cache=CacheConfig(
                kv_cache_bytes=num_pages * page, page_size=page_size, prompt_cache=prompt_cache
            ),
            scheduler=SchedulerConfig(
                max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
            ),
        )
        self.server = Server(config, model=model)
        self.engine = self.server.engine
        self.allocator = self.server.allocator
        self.results: dict[str, Result] = defaultdict(Result)
        self.server.mailbox.deliver = self._deliver
        self.server.registry.start()

    def __enter__(self) -> EngineRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.engine.check()
            assert not self.engine.has_work
            held = sum(len(pages) for pages in self.server.residency.owned_pages())
            assert self.allocator.num_used == held
            assert self.server.residency.make_room(self.allocator.num_pages, force=True)
            assert self.allocator.num_used == 0, "a page is leaked"
        self.server.residency.close()
        self.server.close()

    def _deliver(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            result = self.results[output.request_id]
            assert not result.finishes, f"{output.request_id} went on after its end"
            if output.started is not None:
                assert result.started is None
                result.started = output.started
            result.tokens += output.tokens
            if output.finish is not None:
                result.finishes.append(output.finish)

    def publish(self, task: str, checkpoint: Path, scratch: Path) -> None:
        """Import a checkpoint folder and upload it as a version of ``task``."""
        files = {path.name: path for path in checkpoint.iterdir() if path.is_file()}
        blob = scratch / f"{task}.safetensors"
        found = import_checkpoint(files, blob, geometry=self.server.model.geometry)
        version = found.manifest.version_record(found.sha256, found.bytes)
        self.server.registry.publish(DEFAULT_TENANT, task, blob, version)

    def submit(self, requests: Iterable[EngineRequest]) -> None:
        self.server.mailbox.submit(list(requests))

    def step(self) -> bool:
        ran = self.engine.step()
        self.engine.check()
        return ran

    def run(self) -> None:
        """Step until nothing is left to do."""
        last = time.monotonic()
        self.step()
        while self.engine.has_work:
            if self.step():
                last = time.monotonic()
            else:
                self.server.mailbox.wait(0.01)
            assert time.monotonic() - last < _STUCK_S, "the engine makes no progress"
