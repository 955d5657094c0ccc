"""Ten thousand tasks: what is counted grows with what changes, not with what there is."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefixd_server.config import CacheConfig, LimitsConfig
from prefixd_server.kv.allocator import PageAllocator
from prefixd_server.prefix import Registry, Residency
from prefixd_server.prefix.device_tier import DeviceTier
from prefixd_server.prefix.entry import Entry
from prefixd_server.prefix.lifecycle import LifeEvent
from prefixd_server.types import PrefixKey, PrefixVersion
from prefixd_store import disk_files
from prefixd_store.mutations import encode
from prefixd_store.records import TaskRecord
from prefixd_store.redis_store import RedisStore
from prefixd_store.store import open_store
from tests.prefix.support import GEOMETRY, TENANT, ArrayPool, HandExecutor, World, write_blob
from tests.support.redis_server import RedisServer, running_redis

NUM_TASKS = 10_000


def names() -> Iterator[str]:
    return (f"task-{i:05}" for i in range(NUM_TASKS))


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


class CountedRedis:
    """A client of redis-py that counts the commands it sends."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.sent: Counter[str] = Counter()
        execute = client.execute_command

        def counted(*args: Any, **options: Any) -> Any:
            self.sent[str(args[0])] += 1
            return execute(*args, **options)

        client.execute_command = counted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def taken(self) -> Counter[str]:
        sent, self.sent = self.sent, Counter()
        return sent


def filled_redis(server: RedisServer, tmp_path: Path) -> tuple[RedisStore, CountedRedis]:
    """A store of NUM_TASKS tasks that all name one prefix, put in by pipeline."""
    namespace = f"test-{uuid.uuid4().hex}"
    client = CountedRedis(server.client())
    store = RedisStore(client, namespace=namespace)
    record = write_blob(tmp_path / "blobs", 5, seed=0)
    blob = tmp_path / "blobs" / record.sha256
    first = store.put_version(TENANT, "task-00000", blob, record).task
    pipeline = server.client().pipeline(transaction=False)
    for name in names():
        task = first.model_copy(update={"name": name})
        pipeline.hset(f"{{{namespace}}}:tasks", f"{TENANT}:{name}", encode(task))
        pipeline.zadd(f"{{{namespace}}}:index", {f"{TENANT}:{name}": 0})
    pipeline.execute()
    client.taken()
    return store, client


def test_redis_commands_of_a_start_a_change_and_a_load(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    store, client = filled_redis(redis_server, tmp_path)
    registry = Registry(store, LimitsConfig(), poll_s=60)
    registry._feed._step()  # the start, without the thread that would go on sending
    assert registry.num_tasks == NUM_TASKS
    start = client.taken()
    assert sum(start.values()) <= 3 + NUM_TASKS // 500, start

    changes: list[TaskRecord | None] = []
    registry.on_change(lambda old, new: changes.append(new) if old else None)
    registry.activate(TENANT, "task-05000", {1: 1.0})
    assert client.taken() == {"HGET": 1, "EVAL": 1}
    assert len(changes) == 1

    version = registry.resolve(TENANT, "task-09999", None, 0.5)
    assert registry.list(TENANT, limit=100).tasks[99].name == "task-00099"
    assert client.taken() == {}
    store.read_blob(TENANT, version.sha256)
    assert client.taken() == {"HGET": 1, "GET": 1}


def test_a_change_elsewhere_costs_a_replica_what_changed(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    store, client = filled_redis(redis_server, tmp_path)
    registry = Registry(store, LimitsConfig(), poll_s=60)
    registry._feed._step()
    for _ in range(3):
        store.activate(TENANT, "task-00007", {1: 1.0})
    store.activate(TENANT, "task-00008", {1: 1.0})
    client.taken()
    registry._feed._step()
    assert client.taken() == {"GET": 1, "XREAD": 1, "HGET": 2}
    assert registry.get(TENANT, "task-00007").revision == 4


def test_a_load_from_disk_is_one_read_of_each_byte_and_is_checked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path / "store"))
    record = write_blob(tmp_path / "blobs", 50, seed=1)
    store.put_version(TENANT, "a", tmp_path / "blobs" / record.sha256, record)
    hashed: list[int] = []
    sha256 = disk_files.hashlib.sha256

    class Counted:
        def __init__(self) -> None:
            self._digest = sha256()

        def update(self, data: memoryview) -> None:
            hashed.append(len(data))
            self._digest.update(data)

        def hexdigest(self) -> str:
            return self._digest.hexdigest()

    monkeypatch.setattr(disk_files.hashlib, "sha256", Counted)
    pieces: list[int] = []
    store.read_blob(TENANT, record.sha256, progress=pieces.append)
    assert hashed == pieces == [record.bytes]


def test_an_eviction_looks_at_its_victims_only() -> None:
    """Ten thousand resident prefixes of a page each, every tenth leased, every ninth pinned."""
    allocator = PageAllocator(NUM_TASKS, page_size=4)
    gone: list[Entry] = []
    looked = 0

    class Watched(Entry):
        @property
        def place(self) -> Any:
            nonlocal looked
            looked += 1
            return super().place

    def evict(entry: Entry) -> None:
        gone.append(entry)
        entry.advance(LifeEvent.EVICT_ALL)

    tier = DeviceTier(allocator, NUM_TASKS, evict)
    entries = [Watched(PrefixVersion(TENANT, n, 1, n, 1, 1), 4) for n in names()]
    for i, entry in enumerate(entries):
        if i % 9 == 0:
            tier.set_pinned(entry.key, True)
        entry.advance(LifeEvent.FETCH)
        entry.advance(LifeEvent.FETCHED)
        assert tier.reserve(entry, force=False)
        entry.advance(LifeEvent.COPY)
        entry.advance(LifeEvent.COPIED)
        tier.rest(entry)
        if i % 10 == 0:
            entry.leases += 1
            tier.use(entry)
    tier.check()
    expected = [e for i, e in enumerate(entries) if i % 9 and i % 10][:7]
    looked = 0
    assert tier.make_room(7)
    assert looked <= 7 * 20
    assert gone == expected
    assert not tier.make_room(NUM_TASKS, force=True), "a tenth is leased"
    assert gone == expected
    tier.check()


def test_host_memory_is_bounded_by_bytes_whatever_passes_through(tmp_path: Path) -> None:
    sizes = [1 + i % 7 for i in range(60)]
    world = World(tmp_path, sizes, num_pages=4, host_cache_bytes=5000, load_threads=2)
    largest = max((world.blobs / v.sha256).stat().st_size for v in world.versions)
    for version in [*world.versions, *world.versions[::-1]]:
        world.visit(version)
        assert world.residency.host_bytes <= 5000 + 2 * largest
    assert world.residency.host_bytes <= 5000
    assert world.observer.evictions["host"] > 60
    assert world.residency.loads == {"queued": 0, "fetching": 0, "copying": 0}
    assert world.residency.device_pages == world.allocator.num_used


def test_ten_thousand_waiting_loads_are_single_flight_and_bounded(tmp_path: Path) -> None:
    world = World(tmp_path, (5,))
    executor = HandExecutor()
    allocator = PageAllocator(8, page_size=4)
    residency = Residency(
        world.store,
        allocator,
        ArrayPool(allocator),
        geometry=GEOMETRY,
        cache=CacheConfig(page_size=4, load_threads=3),
        executor=executor,
    )
    versions = [PrefixVersion(TENANT, n, 1, f"{i:064x}", 5, 5) for i, n in enumerate(names())]
    for version in [*versions, *versions]:
        residency.pin(version)
    assert len(executor.jobs) == 3
    assert residency.loads == {"queued": NUM_TASKS - 3, "fetching": 3, "copying": 0}
    for version in versions:
        for _ in range(2):
            residency.unpin(PrefixKey(TENANT, version.sha256))
    assert residency.loads["queued"] == 0
    residency.check()
