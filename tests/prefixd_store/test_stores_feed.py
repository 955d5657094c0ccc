"""The contract of a store, held to by both: the feed of changes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from prefixd_store.store import Store
from tests.prefixd_store.support import TENANT, Backend, MakeBlob, Replica, put


def test_the_feed_starts_now(store: Store, blob: MakeBlob) -> None:
    put(store, "before", blob())
    (start,) = store.events(None, timeout=0)
    assert start.kind == "reset"
    assert store.events(start.cursor, timeout=0) == []


def test_the_feed_tells_every_change_once(backend: Backend, blob: MakeBlob) -> None:
    store, reader = backend.open(), backend.open()
    (start,) = reader.events(None, timeout=0)
    upload = blob()
    put(store, "e2e", upload)
    put(store, "e2e", upload)  # changes nothing
    put(store, "e2e", blob())
    store.activate(TENANT, "e2e", {1: 1.0})
    store.update_task(TENANT, "e2e", {"pinned": True})
    store.delete_version(TENANT, "e2e", 2)
    store.delete_task(TENANT, "e2e")
    events = reader.events(start.cursor, timeout=0)
    told = [(event.kind, event.tenant, event.task, event.revision) for event in events]
    assert told == [("put", TENANT, "e2e", n) for n in range(1, 6)] + [("delete", TENANT, "e2e", 0)]
    # It can be resumed after any of them.
    for index, event in enumerate(events):
        assert reader.events(event.cursor, timeout=0) == events[index + 1 :]


def test_the_feed_wakes_a_waiting_reader(backend: Backend, blob: MakeBlob) -> None:
    store, reader = backend.open(), backend.open()
    (start,) = reader.events(None, timeout=0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(reader.events, start.cursor, timeout=30)
        put(store, "e2e", blob())
        assert [event.task for event in waiting.result(timeout=20)] == ["e2e"]


@pytest.mark.parametrize("cursor", ["", "nonsense", "0:0", "9" * 32 + ":40", "99999999999999-0"])
def test_a_cursor_of_another_feed_resets(store: Store, blob: MakeBlob, cursor: str) -> None:
    put(store, "e2e", blob())
    (event,) = store.events(cursor, timeout=0)
    assert event.kind == "reset"
    assert store.events(event.cursor, timeout=0) == []


def test_a_replica_follows_through_many_pages(backend: Backend, blob: MakeBlob) -> None:
    store, replica = backend.open(), Replica(backend.open())
    put(store, "e2e", blob())
    for n in range(60):
        store.update_task(TENANT, "e2e", {"description": f"{n}"})
    replica.follow()
    assert list(replica.tasks.values()) == store.all_tasks()
