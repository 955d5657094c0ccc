"""The contract of a store, held to by both: listing, and what tenants see of each other."""

from __future__ import annotations

import pytest

from prefixd_store.errors import InvalidRequest, NotFound
from prefixd_store.records import TaskRecord
from prefixd_store.store import Store
from tests.prefixd_store.support import TENANT, MakeBlob, put


def names(tasks: list[TaskRecord]) -> list[str]:
    return [task.name for task in tasks]


def test_listing_is_in_order_of_name_and_paged(store: Store, blob: MakeBlob) -> None:
    all_names = ["a", "a-b", "a.b", "a.json", "a.json.json", "a0", "a_b", "b", "lock"]
    upload = blob()
    for name in reversed(all_names):
        put(store, name, upload)
    assert names(store.list_tasks(TENANT).tasks) == sorted(all_names)
    seen: list[str] = []
    cursor: str | None = None
    while True:
        tasks, cursor = store.list_tasks(TENANT, limit=2, cursor=cursor)
        seen += names(tasks)
        if cursor is None:
            break
        assert len(tasks) == 2
    assert seen == sorted(all_names)


def test_listing_filters_by_prefix(store: Store, blob: MakeBlob) -> None:
    upload = blob()
    for name in ("a", "ab", "ab.c", "abd", "ac", "b"):
        put(store, name, upload)
    assert names(store.list_tasks(TENANT, prefix="ab").tasks) == ["ab", "ab.c", "abd"]
    page = store.list_tasks(TENANT, prefix="ab", limit=2)
    assert (names(page.tasks), page.next_cursor) == (["ab", "ab.c"], "ab.c")
    page = store.list_tasks(TENANT, prefix="ab", limit=2, cursor=page.next_cursor)
    assert (names(page.tasks), page.next_cursor) == (["abd"], None)
    assert names(store.list_tasks(TENANT, prefix="ab", cursor="a").tasks)[0] == "ab"
    assert store.list_tasks(TENANT, prefix="zz").tasks == []
    assert store.list_tasks(TENANT, prefix="é\xff").tasks == []


def test_an_exact_last_page_has_no_cursor(store: Store, blob: MakeBlob) -> None:
    put(store, "a", blob())
    put(store, "b", blob())
    assert store.list_tasks(TENANT, limit=2).next_cursor is None


def test_limit_must_be_positive(store: Store) -> None:
    with pytest.raises(InvalidRequest, match="limit"):
        store.list_tasks(TENANT, limit=0)


def test_tenants_see_nothing_of_each_other(store: Store, blob: MakeBlob) -> None:
    mine, theirs = blob(), blob()
    put(store, "e2e", mine, tenant="a")
    put(store, "e2e", theirs, tenant="a.b")
    put(store, "other", theirs, tenant="ab")
    assert names(store.list_tasks("a").tasks) == ["e2e"]
    assert store.list_tasks("a").tasks[0].versions[1].sha256 == mine.sha256
    assert store.list_tasks("nobody").tasks == []
    with pytest.raises(NotFound):
        store.read_blob("a", theirs.sha256)
    store.delete_task("a", "e2e")
    store.collect_garbage(grace_seconds=0)
    assert store.read_blob("a.b", theirs.sha256) == theirs.data
    assert sorted((t.tenant, t.name) for t in store.all_tasks()) == [
        ("a.b", "e2e"),
        ("ab", "other"),
    ]
