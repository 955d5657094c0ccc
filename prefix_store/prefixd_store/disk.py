"""A store in a folder, shared by any number of threads and processes of one machine.

::

    tasks.db                                     records and the feed, in SQLite (disk_records.py)
    tenants/<tenant>/blobs/<sha256>.safetensors  the prefixes
    tmp/                                         files being written

A publication copies the blob to ``tmp/`` and fsyncs it; then, within a transaction: rename of the
blob, fsync of its folder, record, event. Killed anywhere, the store is in the old state or in the
new one.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prefixd_store.base import (
    Change,
    RecordStore,
    check_limit,
    check_sha256,
    damaged_record,
    is_sha256,
    make_change,
)
from prefixd_store.disk_files import (
    TempFile,
    make_folder,
    read_hashed,
    stage_copy,
    sweep,
    temp_file,
)
from prefixd_store.disk_records import RecordFile, Row, find
from prefixd_store.errors import (
    CorruptBlob,
    InvalidRequest,
    NotFound,
    PrefixdError,
    StoreUnavailable,
)
from prefixd_store.mutations import Mutation, blobs_of, decode
from prefixd_store.records import Event, TaskRecord, VersionRecord, check_name
from prefixd_store.store import TaskPage

__all__ = ["DiskStore"]

_log = logging.getLogger(__name__)


class DiskStore(RecordStore):
    """The feed keeps about ``max_events``. ``poll_seconds``: how often a waiting :meth:`events`
    looks. Not to be used across a fork."""

    def __init__(self, root: Path, *, max_events: int = 100_000, poll_seconds: float = 0.1) -> None:
        self.root = root.expanduser().absolute()
        self._tmp = self.root / "tmp"
        self._tenants = self.root / "tenants"
        self._path = self.root / "tasks.db"
        self._poll_seconds = poll_seconds
        self._durable: set[Path] = set()
        with self._errors():
            self._make_folder(self._tmp)
            self._make_folder(self._tenants)
            sweep(self._tmp)
            self._records = RecordFile(self._path, max_events, self._of_earlier_versions)
            self._retire_earlier_records()

    # --- tasks -----------------------------------------------------------------------------------
    def list_tasks(
        self, tenant: str, *, prefix: str = "", limit: int = 100, cursor: str | None = None
    ) -> TaskPage:
        check_limit(limit)
        check_name(tenant, param="tenant")
        with self._errors():
            rows = self._records.page(tenant, prefix, cursor or "", limit + 1)
        more = rows[limit - 1].name if len(rows) > limit else None
        return TaskPage(list(self._readable(rows[:limit])), more)

    def all_tasks(self) -> list[TaskRecord]:
        with self._errors():
            return list(self._readable(self._records.all()))

    def _readable(self, rows: list[Row]) -> Iterator[TaskRecord]:
        for row in rows:
            try:
                yield self._decoded(row)
            except StoreUnavailable as error:
                _log.error("left out of the list: %s", error)

    def _find(self, tenant: str, task: str) -> TaskRecord | None:
        with self._errors():
            row = self._records.find(tenant, task)
        return row and self._decoded(row)

    def _decoded(self, row: Row) -> TaskRecord:
        try:
            check_name(row.name)
            return decode(row.record, row.tenant, row.name)
        except (ValueError, InvalidRequest) as error:
            where = f"{row.tenant}/{row.name} in {self._path}"
            raise damaged_record(where, error) from None

    # --- changes ---------------------------------------------------------------------------------
    def _apply(self, tenant: str, task: str, mutation: Mutation) -> Change:
        with self._errors():
            return self._commit(tenant, task, mutation, None, "")

    def _publish(
        self, tenant: str, task: str, mutation: Mutation, blob: Path, version: VersionRecord
    ) -> Change:
        with self._errors(), temp_file(self._tmp) as staged:
            stage_copy(blob, staged, version.sha256)
            return self._commit(tenant, task, mutation, staged, version.sha256)

    def _commit(
        self, tenant: str, task: str, mutation: Mutation, staged: TempFile | None, sha256: str
    ) -> Change:
        with self._records.changing() as connection:
            row = find(connection, tenant, task)
            change = make_change(row and self._decoded(row), mutation)
            if staged is not None:
                # Even where the blob exists: the same bytes, so this heals one that was damaged.
                target = self._blob_path(tenant, sha256)
                self._make_folder(target.parent)
                staged.publish(target)
            for released in change.released:
                self._start_grace(tenant, released)
            if change.after is None:
                self._records.delete(connection, tenant, task)
            elif change.after is not change.before:
                changed = Row(tenant, task, change.encoded)
                self._records.put(connection, changed, change.after.revision)
        return change

    def _start_grace(self, tenant: str, sha256: str) -> None:
        try:
            os.utime(self._blob_path(tenant, sha256))
        except FileNotFoundError:
            _log.error("%s is missing", self._blob_path(tenant, sha256))

    # --- blobs -----------------------------------------------------------------------------------
    def read_blob(
        self, tenant: str, sha256: str, *, progress: Callable[[int], None] | None = None
    ) -> memoryview:
        """``progress`` is called with the number of bytes of each piece as it arrives."""
        path = self._blob_path(check_name(tenant, param="tenant"), check_sha256(sha256))
        with self._errors():
            try:
                data, found = read_hashed(path, progress)
            except FileNotFoundError:
                os.stat(self._tenants)  # tells a blob that is not there from a disk that is not
                raise NotFound(f"blob {sha256} does not exist", param="sha256") from None
        if found != sha256:
            error = CorruptBlob(
                f"blob {path} ({len(data)} bytes) hashes to {found}, not to its name"
            )
            _log.error("%s", error)
            raise error
        return data

    # --- upkeep ----------------------------------------------------------------------------------
    def events(self, after: str | None, *, timeout: float) -> list[Event]:
        deadline = time.monotonic() + timeout
        while True:
            with self._errors():
                found = self._records.events(after)
            remaining = deadline - time.monotonic()
            if found or remaining <= 0:
                return found
            time.sleep(min(self._poll_seconds, remaining))

    def ping(self) -> None:
        self.events(None, timeout=0)
        if not os.access(self._tmp, os.W_OK):
            raise StoreUnavailable(f"the disk store cannot write to {self._tmp}")

    def collect_garbage(self, *, grace_seconds: float = 60.0) -> int:
        with self._errors():
            freed = sweep(self._tmp)
            for tenant in self._tenant_names():
                try:
                    freed += self._collect_tenant(tenant, time.time() - grace_seconds)
                except StoreUnavailable as error:
                    if error.code != "corrupt_record":
                        raise
                    # A record that cannot be read may name any blob.
                    _log.error("no garbage of tenant %s is collected: %s", tenant, error)
            return freed

    def _collect_tenant(self, tenant: str, cutoff: float) -> int:
        # All is read while others make changes; with them kept out, only what changed meanwhile.
        event, rows = self._records.of_tenant(tenant)
        used = self._blobs_of(rows)
        if not self._unused(tenant, used, cutoff):
            return 0
        with self._records.changing() as connection:
            used |= self._blobs_of(self._records.changed_since(connection, tenant, event))
            unused = self._unused(tenant, used, cutoff)
            for path in unused:
                path.unlink()
        return sum(unused.values())

    def _unused(self, tenant: str, used: set[str], cutoff: float) -> dict[Path, int]:
        """Blobs that nobody names and nobody touched since ``cutoff``, and their sizes."""
        sizes = {}
        for path in (self._tenants / tenant / "blobs").glob("*.safetensors"):
            if is_sha256(path.stem) and path.stem not in used:
                with suppress(FileNotFoundError):  # another server collects, too
                    stat = path.stat()
                    if stat.st_mtime <= cutoff:
                        sizes[path] = stat.st_size
        return sizes

    def _blobs_of(self, rows: list[Row]) -> set[str]:
        return {sha256 for row in rows for sha256 in blobs_of(self._decoded(row))}

    def close(self) -> None:
        with self._errors():
            self._records.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What the operating system or SQLite refuses is StoreUnavailable, with its reason."""
        try:
            yield
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            raise StoreUnavailable(
                f"the disk store failed: {error.strerror or error}{where}"
            ) from error
        except sqlite3.Error as error:
            raise StoreUnavailable(f"the disk store failed: {error}: {self._path}") from error

    def _of_earlier_versions(self) -> Iterator[Row]:
        """The records of a folder from the time when each was a JSON file."""
        paths = sorted(self._tenants.glob("*/tasks/*.json"))
        if not paths and next(self._tenants.glob("*/blobs/*"), None):
            raise StoreUnavailable(
                f"{self._tenants} holds prefixes, but {self._path}, which names their tasks, is"
                " missing: put it back, or move the prefixes away"
            )
        for path in paths:
            tenant, name = path.parts[-3], path.name.removesuffix(".json")
            if _is_name(tenant) and _is_name(name):
                yield Row(tenant, name, path.read_bytes())

    def _retire_earlier_records(self) -> None:
        """They are in the database: nobody is to take them in again, or for what is the case."""
        for folder in self._tenants.glob("*/tasks"):
            folder.rename(folder.with_name("tasks.taken-in"))

    # --- paths -----------------------------------------------------------------------------------
    def _tenant_names(self) -> list[str]:
        """Whatever else lies in the folder is not ours."""
        return sorted(filter(_is_name, os.listdir(self._tenants)))

    def _blob_path(self, tenant: str, sha256: str) -> Path:
        return self._tenants.joinpath(tenant, "blobs", f"{sha256}.safetensors")

    def _make_folder(self, folder: Path) -> None:
        """Create ``folder`` durably. One that exists may be without its creator's fsync of the
        parent (it died), so the first use by each process does that again."""
        if folder in self._durable and folder.is_dir():
            return
        if folder != self.root:
            self._make_folder(folder.parent)
        make_folder(folder)
        self._durable.add(folder)


def _is_name(name: str) -> bool:
    try:
        check_name(name)
    except PrefixdError:
        return False
    return True
