"""A store in a folder, shared by any number of threads and processes of one machine.

::

    tenants/<tenant>/tasks/<task>.json           a TaskRecord, replaced as a whole
    tenants/<tenant>/blobs/<sha256>.safetensors  the prefixes
    events.log                                   the feed (disk_feed.py)
    lock                                         flock and intent (disk_lock.py)
    tmp/                                         files being written

A publication copies the blob to ``tmp/`` and fsyncs it; then, under the lock: intent, rename of the
blob, rename of the record (the one step that makes it visible), event, intent cleared. Killed
anywhere, the store is in the old state or in the new one, and the feed tells which.
"""

from __future__ import annotations

import logging
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from prefixd_store.base import (
    Change,
    RecordStore,
    check_limit,
    check_sha256,
    damaged_record,
    is_sha256,
    make_change,
)
from prefixd_store.disk_feed import EventLog, NotLines
from prefixd_store.disk_files import (
    TempFile,
    make_folder,
    os_errors,
    read_file,
    read_hashed,
    remove_file,
    replace_file,
    stage_copy,
    sweep,
    temp_file,
)
from prefixd_store.disk_lock import HeldLock, StoreLock
from prefixd_store.errors import CorruptBlob, NotFound, PrefixdError, StoreUnavailable
from prefixd_store.mutations import Mutation, blobs_of, decode
from prefixd_store.records import Event, TaskRecord, VersionRecord, check_name
from prefixd_store.store import TaskPage

__all__ = ["DiskStore"]

_log = logging.getLogger(__name__)

_Stamp = tuple[int, int, int]


class DiskStore(RecordStore):
    """``max_log_bytes``: when the feed starts a new generation. ``poll_seconds``: how often a
    waiting :meth:`events` looks."""

    def __init__(
        self, root: Path, *, max_log_bytes: int = 4 << 20, poll_seconds: float = 0.1
    ) -> None:
        self.root = root.expanduser().absolute()
        self._tmp = self.root / "tmp"
        self._tenants = self.root / "tenants"
        self._poll_seconds = poll_seconds
        self._lock = StoreLock(self.root / "lock")
        self._feed = EventLog(self.root / "events.log", self._tmp, max_log_bytes)
        self._durable: set[Path] = set()
        self._read_at: tuple[str | None, _Stamp | None] = (None, None)
        """a cursor with nothing after it while the feed's stamp is this one"""
        with os_errors():
            self._make_folder(self._tmp)
            self._make_folder(self._tenants)
            sweep(self._tmp)
            with self._exclusive():
                self._feed.ensure()

    # --- tasks -----------------------------------------------------------------------------------
    @os_errors()
    def list_tasks(
        self, tenant: str, *, prefix: str = "", limit: int = 100, cursor: str | None = None
    ) -> TaskPage:
        check_limit(limit)
        names = self._task_names(check_name(tenant, param="tenant"))
        names = names[bisect_right(names, cursor) :] if cursor else names
        names = [name for name in names if name.startswith(prefix)]
        page = names[:limit]
        more = page[-1] if len(names) > limit else None
        return TaskPage(list(self._readable(tenant, page)), more)

    @os_errors()
    def all_tasks(self) -> list[TaskRecord]:
        tenants = _valid_names(path.name for path in self._tenants.iterdir())
        return [task for t in tenants for task in self._readable(t, self._task_names(t))]

    def _task_names(self, tenant: str) -> list[str]:
        try:
            files = os.listdir(self._tenants / tenant / "tasks")
        except (FileNotFoundError, NotADirectoryError):
            self._require_root()
            return []
        # Only the last suffix is ours: a task called "a.json" is the file "a.json.json".
        return _valid_names(file[: -len(".json")] for file in files if file.endswith(".json"))

    def _readable(self, tenant: str, names: list[str]) -> Iterator[TaskRecord]:
        for name in names:
            try:
                task = self._find(tenant, name)
            except StoreUnavailable as error:
                if error.code != "corrupt_record":
                    raise
                _log.error("left out of the list: %s", error)
                continue
            if task is not None:
                yield task

    @os_errors()
    def _find(self, tenant: str, task: str) -> TaskRecord | None:
        path = self._record_path(tenant, task)
        try:
            return decode(read_file(path), tenant, task)
        except FileNotFoundError:
            self._require_root()
            return None
        except ValueError as error:
            raise damaged_record(str(path), error) from None

    # --- changes ---------------------------------------------------------------------------------
    @os_errors()
    def _apply(self, tenant: str, task: str, mutation: Mutation) -> Change:
        return self._commit(tenant, task, mutation, None, "")

    @os_errors()
    def _publish(
        self, tenant: str, task: str, mutation: Mutation, blob: Path, version: VersionRecord
    ) -> Change:
        with temp_file(self._tmp) as staged:
            stage_copy(blob, staged, version.sha256)
            return self._commit(tenant, task, mutation, staged, version.sha256)

    def _commit(
        self, tenant: str, task: str, mutation: Mutation, staged: TempFile | None, sha256: str
    ) -> Change:
        with self._exclusive() as lock:
            change = make_change(self._find(tenant, task), mutation)
            if staged is not None:
                # Even where the blob exists: the same bytes, so this heals one that was damaged.
                target = self._blob_path(tenant, sha256)
                self._make_folder(target.parent)
                staged.publish(target)
            if change.after is not change.before:
                lock.write_intent(tenant, task)
                self._replace_record(tenant, task, change)
                self._tell(tenant, task, change.after)
                lock.clear_intent()
            return change

    def _replace_record(self, tenant: str, task: str, change: Change) -> None:
        for sha256 in change.released:
            self._start_grace(tenant, sha256)
        path = self._record_path(tenant, task)
        if change.after is None:
            remove_file(path)
        else:
            self._make_folder(path.parent)
            replace_file(self._tmp, path, change.encoded)

    def _start_grace(self, tenant: str, sha256: str) -> None:
        try:
            os.utime(self._blob_path(tenant, sha256))
        except FileNotFoundError:
            _log.error("%s is missing", self._blob_path(tenant, sha256))

    def _tell(self, tenant: str, task: str, record: TaskRecord | None) -> None:
        revision = record.revision if record else 0
        kind: Literal["put", "delete"] = "put" if record else "delete"
        self._feed.append(Event(cursor="", kind=kind, tenant=tenant, task=task, revision=revision))

    @contextmanager
    def _exclusive(self) -> Iterator[HeldLock]:
        with self._lock.hold() as lock:
            assert lock is not None
            self._recover(lock)
            yield lock

    def _recover(self, lock: HeldLock) -> None:
        """Tell the feed what a writer that died may have changed without telling."""
        intent = lock.read_intent()
        if intent is None:
            return
        tenant, task = intent
        try:
            self._tell(tenant, task, self._find(tenant, task))
        except StoreUnavailable as error:
            if error.code != "corrupt_record":
                raise
            _log.error("%s", error)
        lock.clear_intent()

    # --- blobs -----------------------------------------------------------------------------------
    @os_errors()
    def read_blob(
        self, tenant: str, sha256: str, *, progress: Callable[[int], None] | None = None
    ) -> memoryview:
        """``progress`` is called with the number of bytes of each piece as it arrives."""
        path = self._blob_path(check_name(tenant, param="tenant"), check_sha256(sha256))
        try:
            data, found = read_hashed(path, progress)
        except FileNotFoundError:
            self._require_root()
            raise NotFound(f"blob {sha256} does not exist", param="sha256") from None
        if found != sha256:
            error = CorruptBlob(
                f"blob {path} ({len(data)} bytes) hashes to {found}, not to its name"
            )
            _log.error("%s", error)
            raise error
        return data

    # --- upkeep ----------------------------------------------------------------------------------
    @os_errors()
    def events(self, after: str | None, *, timeout: float) -> list[Event]:
        deadline = time.monotonic() + timeout
        while True:
            # Taken before the log is read: what comes after it changes the next one.
            stamp = self._stamp()
            found = []
            if stamp is None or self._read_at != (after, stamp):
                found = self._read_feed(after)
                if not found:
                    self._read_at = (after, stamp)
                elif stamp and self._feed.is_end(found[-1].cursor, stamp):
                    self._read_at = (found[-1].cursor, stamp)
            remaining = deadline - time.monotonic()
            if found or remaining <= 0:
                return found
            time.sleep(min(self._poll_seconds, remaining))

    def _stamp(self) -> _Stamp | None:
        """The feed's while nobody is at work; None: it is to be read."""
        return None if self._lock.has_intent() else self._feed.stamp()

    def _read_feed(self, after: str | None) -> list[Event]:
        if self._lock.has_intent():
            # Either somebody is at work and will tell, or has died and we tell for them.
            with self._lock.hold(wait=False) as lock:
                if lock is not None:
                    self._recover(lock)
        try:
            return self._feed.read(after)
        except (FileNotFoundError, NotLines):
            with self._exclusive():
                self._feed.ensure()
            return self._feed.read(after)

    @os_errors()
    def ping(self) -> None:
        self._read_feed(None)
        if not os.access(self._tmp, os.W_OK):
            raise StoreUnavailable(f"the disk store cannot write to {self._tmp}")

    @os_errors()
    def collect_garbage(self, *, grace_seconds: float = 60.0) -> int:
        freed = sweep(self._tmp)
        for tenant in _valid_names(path.name for path in self._tenants.iterdir()):
            with self._exclusive():
                freed += self._collect_tenant(tenant, time.time() - grace_seconds)
        return freed

    def _collect_tenant(self, tenant: str, cutoff: float) -> int:
        try:
            used = {
                sha for n in self._task_names(tenant) for sha in blobs_of(self._find(tenant, n))
            }
            blobs = list((self._tenants / tenant / "blobs").glob("*.safetensors"))
        except FileNotFoundError:
            self._require_root()
            return 0
        except PrefixdError as error:
            # A record that cannot be read may name any blob.
            _log.error("no garbage of tenant %s is collected: %s", tenant, error)
            return 0
        freed = 0
        for path in blobs:
            stat = path.stat()
            if is_sha256(path.stem) and path.stem not in used and stat.st_mtime <= cutoff:
                path.unlink()
                freed += stat.st_size
        return freed

    def close(self) -> None:
        """Nothing is held between calls."""

    # --- paths -----------------------------------------------------------------------------------
    def _record_path(self, tenant: str, task: str) -> Path:
        return self._tenants.joinpath(tenant, "tasks", f"{task}.json")

    def _blob_path(self, tenant: str, sha256: str) -> Path:
        return self._tenants.joinpath(tenant, "blobs", f"{sha256}.safetensors")

    def _require_root(self) -> None:
        """Tell a task that is not there from a disk that is not there."""
        os.stat(self._tenants)

    def _make_folder(self, folder: Path) -> None:
        """Create ``folder`` durably. One that exists may be without its creator's fsync of the
        parent (it died), so the first use by each process does that again."""
        if folder in self._durable and folder.is_dir():
            return
        if folder != self.root:
            self._make_folder(folder.parent)
        make_folder(folder)
        self._durable.add(folder)


def _valid_names(names: Iterator[str]) -> list[str]:
    """Those that may be names, in order; whatever else lies in the folder is not ours."""
    return sorted(name for name in names if _is_name(name))


def _is_name(name: str) -> bool:
    try:
        check_name(name)
    except PrefixdError:
        return False
    return True
