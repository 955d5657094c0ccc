"""A retired prefix goes with the last who wants it, unless it is uploaded again."""

from __future__ import annotations

from pathlib import Path

from prefixd_server.prefix import Blocked, Lease
from prefixd_server.types import PrefixKey, PrefixState
from tests.prefix.support import TENANT, World

S = PrefixState


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
