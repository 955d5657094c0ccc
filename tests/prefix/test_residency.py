from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from prefixd_server.errors import (
    CorruptBlob,
    InvalidPrefix,
    InvalidRequest,
    NotFound,
    StoreUnavailable,
    Unavailable,
)
from prefixd_server.prefix import Blocked, Lease
from prefixd_server.types import PrefixKey, PrefixState, PrefixVersion
from tests.prefix.support import GEOMETRY, TENANT, World, tensors, write_blob

S = PrefixState


def test_a_prefix_goes_from_the_store_to_pages_and_is_leased(tmp_path: Path) -> None:
    world = World(tmp_path)
    version = world.versions[0]
    residency = world.residency
    seen = [world.state(version)]
    residency.pin(version)
    seen.append(world.state(version))
    assert residency.acquire(version.key) is Blocked.LOADING
    world.settle()
    seen.append(world.state(version))
    assert residency.acquire(version.key) is Blocked.LOADING
    seen.append(world.state(version))
    world.settle()
    seen.append(world.state(version))
    lease = residency.acquire(version.key)
    assert isinstance(lease, Lease)
    assert lease.num_tokens == 5
    assert len(lease.pages) == 2
    world.assert_holds(lease, seed=0)
    assert seen == [S.STORED, S.LOADING, S.HOST, S.LOADING, S.DEVICE]
    assert residency.resident == {"device": 1, "host": 1}
    world.release(lease)
    assert world.state(version) is S.DEVICE


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_dtypes_arrive_as_they_are(tmp_path: Path, dtype: str) -> None:
    world = World(tmp_path)
    lease = world.lease(world.publish("narrow", 6, seed=9, dtype=dtype))
    slots = world.pool.slots(lease.pages, 6)
    expected = tensors(6, 9, dtype)["decoder.key"].to_float32()
    assert (world.pool.key[:, :, slots] == expected).all()


def test_any_number_of_requests_share_one_copy_and_one_load(tmp_path: Path) -> None:
    world = World(tmp_path)
    version = world.versions[1]
    for _ in range(20):
        world.residency.pin(version)
    world.settle()
    assert world.residency.acquire(version.key) is Blocked.LOADING
    world.settle()
    leases = [world.residency.acquire(version.key) for _ in range(20)]
    assert len({lease.pages for lease in leases if isinstance(lease, Lease)}) == 1
    assert all(isinstance(lease, Lease) for lease in leases)
    assert world.allocator.num_used == 2
    assert world.store.reads[version.sha256] == 1
    assert world.observer.loads == {"store": 1, "host": 1}


def test_two_tasks_with_the_same_bytes_share_and_two_tenants_do_not(tmp_path: Path) -> None:
    world = World(tmp_path)
    same = world.publish("other", 5, seed=0)
    record = write_blob(world.blobs, 5, seed=0)
    world.store.put_version("rival", "t0", world.blobs / record.sha256, record)
    rival = PrefixVersion("rival", "t0", 1, record.sha256, 5, 5)
    first = world.lease(world.versions[0])
    assert world.lease(same).pages == first.pages
    assert not set(world.lease(rival).pages) & set(first.pages)


def test_release_is_idempotent(tmp_path: Path) -> None:
    world = World(tmp_path)
    version = world.versions[0]
    lease = world.lease(version)
    world.residency.pin(version)
    other = world.residency.acquire(version.key)
    assert isinstance(other, Lease)
    lease.release()
    lease.release()
    world.check()
    assert not world.residency.make_room(8), "the other lease still holds the pages"
    other.release()
    assert world.residency.make_room(8)


def test_hits_count_where_each_request_found_its_prefix(tmp_path: Path) -> None:
    world = World(tmp_path)
    a = world.versions[0]
    world.visit(a)
    world.visit(a)
    assert world.residency.make_room(8)
    assert world.state(a) is S.HOST
    world.visit(a)
    assert world.observer.hits == {"store": 1, "device": 1, "host": 1}
    assert world.observer.evictions == {"device": 1}
    assert world.store.reads[a.sha256] == 1


def test_the_least_recently_used_prefix_makes_room(tmp_path: Path) -> None:
    world = World(tmp_path, (8, 8, 8, 8, 8), num_pages=8)
    a, b, c, d, e = world.versions
    for version in (a, b, c, d):
        world.visit(version)
    world.visit(a)
    world.visit(e)
    assert [world.state(v) for v in (a, b, c, d, e)] == [
        S.DEVICE,
        S.HOST,
        S.DEVICE,
        S.DEVICE,
        S.DEVICE,
    ]


def test_the_number_of_device_prefixes_is_bounded(tmp_path: Path) -> None:
    world = World(tmp_path, (1, 1, 1), max_device_prefixes=2)
    for version in world.versions:
        world.visit(version)
    assert world.residency.resident["device"] == 2
    first, second = (world.lease(version) for version in world.versions[:2])
    world.residency.pin(world.versions[2])
    assert world.residency.acquire(world.versions[2].key) is Blocked.NO_PAGES
    world.release(first)
    assert world.residency.acquire(world.versions[2].key) is Blocked.LOADING
    world.settle()
    world.release(second)


def test_leased_pages_are_never_taken_and_refusal_changes_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, (12, 8, 16), num_pages=8)
    a, b, c = world.versions
    lease = world.lease(a)
    world.visit(b)
    world.residency.pin(c)
    world.settle()
    own = world.allocator.allocate(3)
    assert own is not None
    assert world.residency.acquire(c.key) is Blocked.NO_PAGES
    assert not world.residency.make_room(4)
    assert world.state(b) is S.DEVICE, "evicting b would not have been enough"
    world.allocator.release(own)
    assert world.residency.acquire(c.key) is Blocked.LOADING
    world.settle()
    assert world.state(b) is S.HOST
    world.assert_holds(lease, seed=0)


def test_pinned_tasks_stay_as_long_as_they_fit(tmp_path: Path) -> None:
    world = World(tmp_path, (12, 12, 8), num_pages=8)
    a, b, _ = world.versions
    world.visit(a)
    world.visit(b)
    world.residency.set_pinned(a.key, True)
    world.residency.poll()
    assert world.residency.make_room(4)
    assert (world.state(a), world.state(b)) == (S.DEVICE, S.HOST)
    own = world.allocator.allocate(2)
    assert own is not None
    assert not world.residency.make_room(5), "3 pinned pages and 5 fit, once the request ends"
    assert world.residency.make_room(5, force=True)
    assert world.state(a) is S.HOST
    world.allocator.release(own)
    world.visit(a)
    assert world.residency.make_room(6), "3 pinned pages and 6 can never fit"
    assert world.state(a) is S.HOST


def test_a_prefix_larger_than_the_pool_is_refused_naming_both(tmp_path: Path) -> None:
    world = World(tmp_path, (33,), num_pages=8)
    for ask in (world.residency.pin, world.residency.prefetch):
        with pytest.raises(InvalidRequest, match=r"33 virtual tokens.* 32"):
            ask(world.versions[0])
    world.check()
    assert not world.executor.jobs


def test_the_whole_pool_can_be_one_prefix(tmp_path: Path) -> None:
    world = World(tmp_path, (32, 1), num_pages=8)
    world.visit(world.versions[1])
    assert len(world.lease(world.versions[0]).pages) == 8


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


def test_retired_while_leased_lives_until_the_last_request_ends(tmp_path: Path) -> None:
    world = World(tmp_path)
    a = world.versions[0]
    lease = world.lease(a)
    world.residency.retire(a.key)
    world.settle()
    assert world.state(a) is S.RETIRING
    world.assert_holds(lease, seed=0)
    lease.release()
    again = world.residency.acquire(a.key)
    assert isinstance(again, Lease), "the pin still holds the identity"
    world.release(again)
    assert world.allocator.num_used == 0
    assert world.residency.resident == {"device": 0, "host": 0}
    assert world.state(a) is S.STORED


def test_retired_while_loading_still_serves_its_waiter(tmp_path: Path) -> None:
    world = World(tmp_path)
    a = world.versions[0]
    world.residency.pin(a)
    world.residency.retire(a.key)
    world.settle()
    assert world.state(a) is S.RETIRING
    assert world.residency.acquire(a.key) is Blocked.LOADING
    world.settle()
    lease = world.residency.acquire(a.key)
    assert isinstance(lease, Lease)
    world.assert_holds(lease, seed=0)
    world.release(lease)
    assert world.residency.resident == {"device": 0, "host": 0}


def test_retired_with_no_request_goes_when_its_load_ends(tmp_path: Path) -> None:
    world = World(tmp_path)
    a = world.versions[0]
    world.residency.prefetch(a)
    world.residency.retire(a.key)
    world.residency.retire(PrefixKey(TENANT, "never seen"))
    world.residency.poll()
    assert world.state(a) is S.RETIRING
    world.settle()
    assert world.state(a) is S.STORED
    assert world.residency.resident["host"] == 0


def test_uploading_the_same_bytes_again_revives(tmp_path: Path) -> None:
    world = World(tmp_path)
    a = world.versions[0]
    lease = world.lease(a)
    world.residency.retire(a.key)
    world.residency.poll()
    world.residency.pin(a)
    assert world.state(a) is S.DEVICE
    world.residency.unpin(a.key)
    world.release(lease)
    assert world.state(a) is S.DEVICE


def test_close_gives_everything_back_whatever_is_out(tmp_path: Path) -> None:
    world = World(tmp_path)
    a, b, c = world.versions
    lease = world.lease(a)
    world.visit(b)
    world.residency.pin(c)
    world.settle()
    assert world.residency.acquire(c.key) is Blocked.LOADING
    world.residency.close()
    world.residency.close()
    lease.release()
    world.residency.unpin(c.key)
    assert world.allocator.num_used == 0
    world.check()


def test_misuse_is_our_bug(tmp_path: Path) -> None:
    world = World(tmp_path)
    a = world.versions[0]
    world.residency.prefetch(a)
    with pytest.raises(AssertionError):
        world.residency.acquire(a.key)
    with pytest.raises(AssertionError):
        world.residency.unpin(a.key)
