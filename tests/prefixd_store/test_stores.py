"""The contract of a store, held to by both."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from prefixd_store.errors import Conflict, InvalidRequest, NotFound
from prefixd_store.records import TaskRecord
from prefixd_store.store import Store
from tests.prefixd_store.support import ROOT, TENANT, Backend, Blob, Replica, blob_of, put

MakeBlob = Callable[..., Blob]


# --- publishing --------------------------------------------------------------------------------


def test_first_upload_creates_the_task(store: Store, blob: MakeBlob) -> None:
    first = blob()
    task, version, created = put(store, "e2e", first)
    assert created
    assert (version.version, version.sha256) == (1, first.sha256)
    assert (task.revision, task.next_version, task.split, task.active) == (1, 2, {1: 1.0}, 1)
    assert store.get_task(TENANT, "e2e") == task
    assert task.versions[1].model_copy(update={"version": 1}) == first.version


def test_versions_count_up_and_the_newest_is_active(store: Store, blob: MakeBlob) -> None:
    numbers = [put(store, "e2e", blob()).version.version for _ in range(3)]
    task = store.get_task(TENANT, "e2e")
    assert numbers == [1, 2, 3] == sorted(task.versions)
    assert task.split == {3: 1.0}
    assert task.revision == 3


def test_upload_without_activate_changes_no_traffic(store: Store, blob: MakeBlob) -> None:
    assert put(store, "new", blob(), activate=False).task.split == {}
    put(store, "old", blob())
    assert put(store, "old", blob(), activate=False).task.split == {1: 1.0}


def test_same_bytes_are_the_same_version(store: Store, blob: MakeBlob) -> None:
    first, second = blob(), blob()
    put(store, "e2e", first)
    before = put(store, "e2e", second).task
    task, version, created = put(store, "e2e", first, activate=False)
    assert not created
    assert version.version == 1
    assert task == before == store.get_task(TENANT, "e2e")


def test_same_bytes_may_be_activated(store: Store, blob: MakeBlob) -> None:
    first = blob()
    put(store, "e2e", first)
    put(store, "e2e", blob())
    task, version, created = put(store, "e2e", first)
    assert (created, version.version, task.split, sorted(task.versions)) == (
        False,
        1,
        {1: 1.0},
        [1, 2],
    )
    assert task.revision == 3


def test_bytes_of_a_deleted_version_get_a_new_number(store: Store, blob: MakeBlob) -> None:
    first = blob()
    put(store, "e2e", first)
    put(store, "e2e", blob())
    store.delete_version(TENANT, "e2e", 1)
    task, version, created = put(store, "e2e", first)
    assert (created, version.version, sorted(task.versions)) == (True, 3, [2, 3])
    assert store.read_blob(TENANT, first.sha256) == first.data


def test_the_uploaded_file_stays_its_owners(store: Store, blob: MakeBlob) -> None:
    upload = blob()
    put(store, "e2e", upload)
    assert upload.path.read_bytes() == upload.data
    upload.path.write_bytes(b"something else")
    assert store.read_blob(TENANT, upload.sha256) == upload.data


def test_bytes_that_are_not_those_of_the_record_are_not_published(
    store: Store, blob: MakeBlob
) -> None:
    upload = blob()
    upload.path.write_bytes(upload.data[:-1])
    with pytest.raises(Exception, match=upload.sha256):
        put(store, "e2e", upload)
    with pytest.raises(NotFound):
        store.get_task(TENANT, "e2e")


def test_provenance_that_is_not_json_is_refused(store: Store, blob: MakeBlob) -> None:
    upload = blob()
    odd = upload.version.model_copy(update={"provenance": {"note": "\ud800"}})
    with pytest.raises(InvalidRequest):
        store.put_version(TENANT, "e2e", upload.path, odd)
    assert store.list_tasks(TENANT).tasks == []


@pytest.mark.parametrize("name", ["", "UPPER", "../x", "a/b", "a b", ".hidden", "x" * 129, "a\n"])
def test_names_are_checked(store: Store, blob: MakeBlob, name: str) -> None:
    with pytest.raises(InvalidRequest):
        put(store, name, blob())
    with pytest.raises(InvalidRequest):
        put(store, "e2e", blob(), tenant=name)
    with pytest.raises(InvalidRequest):
        store.get_task(TENANT, name)


# --- if_match ----------------------------------------------------------------------------------


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


# --- activating, updating, deleting ------------------------------------------------------------


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


# --- listing and tenants -----------------------------------------------------------------------


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


# --- blobs and garbage -------------------------------------------------------------------------


def test_read_blob_gives_the_bytes_and_tells_progress(store: Store, blob: MakeBlob) -> None:
    upload = blob(300_000)
    put(store, "e2e", upload)
    steps: list[int] = []
    data = store.read_blob(TENANT, upload.sha256, progress=steps.append)
    assert not data.readonly
    assert data == upload.data
    assert sum(steps) == 300_000


def test_unknown_blobs_are_not_found(store: Store) -> None:
    with pytest.raises(NotFound):
        store.read_blob(TENANT, "0" * 64)
    with pytest.raises(InvalidRequest):
        store.read_blob(TENANT, "../../etc/passwd")


def test_garbage_is_what_no_version_names(store: Store, blob: MakeBlob) -> None:
    kept, freed, shared = blob(100), blob(5000), blob(700)
    put(store, "e2e", freed)
    put(store, "e2e", shared)
    put(store, "e2e", kept)
    put(store, "other", shared)
    store.delete_version(TENANT, "e2e", 1)
    store.delete_version(TENANT, "e2e", 2)
    assert store.read_blob(TENANT, freed.sha256) == freed.data
    assert store.collect_garbage(grace_seconds=3600) == 0
    assert store.read_blob(TENANT, freed.sha256) == freed.data
    assert store.collect_garbage(grace_seconds=0) == 5000
    with pytest.raises(NotFound):
        store.read_blob(TENANT, freed.sha256)
    for upload in (kept, shared):
        assert store.read_blob(TENANT, upload.sha256) == upload.data
    assert store.collect_garbage(grace_seconds=0) == 0


def test_bytes_released_and_uploaded_again_are_no_garbage(store: Store, blob: MakeBlob) -> None:
    upload = blob()
    put(store, "e2e", upload)
    store.delete_task(TENANT, "e2e")
    put(store, "again", upload)
    assert store.collect_garbage(grace_seconds=0) == 0
    assert store.read_blob(TENANT, upload.sha256) == upload.data


def test_bytes_collected_can_be_uploaded_again(store: Store, blob: MakeBlob) -> None:
    upload = blob()
    put(store, "e2e", upload)
    store.delete_task(TENANT, "e2e")
    assert store.collect_garbage(grace_seconds=0) == 1000
    put(store, "e2e", upload)
    assert store.collect_garbage(grace_seconds=0) == 0
    assert store.read_blob(TENANT, upload.sha256) == upload.data


# --- the feed ----------------------------------------------------------------------------------


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


# --- many at once ------------------------------------------------------------------------------


def test_ping_and_close(store: Store) -> None:
    store.ping()
    store.close()


WRITER = """
import sys
from pathlib import Path
from tests.prefixd_store.support import Backend, make_blob, put
backend = Backend(sys.argv[1], {"namespace": sys.argv[2]} if sys.argv[2] else {})
store = backend.open()
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[4])):
    print(put(store, "busy", make_blob(Path(sys.argv[3]), 2000)).version.model_dump_json())
"""


def test_uploads_from_threads_and_processes_are_all_kept(
    backend: Backend, blob: MakeBlob, tmp_path: Any
) -> None:
    each = 8
    arguments = [backend.url, backend.options.get("namespace", ""), str(tmp_path), str(each)]
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    stores = [backend.open(), backend.open()]
    start = threading.Barrier(4)

    def upload(store: Store) -> list[str]:
        start.wait()
        return [put(store, "busy", blob(2000)).version.model_dump_json() for _ in range(each)]

    with ThreadPoolExecutor(4) as pool:
        threads = [pool.submit(upload, stores[n % 2]) for n in range(4)]
        acknowledged = [
            line for writer in writers for line in writer.communicate("go\n")[0].splitlines()
        ]
        acknowledged += [line for thread in threads for line in thread.result()]
    assert [writer.returncode for writer in writers] == [0, 0]
    task = stores[0].get_task(TENANT, "busy")
    assert sorted(task.versions) == list(range(1, 6 * each + 1))
    assert task.revision == 6 * each
    assert sorted(acknowledged) == sorted(v.model_dump_json() for v in task.versions.values())
    for version in task.versions.values():
        assert len(stores[1].read_blob(TENANT, version.sha256)) == 2000


def test_only_one_of_many_conditional_changes_wins(backend: Backend, blob: MakeBlob) -> None:
    stores = [backend.open() for _ in range(4)]
    etag = put(stores[0], "e2e", blob()).task.etag
    start = threading.Barrier(4)

    def change(n: int) -> bool:
        start.wait()
        try:
            stores[n].update_task(TENANT, "e2e", {"description": f"{n}"}, if_match=etag)
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(change, range(4)))
    assert sum(won) == 1
    assert stores[0].get_task(TENANT, "e2e").description == str(won.index(True))


def test_the_same_bytes_uploaded_at_once_are_one_version(backend: Backend, tmp_path: Any) -> None:
    stores = [backend.open() for _ in range(4)]
    uploads = [blob_of(tmp_path, b"the same" * 1000) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda n: put(stores[n], "e2e", uploads[n]), range(4)))
    assert sorted(result.created for result in results) == [False, False, False, True]
    assert {result.version.version for result in results} == {1}
    stores[0].collect_garbage(grace_seconds=0)
    assert stores[0].read_blob(TENANT, uploads[0].sha256) == uploads[0].data
