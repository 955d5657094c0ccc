"""What only Redis can do: chunks, outages, trimmed feeds, full memory, damaged records, health."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefixd_store import redis_scripts
from prefixd_store.errors import CorruptBlob, InvalidRequest, NotFound, StoreUnavailable
from prefixd_store.redis_store import RedisStore
from prefixd_store.store import open_store
from tests.prefixd_store.support import TENANT, Backend, MakeBlob, Replica, blob_keys, put
from tests.support.redis_server import RedisServer, running_redis


@pytest.fixture
def backend(redis_server: RedisServer) -> Iterator[Backend]:
    opened = Backend(redis_server.url, {"namespace": f"test-{uuid.uuid4().hex}"})
    yield opened
    opened.close()


@pytest.fixture
def raw(redis_server: RedisServer) -> Iterator[Any]:
    """A client to look at the server from outside of the store."""
    with redis_server.client() as client:
        yield client


def key(backend: Backend, name: str) -> str:
    return redis_scripts.key_names(backend.options["namespace"])[name]


# --- chunks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "chunks"), [(0, 0), (1, 1), (99, 1), (100, 1), (101, 2), (950, 10)]
)
def test_blobs_are_chunked(
    backend: Backend, raw: Any, blob: MakeBlob, size: int, chunks: int
) -> None:
    store = backend.open(chunk_bytes=100)
    upload = blob(size)
    put(store, "e2e", upload)
    keys = blob_keys(backend)
    assert len(keys) == chunks
    assert sum(raw.strlen(k) for k in keys) == size
    steps: list[int] = []
    assert store.read_blob(TENANT, upload.sha256, progress=steps.append) == upload.data
    assert (len(steps), sum(steps)) == (chunks, size)


def test_a_large_blob(backend: Backend, blob: MakeBlob) -> None:
    store = backend.open()
    upload = blob(70 << 20)
    put(store, "big", upload)
    assert len(blob_keys(backend)) == 70
    assert store.read_blob(TENANT, upload.sha256) == upload.data
    store.delete_task(TENANT, "big")
    assert store.collect_garbage(grace_seconds=0) == 70 << 20
    assert blob_keys(backend) == []


def test_bytes_that_are_there_are_not_uploaded_again(backend: Backend, blob: MakeBlob) -> None:
    store = backend.open()
    upload = blob()
    put(store, "a", upload)
    before = blob_keys(backend)
    put(store, "b", upload)
    assert blob_keys(backend) == before
    store.delete_task(TENANT, "a")
    assert store.collect_garbage(grace_seconds=0) == 0
    assert store.read_blob(TENANT, upload.sha256) == upload.data


@pytest.mark.parametrize("damage", ["flip", "shorten", "lengthen", "delete"])
def test_damaged_chunks_are_reported_and_mended_by_the_same_bytes(
    backend: Backend,
    raw: Any,
    blob: MakeBlob,
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = backend.open(chunk_bytes=400)
    upload = blob(1000)
    put(store, "e2e", upload)
    chunk = sorted(blob_keys(backend))[1]
    content = upload.data[400:800]
    changed = {"flip": bytes([content[0] ^ 1]) + content[1:], "shorten": content[:-1]}
    if damage == "delete":
        raw.delete(chunk)
    else:
        raw.set(chunk, changed.get(damage, content + b"\0"))
    with pytest.raises(CorruptBlob, match=upload.sha256):
        store.read_blob(TENANT, upload.sha256)
    assert upload.sha256 in caplog.text
    if damage == "flip":
        return  # of the right length: only reading every byte at every upload would find it
    assert not put(store, "e2e", upload).created
    assert store.read_blob(TENANT, upload.sha256) == upload.data
    store.collect_garbage(grace_seconds=0)
    assert len(blob_keys(backend)) == 3


def test_what_a_dead_upload_left_is_collected(backend: Backend, raw: Any, blob: MakeBlob) -> None:
    store = backend.open(chunk_bytes=400)
    assert isinstance(store, RedisStore)
    upload = blob(1000)
    orphan = store._blobs.upload(TENANT, upload.sha256, upload.path)
    assert orphan is not None
    assert len(blob_keys(backend)) == 3
    with pytest.raises(NotFound):
        store.read_blob(TENANT, upload.sha256)
    assert store.collect_garbage(grace_seconds=60) == 0
    assert len(blob_keys(backend)) == 3
    assert store.collect_garbage(grace_seconds=0) == 1000
    assert blob_keys(backend) == []


def test_an_upload_that_was_collected_is_made_again(backend: Backend, blob: MakeBlob) -> None:
    """Garbage collection with no grace at all, between the chunks of an upload."""
    store, collector = backend.open(chunk_bytes=400), backend.open()
    assert isinstance(store, RedisStore)
    upload = blob(1000)
    copies: list[Any] = []
    original = store._blobs.upload

    def upload_and_lose(tenant: str, sha256: str, source: Path) -> Any:
        copies.append(original(tenant, sha256, source))
        if len(copies) == 1:
            collector.collect_garbage(grace_seconds=0)
        return copies[-1]

    store._blobs.upload = upload_and_lose  # type: ignore[method-assign]
    assert put(store, "e2e", upload).created
    assert len(copies) == 2
    assert store.read_blob(TENANT, upload.sha256) == upload.data
    assert all(copies[1].upload in chunk for chunk in blob_keys(backend))


def test_everything_is_gone_in_the_end(backend: Backend, raw: Any, blob: MakeBlob) -> None:
    store = backend.open(chunk_bytes=400)
    for task in ("a", "b"):
        for _ in range(3):
            put(store, task, blob(1000))
        store.delete_task(TENANT, task)
    assert store.collect_garbage(grace_seconds=0) == 6000
    left = {k.decode() for k in raw.keys(f"*{backend.options['namespace']}*")}
    # The dead are listed for a while yet; nothing else but the feed stays.
    assert left == {key(backend, name) for name in ("events", "last", "dead")}


# --- records and the feed ----------------------------------------------------------------------


def test_a_damaged_record_hides_no_other(
    backend: Backend, raw: Any, blob: MakeBlob, caplog: pytest.LogCaptureFixture
) -> None:
    store = backend.open()
    for task in ("a", "b", "c"):
        put(store, task, blob())
    raw.hset(key(backend, "tasks"), "default:b", "{")
    assert [task.name for task in store.all_tasks()] == ["a", "c"]
    assert [task.name for task in store.list_tasks(TENANT).tasks] == ["a", "c"]
    assert "default:b" in caplog.text
    with pytest.raises(StoreUnavailable, match="default:b") as caught:
        store.get_task(TENANT, "b")
    assert caught.value.code == "corrupt_record"


def test_a_reader_of_a_trimmed_feed_resets(backend: Backend, blob: MakeBlob) -> None:
    store = backend.open(max_events=10)
    replica, sleeper = Replica(store), Replica(backend.open())
    put(store, "e2e", blob())
    for n in range(400):
        store.update_task(TENANT, "e2e", {"description": f"{n}"})
        if n % 10 == 0:
            replica.follow()
    replica.follow()
    sleeper.follow()
    assert (replica.resets, sleeper.resets) == (1, 2)
    assert replica.tasks == sleeper.tasks == {(TENANT, "e2e"): store.get_task(TENANT, "e2e")}


def test_a_reader_of_a_server_that_was_emptied_resets(
    backend: Backend, raw: Any, blob: MakeBlob
) -> None:
    store = backend.open()
    put(store, "old", blob())
    quick, slow = Replica(store), Replica(store)
    raw.delete(*raw.keys(f"*{backend.options['namespace']}*"))
    quick.follow()
    assert (quick.resets, quick.tasks) == (2, {})
    put(store, "new", blob())
    for replica in (quick, slow):
        replica.follow()
        assert replica.tasks == {(TENANT, "new"): store.get_task(TENANT, "new")}
    assert (quick.resets, slow.resets) == (2, 2)


def test_waiting_longer_than_the_socket_timeout(backend: Backend) -> None:
    store = backend.open(socket_timeout=1)
    (start,) = store.events(None, timeout=0)
    assert store.events(start.cursor, timeout=1.5) == []


def test_a_change_sent_twice_is_made_once(backend: Backend, raw: Any, blob: MakeBlob) -> None:
    """redis-py sends a command again when its answer was lost with the connection."""
    store = backend.open()
    assert isinstance(store, RedisStore)
    replica = Replica(store)
    sent: list[tuple[Any, ...]] = []
    original = store._client.eval

    def eval_twice(*arguments: Any) -> Any:
        if arguments[0] != redis_scripts.COMMIT:
            return original(*arguments)
        sent.append(arguments)
        original(*arguments)
        return original(*arguments)

    store._client.eval = eval_twice
    result = put(store, "e2e", blob())
    assert (result.created, result.task.revision) == (True, 1)
    assert store.update_task(TENANT, "e2e", {"pinned": True}, if_match=result.task.etag).pinned
    store.delete_task(TENANT, "e2e")
    assert len(sent) == 3
    events = store.events(replica.cursor, timeout=0)
    assert [(event.kind, event.revision) for event in events] == [
        ("put", 1),
        ("put", 2),
        ("delete", 0),
    ]
    assert raw.hgetall(key(backend, "refs")) == {}


# --- a server in trouble -----------------------------------------------------------------------


def test_an_outage(tmp_path: Path, blob: MakeBlob) -> None:
    with running_redis(tmp_path / "redis", appendonly=True) as server:
        store, follower = open_store(server.url), open_store(server.url)
        first, second = blob(), blob()
        put(store, "e2e", first)
        replica = Replica(follower)
        put(store, "e2e", second)
        for _ in range(2):
            server.stop()
            for call in (
                store.ping,
                store.all_tasks,
                lambda: store.get_task(TENANT, "e2e"),
                lambda: store.read_blob(TENANT, first.sha256),
                lambda: put(store, "e2e", first),
                lambda: store.collect_garbage(),
                lambda: follower.events(replica.cursor, timeout=30),
            ):
                with pytest.raises(StoreUnavailable, match=f"127.0.0.1:{server.port}"):
                    call()
            server.start()
            store.ping()
            put(store, "e2e", blob())
            replica.follow()
            assert replica.tasks == {(TENANT, "e2e"): store.get_task(TENANT, "e2e")}
        assert replica.resets == 1, "no event was missed"
        assert store.read_blob(TENANT, first.sha256) == first.data


def test_opening_without_a_server_is_unavailable(redis_server: RedisServer) -> None:
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:1"):
        open_store("redis://127.0.0.1:1/0")


def test_a_full_server_refuses_uploads_and_keeps_what_it_has(
    tmp_path: Path, blob: MakeBlob
) -> None:
    with running_redis(tmp_path / "redis", options=["maxmemory 20mb"]) as server:
        backend = Backend(server.url, {"namespace": "full", "chunk_bytes": 1 << 20})
        store = backend.open()
        small = blob()
        put(store, "e2e", small)
        upload = blob(25 << 20)
        with pytest.raises(StoreUnavailable, match="maxmemory"):
            put(store, "e2e", upload)
        assert sorted(store.get_task(TENANT, "e2e").versions) == [1]
        assert store.read_blob(TENANT, small.sha256) == small.data
        server.client().config_set("maxmemory", 1)
        with pytest.raises(StoreUnavailable, match="maxmemory"):
            store.update_task(TENANT, "e2e", {"pinned": True})
        store.delete_task(TENANT, "e2e")  # one may always make room
        assert store.collect_garbage(grace_seconds=0) > 10 << 20
        server.client().config_set("maxmemory", "20mb")
        put(store, "e2e", small)
        assert len(blob_keys(backend)) == 1
        backend.close()


@pytest.mark.parametrize("policy", ["allkeys-lru", "noeviction"])
def test_servers_that_lose_uploads_are_warned_about(
    tmp_path: Path, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    options = [f"maxmemory-policy {policy}"]
    with running_redis(tmp_path / "redis", options=options) as server:
        open_store(server.url).close()
        assert "appendonly is off" in caplog.text
        assert ("may evict prefixes" in caplog.text) == (policy == "allkeys-lru")
        with pytest.raises(StoreUnavailable, match="appendonly is off"):
            open_store(server.url, require_aof=True)


def test_a_durable_server_is_not_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running_redis(tmp_path / "redis", appendonly=True) as server:
        open_store(server.url, require_aof=True).close()
    assert caplog.text == ""


def test_options_that_redis_py_does_not_take(redis_server: RedisServer) -> None:
    with pytest.raises(InvalidRequest, match="colour"):
        open_store(redis_server.url + "?colour=blue")
