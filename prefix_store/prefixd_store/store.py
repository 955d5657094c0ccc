"""The contract of a prefix store: content-addressed blobs, task records and a feed of changes.

Two stores implement it, :mod:`prefixd_store.disk` and :mod:`prefixd_store.redis_store`;
:func:`open_store` picks one from a URL. All methods are synchronous and thread-safe, may block on
input/output, and raise only :class:`~prefixd_store.errors.PrefixdError` (a broken connection or
disk is :class:`~prefixd_store.errors.StoreUnavailable`).

Every mutation is atomic and durable before it returns, bumps the record's revision and appends one
:class:`~prefixd_store.records.Event`. ``if_match`` is an ETag (``record.etag``), ``"*"`` (must
exist), ``"!*"`` (must not exist: a create-only upload) or None (unconditional); a mismatch raises
:class:`~prefixd_store.errors.Conflict`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prefixd_store.errors import StoreUnavailable
from prefixd_store.records import Event, TaskRecord, VersionRecord

__all__ = ["PutResult", "Store", "TaskPage", "open_store"]


class PutResult(NamedTuple):
    task: TaskRecord
    version: VersionRecord
    created: bool
    """False: these bytes already are a version of the task, and that version is returned"""


class TaskPage(NamedTuple):
    tasks: list[TaskRecord]
    next_cursor: str | None


class Store(ABC):
    # --- tasks -----------------------------------------------------------------------------------
    @abstractmethod
    def get_task(self, tenant: str, task: str) -> TaskRecord:
        """Raises NotFound."""

    @abstractmethod
    def list_tasks(
        self, tenant: str, *, prefix: str = "", limit: int = 100, cursor: str | None = None
    ) -> TaskPage:
        """Tasks in order of name, those after ``cursor`` (the last name of the page before)."""

    @abstractmethod
    def all_tasks(self) -> list[TaskRecord]:
        """Every tenant's tasks, for a replica that starts or missed events."""

    @abstractmethod
    def put_version(
        self,
        tenant: str,
        task: str,
        blob: Path,
        version: VersionRecord,
        *,
        activate: bool = True,
        if_match: str | None = None,
    ) -> PutResult:
        """Publish ``blob`` (a local file in our format, already validated) as a new version.

        ``version.version`` is ignored; the store numbers it. ``version.sha256`` and
        ``version.bytes`` are the blob's own. The task is created when it does not exist. The same
        bytes as an existing version of the task: nothing new is stored, but ``activate`` is
        honoured.
        """

    @abstractmethod
    def activate(
        self, tenant: str, task: str, split: Mapping[int, float], *, if_match: str | None = None
    ) -> TaskRecord:
        """Replace the split. Every version must exist; weights must be positive and sum to 1."""

    @abstractmethod
    def update_task(
        self, tenant: str, task: str, changes: Mapping[str, Any], *, if_match: str | None = None
    ) -> TaskRecord:
        """Replace any of ``description``, ``pinned``, ``defaults``."""

    @abstractmethod
    def delete_version(
        self, tenant: str, task: str, version: int, *, if_match: str | None = None
    ) -> TaskRecord:
        """Conflict if the version takes traffic and others exist; deleting the last deletes nothing
        but the version: the task stays, with nothing active."""

    @abstractmethod
    def delete_task(self, tenant: str, task: str, *, if_match: str | None = None) -> None: ...

    # --- blobs -----------------------------------------------------------------------------------
    @abstractmethod
    def read_blob(
        self, tenant: str, sha256: str, *, progress: Callable[[int], None] | None = None
    ) -> memoryview:
        """The whole blob, in writable memory, checked against its SHA-256. Raises NotFound,
        CorruptBlob."""

    # --- upkeep ----------------------------------------------------------------------------------
    @abstractmethod
    def events(self, after: str | None, *, timeout: float) -> list[Event]:
        """Events after cursor ``after`` (None: from now on), waiting up to ``timeout`` seconds.

        With None the answer is one ``reset`` event that carries the present cursor.
        """

    @abstractmethod
    def ping(self) -> None:
        """Raise StoreUnavailable if the store cannot serve now."""

    @abstractmethod
    def collect_garbage(self, *, grace_seconds: float = 60.0) -> int:
        """Free blobs that no version names and that were written or released over ``grace_seconds``
        ago (a replica may still be loading one for a request in flight). Returns bytes freed."""

    @abstractmethod
    def close(self) -> None: ...


def open_store(url: str, **options: Any) -> Store:
    """``redis://``, ``rediss://``, ``unix://``, ``redis+sentinel://`` and ``redis+cluster://`` open
    Redis; ``file://`` or a path is a folder, created when missing. Raises StoreUnavailable for
    another scheme, and what opening raises."""
    scheme = url.split("://", 1)[0] if "://" in url else "file"
    if scheme in {"redis", "rediss", "unix"} or scheme.startswith(("redis+", "rediss+")):
        from prefixd_store.redis_store import RedisStore

        return RedisStore.from_url(url, **options)
    if scheme != "file":
        raise StoreUnavailable(
            f"store {url}: {scheme}:// is none of redis://, rediss://, unix://,"
            " redis+sentinel://, redis+cluster://, file://"
        )
    from prefixd_store.disk import DiskStore

    return DiskStore(Path(url.removeprefix("file://")), **options)
