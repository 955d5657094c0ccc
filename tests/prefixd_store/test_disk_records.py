"""The disk store's database: its feed, its file, and who uses it at the same time."""

from __future__ import annotations

import multiprocessing
import shutil
import threading
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from prefixd_store import disk_records
from prefixd_store.disk import DiskStore
from prefixd_store.errors import NotFound, StoreUnavailable
from tests.prefixd_store.support import TENANT, MakeBlob, Replica, in_sqlite, make_blob, put


def test_a_reader_behind_the_kept_events_reads_everything_anew(root: Path, blob: MakeBlob) -> None:
    disk = DiskStore(root, max_events=10)
    replica, sleeper = Replica(disk), Replica(DiskStore(root))
    put(disk, "e2e", blob())
    for n in range(100):
        disk.update_task(TENANT, "e2e", {"description": f"{n}"})
        replica.follow()
        ((kept,),) = in_sqlite(root, "SELECT count(*) FROM events")
        assert isinstance(kept, int)
        assert kept <= 20
        assert replica.tasks[TENANT, "e2e"].description == f"{n}"
    assert replica.resets == 1
    sleeper.follow()
    assert (sleeper.resets, sleeper.tasks) == (2, replica.tasks)


def test_a_feed_longer_than_one_read_is_told_whole(
    disk: DiskStore, blob: MakeBlob, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = blob()
    cursor = disk.events(None, timeout=0)[-1].cursor
    names = [f"task-{n}" for n in range(7)]
    for name in names:
        put(disk, name, upload)
    monkeypatch.setattr(disk_records, "_READ_LIMIT", 2)
    told: list[str] = []
    while events := disk.events(cursor, timeout=0):
        assert len(events) <= 2
        told += [event.task for event in events]
        cursor = events[-1].cursor
    assert told == names


@pytest.mark.parametrize("cursor", ["", ":", "elsewhere:1", "{generation}:", "{generation}:-1"])
@pytest.mark.parametrize("digits", ["0", "2", "²", "99999999999999999999"])
def test_a_cursor_of_another_file_resets(disk: DiskStore, cursor: str, digits: str) -> None:
    (start,) = disk.events(None, timeout=0)
    generation, number = start.cursor.split(":")
    assert number == "1"
    for given in (cursor.format(generation=generation), f"{generation}:{digits}"):
        (event,) = disk.events(given, timeout=0)
        assert (event.kind, event.cursor) == ("reset", start.cursor)


def test_a_file_that_was_replaced_in_use_is_unavailable(
    root: Path, disk: DiskStore, blob: MakeBlob
) -> None:
    """Not while servers run, says the documentation; one that did serves nothing that is gone, and
    acknowledges nothing that is lost."""
    put(disk, "kept", blob())
    in_sqlite(root, "PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copy(root / "tasks.db", root / "copy")
    put(disk, "lost", blob())
    cursor = disk.events(None, timeout=0)[-1].cursor
    for suffix in ("-wal", "-shm"):
        (root / f"tasks.db{suffix}").unlink()
    (root / "copy").rename(root / "tasks.db")
    for call in (
        lambda: disk.get_task(TENANT, "kept"),
        lambda: disk.update_task(TENANT, "kept", {"description": "x"}),
        lambda: disk.events(cursor, timeout=0),
        disk.ping,
    ):
        with pytest.raises(StoreUnavailable, match="was replaced while in use"):
            call()
    again = DiskStore(root)
    assert [task.name for task in again.all_tasks()] == ["kept"]
    put(again, "new", blob())
    put(again, "newer", blob())
    assert [event.kind for event in again.events(cursor, timeout=0)] == ["reset"]


def test_prefixes_without_the_file_that_names_their_tasks_are_not_garbage(
    root: Path, disk: DiskStore, blob: MakeBlob
) -> None:
    put(disk, "e2e", blob())
    disk.close()
    (root / "tasks.db").rename(root / "aside")
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="put it back"):
            DiskStore(root)
    (root / "aside").rename(root / "tasks.db")
    assert [task.name for task in DiskStore(root).all_tasks()] == ["e2e"]


def test_a_reader_does_not_wait_for_who_changes(
    root: Path, disk: DiskStore, blob: MakeBlob
) -> None:
    put(disk, "e2e", blob())
    with disk._records.changing():
        reader = threading.Thread(target=disk.get_task, args=(TENANT, "e2e"))
        reader.start()
        reader.join(10)
        assert not reader.is_alive()
        assert DiskStore(root).get_task(TENANT, "e2e").active == 1


def test_who_waits_too_long_for_another_is_told(
    root: Path, disk: DiskStore, blob: MakeBlob, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(disk, "e2e", blob())
    monkeypatch.setattr(disk_records, "_BUSY_S", 0.05)
    other = DiskStore(root)
    with disk._records.changing(), pytest.raises(StoreUnavailable, match="locked"):
        other.update_task(TENANT, "e2e", {"description": "x"})
    assert other.update_task(TENANT, "e2e", {"description": "x"}).description == "x"


def test_a_damaged_event_resets_the_reader(root: Path, disk: DiskStore, blob: MakeBlob) -> None:
    replica = Replica(disk)
    put(disk, "e2e", blob())
    in_sqlite(root, "UPDATE events SET kind = 'odd'")
    put(disk, "other", blob())
    replica.follow()
    assert replica.resets == 2
    assert replica.tasks.keys() == {(TENANT, "e2e"), (TENANT, "other")}


def test_records_that_were_json_files_are_taken_in_once(
    root: Path, disk: DiskStore, blob: MakeBlob
) -> None:
    for task in ("a", "b.json"):
        put(disk, task, blob())
    before = disk.all_tasks()
    disk.close()
    folder = root / f"tenants/{TENANT}/tasks"
    folder.mkdir()
    for task in before:
        (folder / f"{task.name}.json").write_text(task.model_dump_json())
    (folder / "UPPER.json").write_text("no name of ours")
    (root / "tasks.db").unlink()

    disk = DiskStore(root)
    assert disk.all_tasks() == before
    disk.delete_task(TENANT, "a")
    disk.close()
    assert DiskStore(root).all_tasks() == before[1:]
    assert not folder.exists(), "else they would be what is the case wherever the file is lost"


def open_store_and_put(root: Path, number: int, barrier: Barrier) -> None:
    barrier.wait()
    put(DiskStore(root), f"task-{number}", make_blob(root.parent, 10))


def test_many_processes_may_create_it_at_the_same_time(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    for attempt in range(3):
        root, barrier = tmp_path / f"store-{attempt}", spawn.Barrier(4)
        processes = [
            spawn.Process(target=open_store_and_put, args=(root, number, barrier))
            for number in range(4)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 4
        names = [task.name for task in DiskStore(root).all_tasks()]
        assert names == [f"task-{number}" for number in range(4)]


@pytest.mark.parametrize("content", [b"no database" * 100, b"SQLite format 3\0" + bytes(4000)])
def test_a_file_that_is_no_database_is_unavailable(
    root: Path, disk: DiskStore, content: bytes
) -> None:
    disk.close()
    (root / "tasks.db").write_bytes(content)
    with pytest.raises(StoreUnavailable, match=f"{root}/tasks.db"):
        DiskStore(root)
    with pytest.raises(StoreUnavailable, match=f"{root}/tasks.db"):
        disk.get_task(TENANT, "e2e")
    assert (root / "tasks.db").read_bytes() == content


def test_the_file_of_a_later_version_is_unavailable(root: Path, disk: DiskStore) -> None:
    in_sqlite(root, "PRAGMA user_version = 2")
    with pytest.raises(StoreUnavailable, match=f"{root}/tasks.db has layout 2, not 1"):
        DiskStore(root)


def test_a_change_that_fails_leaves_the_next_one_free(disk: DiskStore, blob: MakeBlob) -> None:
    put(disk, "e2e", blob())
    with pytest.raises(NotFound):
        disk.activate(TENANT, "e2e", {7: 1.0})
    assert disk.activate(TENANT, "e2e", {1: 1.0}).active == 1


def test_what_is_acknowledged_is_on_the_device(disk: DiskStore) -> None:
    """FULL: the log is fsynced at each commit; SQLite's builds differ in what they do unasked."""
    with disk._records.changing() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
