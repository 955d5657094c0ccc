"""What only the disk store can do wrong: torn files, litter, damaged records, a failing disk."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from prefixd_store import disk_records
from prefixd_store.disk import DiskStore
from prefixd_store.disk_files import sweep, temp_file
from prefixd_store.errors import CorruptBlob, StoreUnavailable
from prefixd_store.store import open_store
from tests.prefixd_store.support import TENANT, Blob, MakeBlob, Replica, in_sqlite, make_blob, put


def blob_path(root: Path, blob: Blob) -> Path:
    return root / f"tenants/{TENANT}/blobs/{blob.sha256}.safetensors"


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
    ((a,),) = in_sqlite(root, "SELECT record FROM tasks WHERE name = 'a'")
    damaged = a if content == "elsewhere" else content.encode()
    in_sqlite(root, "UPDATE tasks SET record = ? WHERE name = 'b'", damaged)

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


def test_two_servers_may_collect_the_same_garbage(
    root: Path, disk: DiskStore, blob: MakeBlob, monkeypatch: pytest.MonkeyPatch
) -> None:
    litter = [blob(10), blob(10)]
    for upload in litter:
        put(disk, "gone", upload)
    disk.delete_task(TENANT, "gone")
    freed_by_other = []
    unused = DiskStore._unused

    def unused_and_collected(store: DiskStore, *arguments: Any) -> dict[Path, int]:
        """The other server is faster: between this one's looks, and amid its listing."""
        found = unused(store, *arguments)
        monkeypatch.setattr(DiskStore, "_unused", unused)
        freed_by_other.append(DiskStore(root).collect_garbage(grace_seconds=0))
        return found

    monkeypatch.setattr(DiskStore, "_unused", unused_and_collected)
    assert disk.collect_garbage(grace_seconds=0) == 0
    assert freed_by_other == [20]

    listed = [blob_path(root, upload) for upload in litter]
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: iter(listed))
    assert disk._unused(TENANT, set(), float("inf")) == {}


@pytest.mark.parametrize("between", ["published", "released", "damaged"])
def test_what_changes_while_garbage_is_looked_for_is_kept(
    root: Path, disk: DiskStore, blob: MakeBlob, monkeypatch: pytest.MonkeyPatch, between: str
) -> None:
    litter, upload = blob(10), blob(10)
    put(disk, "gone", litter)
    disk.delete_task(TENANT, "gone")
    put(disk, "e2e", upload)
    disk.delete_task(TENANT, "e2e")
    read = disk_records.RecordFile.of_tenant

    def read_and_change(records: disk_records.RecordFile, tenant: str) -> tuple[int, list[Any]]:
        found = read(records, tenant)
        if between == "published":
            put(disk, "e2e", upload)
        elif between == "released":
            put(disk, "e2e", upload)
            disk.delete_task(TENANT, "e2e")
        else:
            put(disk, "e2e", upload)
            in_sqlite(root, "UPDATE tasks SET record = '{' WHERE name = 'e2e'")
        return found

    monkeypatch.setattr(disk_records.RecordFile, "of_tenant", read_and_change)
    freed = disk.collect_garbage(grace_seconds=0)
    assert blob_path(root, upload).exists()
    assert blob_path(root, litter).exists() == (between == "damaged")
    assert freed == (0 if between == "damaged" else 10)


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
