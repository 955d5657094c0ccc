"""Who holds the pages: one copy shared by all, leased, pinned or the first to go."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefixd_server.errors import InvalidRequest
from prefixd_server.prefix import Blocked, Lease
from prefixd_server.types import PrefixState, PrefixVersion
from tests.prefix.support import World, tensors, write_blob

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
