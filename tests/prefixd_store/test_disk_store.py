"""What only the disk store can do wrong: torn files, litter, damaged records, a failing disk."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import threading
from pathlib import Path

import pytest

from prefixd_store import disk_feed
from prefixd_store.disk import DiskStore
from prefixd_store.disk_files import make_folder, sweep, temp_file
from prefixd_store.disk_lock import StoreLock
from prefixd_store.errors import CorruptBlob, StoreUnavailable
from prefixd_store.records import Event
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


def record_path(root: Path, task: str) -> Path:
    return root / f"tenants/{TENANT}/tasks/{task}.json"


def test_layout(root: Path, disk: DiskStore, blob: MakeBlob) -> None:
    upload = blob()
    put(disk, "a.json", upload)
    files = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
    assert files == {
        f"tenants/default/blobs/{upload.sha256}.safetensors",
        "tenants/default/tasks/a.json.json",
        "events.log",
        "lock",
    }
    assert (root / "lock").read_bytes() == b""


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
    path = record_path(root, "b")
    path.write_text(record_path(root, "a").read_text() if content == "elsewhere" else content)

    with pytest.raises(StoreUnavailable, match=str(path)) as caught:
        disk.get_task(TENANT, "b")
    assert caught.value.code == "corrupt_record"
    assert [task.name for task in disk.list_tasks(TENANT).tasks] == ["a", "c"]
    assert [task.name for task in disk.all_tasks()] == ["a", "c"]
    assert str(path) in caplog.text
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
        root / f"tenants/{TENANT}/tasks/.e2e.json.swp",
        root / f"tenants/{TENANT}/tasks/UPPER.json",
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


def test_the_log_starts_anew_when_it_has_grown(root: Path, blob: MakeBlob) -> None:
    disk = DiskStore(root, max_log_bytes=2000)
    replica, sleeper = Replica(disk), Replica(DiskStore(root))
    put(disk, "e2e", blob())
    for n in range(100):
        disk.update_task(TENANT, "e2e", {"description": f"{n}"})
        replica.follow()
        assert (root / "events.log").stat().st_size < 2200
        assert replica.tasks[TENANT, "e2e"].description == f"{n}"
    assert replica.resets > 2
    sleeper.follow()
    assert (sleeper.resets, sleeper.tasks) == (2, replica.tasks)


def test_a_feed_longer_than_one_read_is_told_whole(
    disk: DiskStore, blob: MakeBlob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log stays as it is between the reads, which is no sign that all of it was read."""
    upload = blob()
    cursor = disk.events(None, timeout=0)[-1].cursor
    names = [f"task-{n}" for n in range(7)]
    for name in names:
        put(disk, name, upload)
    monkeypatch.setattr(disk_feed, "_READ_LIMIT", 150)  # two events and a torn one
    told: list[str] = []
    while events := disk.events(cursor, timeout=0):
        assert len(events) < len(names)
        told += [event.task for event in events]
        cursor = events[-1].cursor
    assert told == names


def test_what_was_read_to_its_end_is_not_read_again(
    disk: DiskStore, blob: MakeBlob, monkeypatch: pytest.MonkeyPatch
) -> None:
    cursor = disk.events(None, timeout=0)[-1].cursor
    put(disk, "a", blob())
    cursor = disk.events(cursor, timeout=0)[-1].cursor
    reads: list[str | None] = []
    read = disk_feed.EventLog.read

    def noting(log: disk_feed.EventLog, after: str | None) -> list[Event]:
        reads.append(after)
        return read(log, after)

    monkeypatch.setattr(disk_feed.EventLog, "read", noting)
    assert disk.events(cursor, timeout=0) == []
    assert reads == []
    put(disk, "b", blob())
    assert [event.task for event in disk.events(cursor, timeout=0)] == ["b"]
    assert reads == [cursor]


def test_a_torn_event_is_cut_off(root: Path, disk: DiskStore, blob: MakeBlob) -> None:
    replica = Replica(disk)
    put(disk, "e2e", blob())
    with (root / "events.log").open("ab") as log:
        log.write(b'{"kind":"put","ten')
    replica.follow()
    put(disk, "e2e", blob())
    replica.follow()
    assert replica.tasks == {(TENANT, "e2e"): disk.get_task(TENANT, "e2e")}
    assert replica.resets == 1


@pytest.mark.parametrize("damage", [b"garbage\n", b"7\n", b'{"kind":"odd"}\n'])
def test_a_damaged_event_resets_the_reader(
    root: Path, disk: DiskStore, blob: MakeBlob, damage: bytes
) -> None:
    replica = Replica(disk)
    with (root / "events.log").open("ab") as log:
        log.write(damage)
    put(disk, "e2e", blob())
    replica.follow()
    assert (replica.resets, list(replica.tasks)) == (2, [(TENANT, "e2e")])


@pytest.mark.parametrize("before", [0, 7, 33, 1 << 20])
@pytest.mark.parametrize("zeros", [0, 1, 4096, 10_000])
def test_what_a_power_loss_left_of_the_log_does_not_stop_the_feed(
    root: Path, disk: DiskStore, blob: MakeBlob, before: int, zeros: int
) -> None:
    put(disk, "e2e", blob())
    log = root / "events.log"
    log.write_bytes(log.read_bytes()[:before] + bytes(zeros))
    replica = Replica(disk)
    put(disk, "e2e", blob())
    put(disk, "other", blob())
    replica.follow()
    assert replica.tasks.keys() == {(TENANT, "e2e"), (TENANT, "other")}
    (event,) = disk.events(None, timeout=0)
    put(disk, "e2e", blob())
    (told,) = disk.events(event.cursor, timeout=0)
    assert (told.kind, told.task) == ("put", "e2e"), "no reset after reset"


@pytest.mark.parametrize("restored", ["missing", "empty"])
def test_a_store_restored_without_its_log_resets(
    root: Path, disk: DiskStore, blob: MakeBlob, restored: str
) -> None:
    put(disk, "e2e", blob())
    replica = Replica(disk)
    if restored == "missing":
        (root / "events.log").unlink()
    else:
        (root / "events.log").write_bytes(b"")
    (root / "lock").unlink()
    put(disk, "e2e", blob())
    replica.follow()
    assert replica.resets == 2
    assert replica.tasks == {(TENANT, "e2e"): disk.get_task(TENANT, "e2e")}


def test_a_missing_log_is_made_again_by_a_reader(root: Path, disk: DiskStore) -> None:
    (start,) = disk.events(None, timeout=0)
    (root / "events.log").unlink()
    (event,) = disk.events(start.cursor, timeout=0)
    assert event.kind == "reset"
    assert event.cursor != start.cursor


def test_the_lock_excludes_threads(root: Path) -> None:
    make_folder(root)
    lock = StoreLock(root / "lock")
    with lock.hold() as held, lock.hold(wait=False) as second:
        assert held is not None
        assert second is None
    with lock.hold(wait=False) as third:
        assert third is not None


def test_a_full_disk_is_unavailable_and_leaves_nothing(
    root: Path, disk: DiskStore, blob: MakeBlob
) -> None:
    put(disk, "e2e", blob())
    upload = blob(1 << 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512 << 10, hard))
    try:
        with pytest.raises(StoreUnavailable, match="File too large"):
            put(disk, "e2e", upload)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list((root / "tmp").iterdir()) == []
    assert not blob_path(root, upload).exists()
    assert sorted(disk.get_task(TENANT, "e2e").versions) == [1]
    assert put(disk, "e2e", upload).version.version == 2


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
