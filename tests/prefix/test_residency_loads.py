"""Loads that wait for memory, whose requests go away, and that fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from prefixd_server.errors import (
    CorruptBlob,
    InvalidPrefix,
    NotFound,
    StoreUnavailable,
    Unavailable,
)
from prefixd_server.prefix import Blocked, Lease
from prefixd_server.types import PrefixState, PrefixVersion
from tests.prefix.support import GEOMETRY, TENANT, World

S = PrefixState


@pytest.mark.parametrize("host_cache_bytes", [0, 100])
def test_without_room_in_host_memory_a_prefix_still_loads(
    tmp_path: Path, host_cache_bytes: int
) -> None:
    world = World(tmp_path, host_cache_bytes=host_cache_bytes)
    a = world.versions[0]
    lease = world.lease(a)
    world.assert_holds(lease, seed=0)
    assert world.residency.resident == {"device": 1, "host": 0}
    world.release(lease)
    assert world.residency.make_room(8)
    assert world.state(a) is S.STORED
    world.visit(a)
    assert world.store.reads[a.sha256] == 2


def test_what_waits_without_room_in_host_memory_is_bounded(tmp_path: Path) -> None:
    world = World(tmp_path, (4,) * 6, num_pages=1, host_cache_bytes=0, load_threads=2)
    holder = world.lease(world.versions[0])
    for version in world.versions[1:]:
        world.residency.pin(version)
    world.settle()
    assert world.residency.resident["host"] == 2
    waiting = [v for v in world.versions if world.state(v) is S.HOST]
    assert world.residency.acquire(waiting[0].key) is Blocked.NO_PAGES
    world.release(holder)
    # Everyone gets a turn, in whatever order they ask.
    left = list(world.versions[1:])
    while left:
        for version in left:
            world.residency.acquire(version.key)
        world.settle()
        done = next(v for v in left if world.state(v) is S.DEVICE)
        lease = world.residency.acquire(done.key)
        assert isinstance(lease, Lease)
        world.release(lease)
        left.remove(done)


def test_a_waiting_request_keeps_what_the_host_cache_drops(tmp_path: Path) -> None:
    world = World(tmp_path, (4, 4), num_pages=1)
    size = (world.blobs / world.versions[0].sha256).stat().st_size
    world = World(tmp_path / "b", (4, 4), num_pages=1, host_cache_bytes=size)
    a, b = world.versions
    world.residency.pin(a)
    world.settle()
    world.residency.prefetch(b)
    world.settle()
    assert (world.state(a), world.state(b)) == (S.HOST, S.HOST)
    world.residency.unpin(a.key)
    assert (world.state(a), world.state(b)) == (S.STORED, S.HOST)
    world.check()


def test_aborting_all_waiters_cancels_a_queued_load(tmp_path: Path) -> None:
    world = World(tmp_path, load_threads=1)
    a, b, _ = world.versions
    world.residency.pin(a)
    world.residency.pin(b)
    world.residency.unpin(b.key)
    world.settle()
    assert world.store.reads == {a.sha256: 1}


def test_aborting_what_waits_in_host_memory_lets_the_next_load_start(tmp_path: Path) -> None:
    world = World(tmp_path, load_threads=1, host_cache_bytes=0)
    a, b, _ = world.versions
    world.residency.pin(a)
    world.residency.pin(b)
    world.settle()
    assert (world.state(a), world.state(b)) == (S.HOST, S.STORED)
    world.residency.unpin(a.key)
    assert world.state(b) is S.LOADING


def test_aborting_all_waiters_of_a_running_load_leaves_it_in_host_memory(tmp_path: Path) -> None:
    world = World(tmp_path)
    a = world.versions[0]
    world.residency.pin(a)
    world.residency.unpin(a.key)
    world.settle()
    assert world.state(a) is S.HOST


@pytest.mark.parametrize("host_cache_bytes", [0, 1 << 20])
def test_aborting_while_copying_leaves_a_whole_prefix_on_the_device(
    tmp_path: Path, host_cache_bytes: int
) -> None:
    world = World(tmp_path, host_cache_bytes=host_cache_bytes)
    a = world.versions[0]
    world.residency.pin(a)
    world.settle()
    assert world.residency.acquire(a.key) is Blocked.LOADING
    world.residency.unpin(a.key)
    world.check()
    world.settle()
    assert world.state(a) is S.DEVICE
    world.assert_holds(world.lease(a), seed=0)


@pytest.mark.parametrize(
    "error", [NotFound("no blob"), CorruptBlob("torn"), StoreUnavailable("away")]
)
def test_each_waiter_gets_the_error_and_a_later_request_tries_again(
    tmp_path: Path, error: Unavailable
) -> None:
    world = World(tmp_path, load_retry_s=0, load_timeout_s=0)
    a = world.versions[0]
    world.store.errors[a.sha256] = error
    world.residency.pin(a)
    world.residency.pin(a)
    world.settle()
    assert world.state(a) is S.FAILED
    for _ in range(2):
        with pytest.raises(type(error), match=error.message) as caught:
            world.residency.acquire(a.key)
        assert caught.value is not error
        world.residency.unpin(a.key)
    world.check()
    del world.store.errors[a.sha256]
    world.visit(a)
    assert world.store.reads[a.sha256] == 2


def test_a_fresh_failure_is_told_at_once_without_another_load(tmp_path: Path) -> None:
    world = World(tmp_path, load_retry_s=3600)
    a = world.versions[0]
    world.store.errors[a.sha256] = CorruptBlob("torn")
    for _ in range(3):
        world.residency.pin(a)
        world.settle()
        with pytest.raises(CorruptBlob):
            world.residency.acquire(a.key)
        world.residency.unpin(a.key)
    assert world.store.reads[a.sha256] == 1


def test_a_torn_blob_on_disk_is_never_served(tmp_path: Path) -> None:
    world = World(tmp_path)
    a = world.versions[0]
    [blob] = world.store.root.rglob(f"*{a.sha256}*")
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    world.residency.pin(a)
    world.settle()
    with pytest.raises(CorruptBlob):
        world.residency.acquire(a.key)


def test_a_prefix_for_another_model_fails_naming_both_shapes(tmp_path: Path) -> None:
    world = World(tmp_path, geometry=replace(GEOMETRY, num_layers=3))
    a = world.versions[0]
    world.residency.pin(a)
    world.settle()
    with pytest.raises(InvalidPrefix, match=r"L=2, .*L=3, "):
        world.residency.acquire(a.key)


def test_a_prefix_of_another_base_is_refused_by_fingerprint(tmp_path: Path) -> None:
    world = World(tmp_path, fingerprint="this")
    other = world.publish("x", 3, seed=7, base_fingerprint="other")
    world.residency.pin(other)
    world.settle()
    with pytest.raises(InvalidPrefix, match=r"other, this model's is this"):
        world.residency.acquire(other.key)


def test_a_file_that_is_not_as_recorded_fails_naming_both_lengths(tmp_path: Path) -> None:
    world = World(tmp_path)
    wrong = PrefixVersion(TENANT, "t0", 1, world.versions[0].sha256, 6, 6)
    world.residency.pin(wrong)
    world.settle()
    with pytest.raises(InvalidPrefix, match=r"6 virtual tokens.* 5"):
        world.residency.acquire(wrong.key)


def test_a_failing_copy_gives_its_pages_back(tmp_path: Path) -> None:
    world = World(tmp_path, load_retry_s=0)
    a = world.versions[0]
    world.pool.error = RuntimeError("device error")
    world.residency.pin(a)
    world.settle()
    assert world.residency.acquire(a.key) is Blocked.LOADING
    assert world.allocator.num_used == 2
    world.settle()
    assert world.allocator.num_used == 0
    with pytest.raises(Unavailable, match="RuntimeError"):
        world.residency.acquire(a.key)
    world.residency.unpin(a.key)
    world.pool.error = None
    world.visit(a)
    assert world.state(a) is S.DEVICE
