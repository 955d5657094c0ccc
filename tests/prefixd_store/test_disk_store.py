"""What only the disk store can do wrong: torn files, litter, damaged records, a failing disk."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from prefixd_store import disk_records
from prefixd_store.disk import DiskStore
from prefixd_store.disk_files import sweep, temp_file
from prefixd_store.errors import CorruptBlob, NotFound, StoreUnavailable
from prefixd_store.store import open_store
from tests.prefixd_store.support import TENANT, Blob, MakeBlob, Replica, make_blob, put


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def disk(root: Path) -> DiskStore:
    return DiskStore(root)


def blob_path(root: Path, blob: Blob) -> Path:
    return root / f"tenants/{TENANT}/blobs/{blob.sha256}.safetensors"


def execute(root: Path, query: str, *values: object) -> list[tuple[object, ...]]:
    """As somebody does with SQLite's own tool."""
    with closing(sqlite3.connect(root / "tasks.db")) as connection, connection:
        return connection.execute(query, values).fetchall()


def test_layout(root: Path, disk: DiskStore, blob: MakeBlob) -> None:
    upload = blob()
    put(disk, "a.json", upload)
    files = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
    assert files == {
        f"tenants/default/blobs/{upload.sha256}.safetensors",
        "tasks.db",
        "tasks.db-wal",
        "tasks.db-shm",
    }
    disk.close()
    assert {path.name for path in root.iterdir()} == {"tasks.db", "tenants", "tmp"}


def test_urls_of_a_folder(tmp_path: Path, blob: MakeBlob) -> None:
    put(open_store(f"file://{tmp_path}/deep/store"), "e2e", blob())
    assert open_store(f"{tmp_path}/deep/store").get_task(TENANT, "e2e").active == 1


def test_a_scheme_that_no_store_has_is_not_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreUnavailable, match="disk:// is none of"):
        open_store("disk:///var/lib/prefixd")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncate", "flip", "grow", "empty"])
def test_a_torn_blob_is_reported_and_never_served(
    root: Path, disk: DiskStore, blob: MakeBlob, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    upload = blob(10_000)
    put(disk, "e2e", upload)
    path = blob_path(root, upload)
    flipped = bytes([upload.data[0] ^ 1]) + upload.data[1:]
    torn = {
        "truncate": upload.data[:-1],
        "flip": flipped,
        "grow": upload.data + b"\0",
        "empty": b"",
    }
    path.write_bytes(torn[damage])
    with pytest.raises(CorruptBlob, match=str(path)):
        disk.read_blob(TENANT, upload.sha256)
    assert str(path) in caplog.text

    assert not put(disk, "e2e", upload).created, "the same bytes again mend the blob"
    assert disk.read_blob(TENANT, upload.sha256) == upload.data


@pytest.mark.parametrize("content", ["", "{", "null", '{"tenant": "default"}', "elsewhere"])
def test_a_damaged_record_is_reported_and_hides_no_other(
    root: Path,
    disk: DiskStore,
    blob: MakeBlob,
    content: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for task in ("a", "b", "c"):
        put(disk, task, blob())
    kept = blob()
    put(disk, "b", kept)
    ((a,),) = execute(root, "SELECT record FROM tasks WHERE name = 'a'")
    damaged = a if content == "elsewhere" else content.encode()
    execute(root, "UPDATE tasks SET record = ? WHERE name = 'b'", damaged)

    where = f"{TENANT}/b in {root}/tasks.db"
    with pytest.raises(StoreUnavailable, match=where) as caught:
        disk.get_task(TENANT, "b")
    assert caught.value.code == "corrupt_record"
    assert [task.name for task in disk.list_tasks(TENANT).tasks] == ["a", "c"]
    assert [task.name for task in disk.all_tasks()] == ["a", "c"]
    assert where in caplog.text
    # Its versions are unknown, so that no blob of the tenant can be said to be garbage.
    disk.delete_task(TENANT, "a")
    assert disk.collect_garbage(grace_seconds=0) == 0
    assert disk.read_blob(TENANT, kept.sha256) == kept.data


def test_foreign_files_are_left_alone(root: Path, disk: DiskStore, blob: MakeBlob) -> None:
    upload = blob()
    put(disk, "e2e", upload)
    foreign = [
        root / "tenants/README",
        root / "tenants/readme",
        root / f"tenants/{TENANT}/notes",
        root / f"tenants/{TENANT}/blobs/notes.txt",
        root / f"tenants/{TENANT}/blobs/notes.safetensors",
    ]
    for path in foreign:
        path.write_text("x")
    assert [task.name for task in disk.all_tasks()] == ["e2e"]
    assert disk.collect_garbage(grace_seconds=0) == 0
    assert all(path.exists() for path in foreign)


def test_litter_of_the_dead_is_swept_and_files_of_the_living_are_not(
    root: Path, disk: DiskStore
) -> None:
    tmp = root / "tmp"
    (tmp / "left-behind").write_bytes(b"x" * 100)
    with temp_file(tmp) as living:
        living.write(b"y" * 50)
        DiskStore(root)
        assert list(tmp.iterdir()) == [living.path]
        (tmp / "left-behind").write_bytes(b"x" * 100)
        assert disk.collect_garbage() == 100
        living.publish(root / "published")
    assert (root / "published").read_bytes() == b"y" * 50


def test_writers_and_sweepers_do_not_disturb_each_other(root: Path, disk: DiskStore) -> None:
    done = threading.Event()

    def sweep_on() -> None:
        while not done.is_set():
            sweep(root / "tmp")

    sweeper = threading.Thread(target=sweep_on)
    sweeper.start()
    try:
        for n in range(200):
            with temp_file(root / "tmp") as file:
                file.write(b"%d" % n)
                file.publish(root / f"{n}")
    finally:
        done.set()
        sweeper.join()
    assert [(root / f"{n}").read_text() for n in range(200)] == [f"{n}" for n in range(200)]


def test_a_reader_behind_the_kept_events_reads_everything_anew(root: Path, blob: MakeBlob) -> None:
    disk = DiskStore(root, max_events=10)
    replica, sleeper = Replica(disk), Replica(DiskStore(root))
    put(disk, "e2e", blob())
    for n in range(100):
        disk.update_task(TENANT, "e2e", {"description": f"{n}"})
        replica.follow()
        ((kept,),) = execute(root, "SELECT count(*) FROM events")
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


def test_a_copy_put_in_the_files_place_is_read_and_resets(
    root: Path, disk: DiskStore, blob: MakeBlob
) -> None:
    """Not while servers run, says the documentation; what one does that did is not to serve what is
    gone, nor to write what is lost with it."""
    put(disk, "kept", blob())
    execute(root, "PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copy(root / "tasks.db", root / "copy")
    put(disk, "lost", blob())
    replica = Replica(disk)
    (root / "copy").rename(root / "tasks.db")
    for suffix in ("-wal", "-shm"):
        (root / f"tasks.db{suffix}").unlink()
    replica.follow()
    assert (replica.resets, list(replica.tasks)) == (2, [(TENANT, "kept")])
    put(disk, "new", blob())
    assert [task.name for task in DiskStore(root).all_tasks()] == ["kept", "new"]


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
    execute(root, "PRAGMA user_version = 2")
    with pytest.raises(StoreUnavailable, match=f"{root}/tasks.db has layout 2, not 1"):
        DiskStore(root)


def test_a_change_that_fails_leaves_the_next_one_free(disk: DiskStore, blob: MakeBlob) -> None:
    put(disk, "e2e", blob())
    with pytest.raises(NotFound):
        disk.activate(TENANT, "e2e", {7: 1.0})
    assert disk.activate(TENANT, "e2e", {1: 1.0}).active == 1


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let writes beyond ``size`` bytes fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_unavailable_and_leaves_nothing(
    root: Path, disk: DiskStore, blob: MakeBlob
) -> None:
    put(disk, "e2e", blob())
    upload = blob(1 << 20)
    with files_of_at_most(512 << 10), pytest.raises(StoreUnavailable, match="File too large"):
        put(disk, "e2e", upload)
    assert list((root / "tmp").iterdir()) == []
    assert not blob_path(root, upload).exists()
    assert sorted(disk.get_task(TENANT, "e2e").versions) == [1]
    assert put(disk, "e2e", upload).version.version == 2


def test_a_disk_too_full_for_a_record_is_unavailable_and_changes_nothing(
    root: Path, disk: DiskStore, blob: MakeBlob
) -> None:
    before = put(disk, "e2e", blob()).task
    replica = Replica(disk)
    size = (root / "tasks.db-wal").stat().st_size
    with files_of_at_most(size), pytest.raises(StoreUnavailable, match=f"{root}/tasks.db"):
        disk.update_task(TENANT, "e2e", {"description": "x" * 20_000})
    replica.follow()
    assert disk.get_task(TENANT, "e2e") == before
    assert (replica.resets, replica.tasks) == (1, {(TENANT, "e2e"): before})
    assert disk.update_task(TENANT, "e2e", {"description": "x"}).description == "x"


def test_what_is_acknowledged_is_on_the_device(disk: DiskStore) -> None:
    """FULL: the log is fsynced at each commit; SQLite's builds differ in what they do unasked."""
    with disk._records.reading() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_folder_that_vanished_is_unavailable(root: Path, disk: DiskStore, blob: MakeBlob) -> None:
    upload = blob()
    put(disk, "e2e", upload)
    shutil.rmtree(root)
    for call in (
        disk.ping,
        disk.all_tasks,
        lambda: disk.get_task(TENANT, "e2e"),
        lambda: disk.list_tasks(TENANT),
        lambda: disk.read_blob(TENANT, upload.sha256),
        disk.collect_garbage,
        lambda: disk.events(None, timeout=0),
        lambda: put(disk, "e2e", upload),
        lambda: disk.update_task(TENANT, "e2e", {}),
    ):
        with pytest.raises(StoreUnavailable, match=str(root)):
            call()


def test_a_file_in_the_place_of_the_folder_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(StoreUnavailable, match=str(tmp_path / "file")):
            DiskStore(path)


def test_a_missing_upload_is_unavailable(disk: DiskStore, tmp_path: Path) -> None:
    upload = make_blob(tmp_path, 10)
    os.unlink(upload.path)
    with pytest.raises(StoreUnavailable, match=str(upload.path)):
        put(disk, "e2e", upload)
