"""The contract of a store, held to by both: changes that want a known state of the task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from prefixd_store.errors import Conflict
from prefixd_store.store import Store
from tests.prefixd_store.support import TENANT, Blob, MakeBlob, put


def test_if_match_lets_the_present_state_pass(store: Store, blob: MakeBlob) -> None:
    etag = put(store, "e2e", blob()).task.etag
    etag = put(store, "e2e", blob(), if_match=etag).task.etag
    etag = store.activate(TENANT, "e2e", {1: 1.0}, if_match=etag).etag
    etag = store.update_task(TENANT, "e2e", {"pinned": True}, if_match=etag).etag
    etag = store.delete_version(TENANT, "e2e", 2, if_match=etag).etag
    store.delete_task(TENANT, "e2e", if_match=etag)


CHANGES: list[Callable[[Store, Blob, str], Any]] = [
    lambda store, blob, etag: put(store, "e2e", blob, if_match=etag),
    lambda store, blob, etag: store.activate(TENANT, "e2e", {1: 1.0}, if_match=etag),
    lambda store, blob, etag: store.update_task(TENANT, "e2e", {}, if_match=etag),
    lambda store, blob, etag: store.delete_version(TENANT, "e2e", 1, if_match=etag),
    lambda store, blob, etag: store.delete_task(TENANT, "e2e", if_match=etag),
]


@pytest.mark.parametrize("change", CHANGES)
def test_if_match_of_an_older_state_conflicts(
    store: Store, blob: MakeBlob, change: Callable[[Store, Blob, str], Any]
) -> None:
    old = put(store, "e2e", blob()).task
    now = store.update_task(TENANT, "e2e", {"description": "newer"})
    with pytest.raises(Conflict) as caught:
        change(store, blob(), old.etag)
    assert old.etag in caught.value.message
    assert now.etag in caught.value.message
    assert store.get_task(TENANT, "e2e") == now


def test_if_match_star_wants_the_task_to_exist(store: Store, blob: MakeBlob) -> None:
    with pytest.raises(Conflict):
        put(store, "e2e", blob(), if_match="*")
    put(store, "e2e", blob())
    assert put(store, "e2e", blob(), if_match="*").version.version == 2


def test_create_only(store: Store, blob: MakeBlob) -> None:
    first = blob()
    assert put(store, "e2e", first, if_match="!*").created
    for again in (first, blob()):
        with pytest.raises(Conflict):
            put(store, "e2e", again, if_match="!*")


def test_if_match_does_not_create(store: Store, blob: MakeBlob) -> None:
    with pytest.raises(Conflict):
        put(store, "e2e", blob(), if_match='"123-1"')


def test_an_etag_does_not_outlive_its_task(store: Store, blob: MakeBlob) -> None:
    old = put(store, "e2e", blob()).task
    store.delete_task(TENANT, "e2e")
    new = put(store, "e2e", blob()).task
    assert new.revision == old.revision
    with pytest.raises(Conflict):
        store.delete_task(TENANT, "e2e", if_match=old.etag)
