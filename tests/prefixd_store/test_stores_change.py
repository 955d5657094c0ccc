"""The contract of a store, held to by both: activating, updating and deleting."""

from __future__ import annotations

from typing import Any

import pytest

from prefixd_store.errors import Conflict, InvalidRequest, NotFound
from prefixd_store.store import Store
from tests.prefixd_store.support import TENANT, MakeBlob, put


def test_activate_splits_traffic_and_rolls_back(store: Store, blob: MakeBlob) -> None:
    for _ in range(3):
        put(store, "e2e", blob())
    task = store.activate(TENANT, "e2e", {2: 0.9, 3: 0.1})
    assert (task.split, task.active) == ({2: 0.9, 3: 0.1}, 2)
    assert store.activate(TENANT, "e2e", {1: 1}).split == {1: 1.0}
    assert store.get_task(TENANT, "e2e").revision == 5


@pytest.mark.parametrize(
    "split", [{}, {1: 0.5}, {1: 1.5, 2: -0.5}, {1: 1.0, 2: 0.0}, {1: float("nan")}, {1: 1e308}]
)
def test_activate_refuses_weights_that_are_no_split(
    store: Store, blob: MakeBlob, split: dict[int, float]
) -> None:
    put(store, "e2e", blob())
    before = put(store, "e2e", blob()).task
    with pytest.raises(InvalidRequest) as caught:
        store.activate(TENANT, "e2e", split)
    assert caught.value.param == "split"
    assert store.get_task(TENANT, "e2e") == before


def test_activate_refuses_unknown_versions(store: Store, blob: MakeBlob) -> None:
    put(store, "e2e", blob())
    with pytest.raises(NotFound, match="no version 2"):
        store.activate(TENANT, "e2e", {1: 0.5, 2: 0.5})


def test_update_replaces_the_named_fields_only(store: Store, blob: MakeBlob) -> None:
    put(store, "e2e", blob())
    store.update_task(TENANT, "e2e", {"description": "E2E", "pinned": True})
    defaults = {"parameters": {"temperature": 0.5}, "stop": ["\n"]}
    task = store.update_task(TENANT, "e2e", {"defaults": defaults})
    assert (task.description, task.pinned, task.defaults) == ("E2E", True, defaults)
    assert task.revision == 3
    assert store.get_task(TENANT, "e2e") == task
    assert task.updated_at > task.created_at


def test_an_empty_update_changes_nothing(store: Store, blob: MakeBlob) -> None:
    task = put(store, "e2e", blob()).task
    assert store.update_task(TENANT, "e2e", {}) == task


@pytest.mark.parametrize(
    "changes",
    [
        {"revision": 7},
        {"description": "x", "split": {1: 1.0}},
        {"description": None},
        {"description": "\ud800"},
        {"pinned": "yes"},
        {"defaults": ["stop"]},
        {"defaults": {"x": float("inf")}},
        {"defaults": {"x": object()}},
    ],
)
def test_update_refuses_what_it_cannot_keep(
    store: Store, blob: MakeBlob, changes: dict[str, Any]
) -> None:
    before = put(store, "e2e", blob()).task
    with pytest.raises(InvalidRequest):
        store.update_task(TENANT, "e2e", changes)
    assert store.get_task(TENANT, "e2e") == before


def test_delete_version(store: Store, blob: MakeBlob) -> None:
    put(store, "e2e", blob())
    put(store, "e2e", blob())
    task = store.delete_version(TENANT, "e2e", 1)
    assert (sorted(task.versions), task.split, task.next_version) == ([2], {2: 1.0}, 3)
    with pytest.raises(NotFound, match="no version 1"):
        store.delete_version(TENANT, "e2e", 1)


def test_a_version_that_takes_traffic_is_not_deleted(store: Store, blob: MakeBlob) -> None:
    put(store, "e2e", blob())
    put(store, "e2e", blob())
    store.activate(TENANT, "e2e", {1: 0.01, 2: 0.99})
    for version in (1, 2):
        with pytest.raises(Conflict, match=f"version {version} "):
            store.delete_version(TENANT, "e2e", version)


def test_deleting_the_last_version_keeps_the_task(store: Store, blob: MakeBlob) -> None:
    put(store, "e2e", blob())
    store.update_task(TENANT, "e2e", {"description": "kept"})
    task = store.delete_version(TENANT, "e2e", 1)
    assert (task.versions, task.split, task.active, task.description) == ({}, {}, None, "kept")
    assert put(store, "e2e", blob()).version.version == 2


def test_delete_task(store: Store, blob: MakeBlob) -> None:
    put(store, "e2e", blob())
    store.delete_task(TENANT, "e2e")
    assert store.list_tasks(TENANT).tasks == []
    with pytest.raises(NotFound):
        store.get_task(TENANT, "e2e")


def test_changes_of_an_unknown_task_are_not_found(store: Store) -> None:
    for change in (
        lambda: store.activate(TENANT, "e2e", {1: 1.0}),
        lambda: store.update_task(TENANT, "e2e", {"pinned": True}),
        lambda: store.delete_version(TENANT, "e2e", 1),
        lambda: store.delete_task(TENANT, "e2e"),
    ):
        with pytest.raises(NotFound, match="e2e"):
            change()
