"""What the HTTP room is given: everything that its routes use, made elsewhere."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, ParamSpec, TypeVar

from fastapi import Depends, Request

from prefixd_server.config import Config
from prefixd_server.errors import StoreUnavailable
from prefixd_server.frontend.service import Frontend
from prefixd_server.http.metrics import Metrics
from prefixd_server.prefix.registry import Registry
from prefixd_server.types import PrefixKey, PrefixState
from prefixd_store.geometry import Geometry
from prefixd_store.records import TaskRecord
from prefixd_store.store import Store

__all__ = ["ModelInfo", "PoolUsage", "Services", "ServicesDep"]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model that is served, as ``/v1/info`` shows it."""

    name: str
    fingerprint: str | None
    architecture: str
    geometry: Geometry
    vocab_size: int
    max_model_len: int
    dtype: str
    device: str


class PoolUsage(NamedTuple):
    page_size: int
    num_pages: int
    free_pages: int


@dataclass
class Services:
    config: Config
    frontend: Frontend
    registry: Registry
    store: Store
    """for the bytes of prefixes; records go through the registry"""
    model: ModelInfo
    residency: Callable[[PrefixKey], PrefixState]
    pool: Callable[[], PoolUsage]
    engine_alive: Callable[[], bool]
    metrics: Metrics
    spool: Path
    """folder for uploads and downloads on their way; each leaves nothing behind"""
    draining: bool = False
    num_open: int = 0
    """HTTP requests in progress, those that watch the server itself left out"""
    running: Counter[tuple[str, str]] = field(default_factory=Counter)
    """requests in flight by (tenant, task)"""
    _store_threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(16, "http-store")
    )
    # Few, so that checking and converting uploads leaves processor time to generation.
    _upload_threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(2, "http-upload")
    )

    async def task(self, tenant: str, name: str) -> TaskRecord:
        """The record: from the registry's mirror, or else from the store. Raises NotFound."""
        record = self.registry.peek(tenant, name)
        return record if record else await self.ask(self.registry.get, tenant, name)

    async def ask(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a store call in a thread. Raises StoreUnavailable after ``store_timeout_s``."""
        limit = self.config.limits.store_timeout_s
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._store_threads, partial(call, *args, **kwargs))
        try:
            return await asyncio.wait_for(future, limit)
        except TimeoutError:
            raise StoreUnavailable(f"the store did not answer within {limit:g} s") from None

    async def work(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run something long (import, publish, export) in one of a few threads, to its end."""
        loop = asyncio.get_running_loop()
        task = partial(call, *args, **kwargs)
        return await loop.run_in_executor(self._upload_threads, task)

    def close(self) -> None:
        self._store_threads.shutdown(wait=False, cancel_futures=True)
        self._upload_threads.shutdown(wait=False, cancel_futures=True)


async def get_services(request: Request) -> Services:
    services: Any = request.app.state.services
    assert isinstance(services, Services)
    return services


ServicesDep = Annotated[Services, Depends(get_services)]
