"""What the store tests share: backends, blobs, and a replica that only follows the feed."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import uuid
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import redis

from prefixd_store.errors import NotFound
from prefixd_store.records import TaskRecord, VersionRecord
from prefixd_store.store import PutResult, Store, open_store

TENANT = "default"
ROOT = Path(__file__).parents[2]
"""of the repository, where a child process finds this package"""


class Blob(NamedTuple):
    path: Path
    data: bytes
    version: VersionRecord

    @property
    def sha256(self) -> str:
        return self.version.sha256


MakeBlob = Callable[..., Blob]
"""of the fixture ``blob``"""


def make_blob(folder: Path, size: int) -> Blob:
    return blob_of(folder, os.urandom(size))


def blob_of(folder: Path, data: bytes) -> Blob:
    path = folder / f"upload-{uuid.uuid4().hex}"
    path.write_bytes(data)
    return Blob(path, data, version_record(data))


def version_record(data: bytes) -> VersionRecord:
    return VersionRecord(
        version=1,
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        num_virtual_tokens=20,
        query_offset=20,
        sites={"decoder": (2, 1, 20, 8)},
        dtype="float32",
        format="prefixd",
        provenance={"file": "prefix.safetensors", "steps": 300},
    )


def put(store: Store, task: str, blob: Blob, *, tenant: str = TENANT, **options: Any) -> PutResult:
    return store.put_version(tenant, task, blob.path, blob.version, **options)


@dataclass
class Backend:
    """Where a store is, whatever kind it is, and the handles that were opened on it."""

    url: str
    options: dict[str, Any] = field(default_factory=dict)
    handles: list[Store] = field(default_factory=list)

    @property
    def on_disk(self) -> bool:
        return "://" not in self.url

    def open(self, **options: Any) -> Store:
        store = open_store(self.url, **{**self.options, **options})
        self.handles.append(store)
        return store

    def close(self) -> None:
        for store in self.handles:
            store.close()


class Replica:
    """Knows of the tasks only what the feed makes it read, as a server does."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.tasks: dict[tuple[str, str], TaskRecord] = {}
        self.cursor: str | None = None
        self.resets = 0
        self.follow()

    def follow(self, timeout: float = 0.0) -> None:
        """Read the feed until it is silent for ``timeout`` seconds."""
        while events := self.store.events(self.cursor, timeout=timeout):
            for event in events:
                self.cursor = event.cursor
                if event.kind == "reset":
                    self.resets += 1
                    self.tasks = {(t.tenant, t.name): t for t in self.store.all_tasks()}
                else:
                    self._read(event.tenant, event.task)

    def _read(self, tenant: str, task: str) -> None:
        try:
            self.tasks[tenant, task] = self.store.get_task(tenant, task)
        except NotFound:
            self.tasks.pop((tenant, task), None)


def blob_keys(backend: Backend) -> list[str]:
    """The keys of every chunk in Redis, ``<namespace>:blob:<tenant>:<sha256>:<upload>:<index>``."""
    with redis.Redis.from_url(backend.url) as client:
        pattern = f"{backend.options['namespace']}:blob:*"
        return [key.decode() for key in client.scan_iter(pattern, count=1000)]


def in_sqlite(root: Path, query: str, *values: object) -> list[tuple[object, ...]]:
    """As somebody does with SQLite's own tool."""
    with closing(sqlite3.connect(root / "tasks.db")) as connection, connection:
        return connection.execute(query, values).fetchall()
