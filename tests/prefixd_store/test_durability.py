"""kill -9 at any moment: what was acknowledged is whole, what was not is absent, the feed is right.

The writers and the Redis server that are killed are real processes. On disk the moment is also
swept: a writer dies before each of its system calls and statements, one after the other.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from prefixd_store.errors import StoreUnavailable
from prefixd_store.store import Store
from tests.prefixd_store.support import (
    ROOT,
    TENANT,
    Backend,
    Blob,
    Replica,
    blob_keys,
    make_blob,
    put,
)
from tests.support.redis_server import RedisServer, running_redis

ROUNDS = 16
CHUNK = 16 << 10  # small, so that most uploads have several


class Acknowledged(NamedTuple):
    task: str
    version: int
    sha256: str

    @classmethod
    def parse(cls, line: str) -> Acknowledged:
        task, version, sha256 = line.split()
        return cls(task, int(version), sha256)


@pytest.fixture(scope="module")
def durable_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running_redis(tmp_path_factory.mktemp("aof"), appendonly=True) as server:
        yield server


@pytest.fixture(params=["disk", "redis"])
def durable(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    if request.param == "disk":
        backend = Backend(str(tmp_path / "store"))
    else:
        server: RedisServer = request.getfixturevalue("durable_redis")
        backend = Backend(server.url, {"namespace": "writer", "chunk_bytes": CHUNK})
    yield backend
    backend.close()


def check_whole(store: Store, acknowledged: list[Acknowledged]) -> None:
    """Every acknowledged version is there, and every visible version is whole."""
    tasks = {task.name: task for task in store.all_tasks()}
    for ack in acknowledged:
        assert tasks[ack.task].versions[ack.version].sha256 == ack.sha256
    for task in tasks.values():
        assert sorted(task.versions) == list(range(1, task.next_version))
        assert sum(task.split.values()) == 1.0
        for version in task.versions.values():
            assert len(store.read_blob(TENANT, version.sha256)) == version.bytes


def check_no_litter(backend: Backend, store: Store) -> None:
    """Collecting garbage leaves exactly the blobs that some version names."""
    store.collect_garbage(grace_seconds=0)
    named = {v.sha256 for task in store.all_tasks() for v in task.versions.values()}
    if backend.on_disk:
        root = Path(backend.url)
        assert {path.stem for path in (root / f"tenants/{TENANT}/blobs").iterdir()} == named
        assert list((root / "tmp").iterdir()) == []
    else:
        assert {key.split(":")[3] for key in blob_keys(backend)} == named


WRITER = """
import random, sys
from pathlib import Path
from tests.prefixd_store.support import Backend, make_blob, put
backend = Backend(sys.argv[1], eval(sys.argv[2]))
store = backend.open()
print("ready", flush=True)
while True:
    task = random.choice(["a", "b", "c"])
    blob = make_blob(Path(sys.argv[3]), random.randrange(1, 100_000))
    version = put(store, task, blob).version
    print(task, version.version, version.sha256, flush=True)
"""


def test_uploads_survive_a_killed_writer(durable: Backend, tmp_path: Path) -> None:
    moments = random.Random(0)
    acknowledged: list[Acknowledged] = []
    replica = Replica(durable.open())
    for _ in range(ROUNDS):
        command = [sys.executable, "-c", WRITER, durable.url, repr(durable.options), str(tmp_path)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        lines = [writer.stdout.readline() for _ in range(moments.randrange(4))]
        time.sleep(moments.uniform(0, 0.03))
        writer.kill()
        lines += writer.communicate()[0].splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # a torn acknowledgement is none
        acknowledged += map(Acknowledged.parse, lines)

        replica.follow()
        store = durable.open()
        check_whole(store, acknowledged)
        assert replica.tasks == {(t.tenant, t.name): t for t in store.all_tasks()}
    assert len(acknowledged) >= ROUNDS
    assert replica.resets == 1
    check_no_litter(durable, durable.open())


def put_and_die(url: str, blob: Blob, calls: int) -> None:
    """Upload ``blob``, but kill this process instead of its call number ``calls``: of the system,
    or of SQLite, whose COMMIT is as whole as SQLite is."""
    store = Backend(url).open()
    left = itertools.count(calls, -1)

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return wrapper

    for name in ("fsync", "rename", "write", "mkdir", "utime", "close"):
        setattr(os, name, dying(getattr(os, name)))
    with store._records.changing() as connection:  # type: ignore[attr-defined]
        connection.set_trace_callback(dying(lambda statement: None))
    put(store, "e2e", blob)


def test_a_writer_may_die_before_any_of_its_calls(tmp_path: Path) -> None:
    outcomes = []
    for calls in range(40):
        backend = Backend(str(tmp_path / f"store-{calls}"))
        store = backend.open()
        old = put(store, "e2e", make_blob(tmp_path, 3000)).task
        replica = Replica(store)
        arguments = (backend.url, make_blob(tmp_path, 5000), calls)
        writer = multiprocessing.get_context("fork").Process(target=put_and_die, args=arguments)
        writer.start()
        writer.join()

        # The replica is told by the feed alone: nobody has written or opened the store since.
        replica.follow()
        now = store.get_task(TENANT, "e2e")
        assert replica.tasks == {(TENANT, "e2e"): now}
        assert replica.resets == 1
        assert now.next_version - old.next_version in (0, 1)
        check_whole(store, [Acknowledged("e2e", 1, old.versions[1].sha256)])
        put(store, "e2e", make_blob(tmp_path, 10))
        replica.follow()
        assert replica.tasks == {(TENANT, "e2e"): store.get_task(TENANT, "e2e")}
        check_no_litter(backend, backend.open())
        outcomes.append((writer.exitcode, now.next_version))
        if writer.exitcode == 0:
            break
    # It died at first before and later after the change became visible, and at last not at all.
    assert outcomes == sorted(outcomes, key=lambda outcome: outcome[1])
    assert set(outcomes) == {(-9, 2), (-9, 3), (0, 3)}


def test_uploads_survive_a_killed_redis(durable_redis: RedisServer, tmp_path: Path) -> None:
    backend = Backend(durable_redis.url, {"namespace": "server", "chunk_bytes": CHUNK})
    moments = random.Random(1)
    acknowledged: list[Acknowledged] = []
    store = backend.open()
    replica = Replica(backend.open())

    def write() -> None:
        while True:
            task = moments.choice("abc")
            try:
                result = put(store, task, make_blob(tmp_path, moments.randrange(1, 100_000)))
            except StoreUnavailable:
                return
            acknowledged.append(Acknowledged(task, result.version.version, result.version.sha256))

    for _ in range(ROUNDS):
        writer = threading.Thread(target=write)
        enough = len(acknowledged) + moments.randrange(4)
        writer.start()
        while len(acknowledged) < enough and writer.is_alive():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.03))
        durable_redis.kill()
        writer.join()
        durable_redis.start()
        check_whole(store, acknowledged)
        replica.follow()
        assert replica.tasks == {(t.tenant, t.name): t for t in store.all_tasks()}
    assert len(acknowledged) >= ROUNDS
    assert replica.resets == 1
    check_no_litter(backend, store)
    backend.close()
