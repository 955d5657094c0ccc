"""Doubles with real parts: the disk store with faults to switch on, a pool of numpy arrays, an
executor whose jobs the test runs by hand."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np

from prefixd_server.config import CacheConfig
from prefixd_server.kv.allocator import PageAllocator
from prefixd_server.prefix import Blocked, Lease, Residency
from prefixd_server.types import PrefixState, PrefixVersion
from prefixd_store.arrays import PrefixArray
from prefixd_store.disk import DiskStore
from prefixd_store.errors import PrefixdError, StoreUnavailable
from prefixd_store.format import read_manifest, write_prefix
from prefixd_store.geometry import Geometry
from prefixd_store.records import Event, TaskRecord, VersionRecord

TENANT = "default"
GEOMETRY = Geometry(num_layers=2, num_kv_heads=1, head_dim=4)


class FaultyStore(DiskStore):
    """A disk store whose loads can be held up or fail, and that can be down altogether."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: Counter[str] = Counter()
        self.gates: dict[str, threading.Event] = {}
        self.errors: dict[str, PrefixdError] = {}
        self.down = False

    def read_blob(
        self, tenant: str, sha256: str, *, progress: Callable[[int], None] | None = None
    ) -> memoryview:
        self.reads[sha256] += 1
        if sha256 in self.gates:
            self.gates[sha256].wait()
        self._check_up()
        if sha256 in self.errors:
            raise self.errors[sha256]
        return super().read_blob(tenant, sha256, progress=progress)

    def get_task(self, tenant: str, task: str) -> TaskRecord:
        self._check_up()
        return super().get_task(tenant, task)

    def all_tasks(self) -> list[TaskRecord]:
        self._check_up()
        return super().all_tasks()

    def events(self, after: str | None, *, timeout: float) -> list[Event]:
        self._check_up()
        return super().events(after, timeout=timeout)

    def _check_up(self) -> None:
        if self.down:
            raise StoreUnavailable("switched off by the test")


class ArrayPool:
    """Key and value rows [L, H_kv, num_slots, D]; what was never written is NaN."""

    def __init__(self, allocator: PageAllocator, geometry: Geometry = GEOMETRY) -> None:
        self.page_size = allocator.page_size
        slots = allocator.num_pages * allocator.page_size
        shape = (geometry.num_layers, geometry.num_kv_heads, slots, geometry.head_dim)
        self.key = np.full(shape, np.nan, np.float32)
        self.value = np.full(shape, np.nan, np.float32)
        self.error: Exception | None = None

    def write_prefix(
        self, pages: Sequence[int], key: np.ndarray, value: np.ndarray, dtype: str
    ) -> None:
        if self.error is not None:
            raise self.error
        slots = self.slots(pages, key.shape[2])
        self.key[:, :, slots] = PrefixArray(key, dtype).to_float32()
        self.value[:, :, slots] = PrefixArray(value, dtype).to_float32()

    def slots(self, pages: Sequence[int], num_tokens: int) -> list[int]:
        size = self.page_size
        return [page * size + i for page in pages for i in range(size)][:num_tokens]


class HandExecutor(Executor):
    """Jobs run when, and in which order, the test says."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.jobs.append(lambda: fn(*args, **kwargs))
        return Future()

    def run(self, index: int = 0) -> None:
        self.jobs.pop(index)()

    def run_all(self) -> None:
        while self.jobs:
            self.run()


class CountingObserver:
    def __init__(self) -> None:
        self.hits: Counter[str] = Counter()
        self.loads: Counter[str] = Counter()
        self.evictions: Counter[str] = Counter()

    def hit(self, tier: str) -> None:
        self.hits[tier] += 1

    def load_seconds(self, tier: str, seconds: float) -> None:
        assert seconds >= 0
        self.loads[tier] += 1

    def eviction(self, tier: str) -> None:
        self.evictions[tier] += 1


def tensors(num_tokens: int, seed: int, dtype: str = "float32") -> dict[str, PrefixArray]:
    """``decoder.key`` and ``decoder.value``, [L, H_kv, P, D] of GEOMETRY, drawn from ``seed``."""
    rng = np.random.default_rng(seed)
    shape = (GEOMETRY.num_layers, GEOMETRY.num_kv_heads, num_tokens, GEOMETRY.head_dim)
    return {
        f"decoder.{part}": PrefixArray.of(rng.normal(size=shape).astype(np.float32)).cast(dtype)
        for part in ("key", "value")
    }


def write_blob(folder: Path, num_tokens: int, seed: int, **options: Any) -> VersionRecord:
    """Write a prefix to ``<folder>/<sha256>`` and return its record."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{num_tokens}-{seed}.new"
    dtype = options.pop("dtype", "float32")
    sha256 = write_prefix(
        path, tensors(num_tokens, seed, dtype), query_offset=num_tokens, **options
    )
    record = read_manifest(path).version_record(sha256, path.stat().st_size)
    path.rename(folder / sha256)
    return record


class World:
    """One residency on a faulty store, with its tasks t0, t1, …: one version each."""

    def __init__(
        self,
        root: Path,
        sizes: Sequence[int] = (5, 7, 3),
        *,
        num_pages: int = 8,
        by_hand: bool = True,
        geometry: Geometry = GEOMETRY,
        fingerprint: str | None = None,
        load_timeout_s: float = 30.0,
        **cache: Any,
    ) -> None:
        self.store = FaultyStore(root / "store")
        self.blobs = root / "blobs"
        self.allocator = PageAllocator(num_pages, page_size=4)
        self.pool = ArrayPool(self.allocator)
        self.observer = CountingObserver()
        self.executor = HandExecutor()
        self.woken = threading.Event()
        self.versions = [self.publish(f"t{i}", size, seed=i) for i, size in enumerate(sizes)]
        self.residency = Residency(
            self.store,
            self.allocator,
            self.pool,
            geometry=geometry,
            fingerprint=fingerprint,
            cache=CacheConfig(**{"page_size": 4, **cache}),
            load_timeout_s=load_timeout_s,
            wake=self.woken.set,
            observer=self.observer,
            executor=self.executor if by_hand else None,
        )

    def publish(self, task: str, num_tokens: int, seed: int, **options: Any) -> PrefixVersion:
        record = write_blob(self.blobs, num_tokens, seed, **options)
        put = self.store.put_version(TENANT, task, self.blobs / record.sha256, record)
        return PrefixVersion(
            TENANT, task, put.version.version, record.sha256, num_tokens, num_tokens
        )

    def settle(self) -> None:
        """Run all jobs and take in what they did, until nothing is left to do."""
        self.settle_jobs()
        self.check()

    def settle_jobs(self) -> None:
        self.residency.poll()
        while self.executor.jobs:
            self.executor.run_all()
            self.residency.poll()

    def lease(self, version: PrefixVersion) -> Lease:
        """Pin and lease, running what it takes."""
        self.residency.pin(version)
        self.settle()
        lease = self.residency.acquire(version.key)
        if lease is Blocked.LOADING:
            self.settle()
            lease = self.residency.acquire(version.key)
        assert isinstance(lease, Lease), lease
        return lease

    def release(self, lease: Lease) -> None:
        lease.release()
        self.residency.unpin(lease.key)
        self.check()

    def visit(self, version: PrefixVersion) -> None:
        self.release(self.lease(version))

    def wait_until(self, done: Callable[[], object]) -> None:
        """Poll whenever woken, as the engine does (the test's own time limit ends a hang)."""
        while True:
            self.woken.clear()
            self.residency.poll()
            if done():
                return
            self.woken.wait(0.2)

    def state(self, version: PrefixVersion) -> PrefixState:
        return self.residency.state(version.key)

    def check(self) -> None:
        self.residency.check()
        self.allocator.check(self.residency.owned_pages())

    def assert_holds(self, lease: Lease, seed: int) -> None:
        """The leased pages hold exactly the prefix that ``seed`` drew."""
        expected = tensors(lease.num_tokens, seed)
        slots = self.pool.slots(lease.pages, lease.num_tokens)
        np.testing.assert_array_equal(self.pool.key[:, :, slots], expected["decoder.key"].data)
        np.testing.assert_array_equal(self.pool.value[:, :, slots], expected["decoder.value"].data)
