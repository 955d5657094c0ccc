"""Residency with its own threads."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from prefixd_server.prefix import Blocked, Lease
from prefixd_server.types import PrefixState
from prefixd_store.errors import StoreUnavailable
from tests.prefix.support import World

S = PrefixState


def test_one_slow_load_delays_nobody_else(tmp_path: Path) -> None:
    world = World(tmp_path, (4,) * 5, by_hand=False, load_threads=2)
    slow, *others = world.versions
    gate = world.store.gates[slow.sha256] = threading.Event()
    try:
        for version in world.versions:
            world.residency.pin(version)
        for version in others:
            world.wait_until(lambda v=version: isinstance(world.residency.acquire(v.key), Lease))
        assert world.residency.acquire(slow.key) is Blocked.LOADING
        world.check()
    finally:
        gate.set()
    world.wait_until(lambda: isinstance(world.residency.acquire(slow.key), Lease))
    world.check()
    world.residency.close()
    assert world.allocator.num_used == 0


def test_what_is_in_host_memory_does_not_wait_for_slow_loads(tmp_path: Path) -> None:
    world = World(tmp_path, (4, 4), by_hand=False, load_threads=1)
    slow, near = world.versions
    world.residency.pin(near)
    world.wait_until(lambda: world.state(near) is S.HOST)
    gate = world.store.gates[slow.sha256] = threading.Event()
    try:
        world.residency.pin(slow)
        world.wait_until(lambda: world.store.reads[slow.sha256])
        world.wait_until(lambda: isinstance(world.residency.acquire(near.key), Lease))
    finally:
        gate.set()
    world.residency.close()


def test_a_load_outlasts_an_outage(tmp_path: Path) -> None:
    world = World(tmp_path, by_hand=False)
    a = world.versions[0]
    world.store.down = True
    world.residency.pin(a)
    world.wait_until(lambda: world.store.reads[a.sha256] >= 2)
    assert world.state(a) is S.LOADING
    world.store.down = False
    world.wait_until(lambda: isinstance(world.residency.acquire(a.key), Lease))
    world.residency.close()


def test_an_outage_longer_than_the_time_limit_fails_the_load(tmp_path: Path) -> None:
    world = World(tmp_path, by_hand=False, load_timeout_s=0.1, load_retry_s=0)
    a = world.versions[0]
    world.store.down = True
    world.residency.pin(a)
    world.wait_until(lambda: world.state(a) is S.FAILED)
    with pytest.raises(StoreUnavailable):
        world.residency.acquire(a.key)
    world.residency.unpin(a.key)
    world.store.down = False
    world.residency.pin(a)
    world.wait_until(lambda: isinstance(world.residency.acquire(a.key), Lease))
    world.residency.close()


def test_close_does_not_wait_for_an_outage_to_end(tmp_path: Path) -> None:
    world = World(tmp_path, by_hand=False, load_timeout_s=3600)
    a = world.versions[0]
    world.store.down = True
    world.residency.pin(a)
    world.wait_until(lambda: world.store.reads[a.sha256])
    world.residency.close()
    assert world.allocator.num_used == 0


def test_only_the_engine_thread_may_drive_it_but_any_may_look(tmp_path: Path) -> None:
    world = World(tmp_path, by_hand=False)
    a = world.versions[0]
    world.residency.pin(a)
    raised: list[BaseException] = []
    seen: list[PrefixState] = []

    def elsewhere() -> None:
        seen.append(world.residency.state(a.key))
        world.residency.retire(a.key)
        try:
            world.residency.acquire(a.key)
        except AssertionError as error:
            raised.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert len(seen) == len(raised) == 1
    world.residency.poll()
    assert world.state(a) is S.RETIRING
    world.residency.close()
