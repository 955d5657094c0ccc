"""The disk store's records and its feed of changes: one SQLite file, in WAL mode.

A change is one transaction: the record and the event that tells of it are there together or not at
all, and on the device when it returns. SQLite excludes other threads' and processes' changes.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from prefixd_store.disk_files import fsync_folder
from prefixd_store.errors import StoreUnavailable
from prefixd_store.records import Event

__all__ = ["RecordFile", "Row", "find"]

_LAYOUT = 1
"""of the tables below; SQLite's ``user_version``"""

_TABLES = (
    "CREATE TABLE tasks (tenant TEXT, name TEXT, record BLOB NOT NULL, PRIMARY KEY (tenant, name))"
    " WITHOUT ROWID",
    "CREATE TABLE events (id INTEGER PRIMARY KEY,"
    " kind TEXT NOT NULL, tenant TEXT NOT NULL, task TEXT NOT NULL, revision INTEGER NOT NULL)",
    "CREATE TABLE generation (id TEXT NOT NULL)",
    # Every cursor names an event, the first one this.
    "INSERT INTO events VALUES (1, 'reset', '', '', 0)",
)
_BUSY_S = 4.0
"""how long a change waits for others'; shorter than a request waits for the store"""
_READ_LIMIT = 1000
_TRIM_EVERY = 1000


class Row(NamedTuple):
    tenant: str
    name: str
    record: bytes


class RecordFile:
    """A connection that reads and one that changes, which threads share.

    The feed keeps about ``max_events``. A new file begins with the records that ``first`` gives.
    Raises StoreUnavailable, OSError and sqlite3.Error.
    """

    def __init__(self, path: Path, max_events: int, first: Callable[[], Iterable[Row]]) -> None:
        assert max_events > 0, max_events
        self._max_events = max_events
        _make_tables(path, first)
        # Apart: whoever waits to change something, or for the device, keeps no reader waiting.
        self._reader, self._writer = _Connection(path), _Connection(path)
        with self.reading() as connection:
            (generation,) = connection.execute("SELECT id FROM generation").fetchone()
        # With the file's number: another file may be a copy of this one.
        self._generation = f"{generation}{os.stat(path).st_ino:x}"

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        with self._reader.turn() as connection:
            self._reader.check()
            yield connection

    @contextmanager
    def changing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that excludes others' changes from its beginning; nothing on an error."""
        with self._writer.turn() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                self._writer.check()
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        self._reader.close()
        self._writer.close()

    # --- records ---------------------------------------------------------------------------------
    def find(self, tenant: str, name: str) -> Row | None:
        with self.reading() as connection:
            return find(connection, tenant, name)

    def all(self) -> list[Row]:
        with self.reading() as connection:
            query = "SELECT tenant, name, record FROM tasks ORDER BY tenant, name"
            return [Row(*row) for row in connection.execute(query)]

    def page(self, tenant: str, prefix: str, after: str, limit: int) -> list[Row]:
        """At most ``limit`` tasks by name, whose names begin with ``prefix``, after ``after``."""
        query = """
            SELECT tenant, name, record FROM tasks
            WHERE tenant = :tenant AND name > :after AND name >= :prefix
            AND substr(name, 1, length(:prefix)) = :prefix ORDER BY name LIMIT :limit
        """
        given = {"tenant": tenant, "prefix": prefix, "after": after, "limit": limit}
        with self.reading() as connection:
            return [Row(*row) for row in connection.execute(query, given)]

    def of_tenant(self, tenant: str) -> tuple[int, list[Row]]:
        """All of a tenant's, and the number of an event after which they may have changed."""
        query = "SELECT tenant, name, record FROM tasks WHERE tenant = ?"
        with self.reading() as connection:
            (last,) = connection.execute("SELECT max(id) FROM events").fetchone()
            return last, [Row(*row) for row in connection.execute(query, (tenant,))]

    # --- within a change -------------------------------------------------------------------------
    def changed_since(self, connection: sqlite3.Connection, tenant: str, event: int) -> list[Row]:
        query = """
            SELECT DISTINCT tasks.tenant, name, record FROM tasks
            JOIN events ON events.tenant = tasks.tenant AND events.task = name
            WHERE tasks.tenant = ? AND events.id > ?
        """
        return [Row(*row) for row in connection.execute(query, (tenant, event))]

    def put(self, connection: sqlite3.Connection, row: Row, revision: int) -> None:
        connection.execute("REPLACE INTO tasks VALUES (?, ?, ?)", row)
        self._tell(connection, ("put", row.tenant, row.name, revision))

    def delete(self, connection: sqlite3.Connection, tenant: str, name: str) -> None:
        connection.execute("DELETE FROM tasks WHERE tenant = ? AND name = ?", (tenant, name))
        self._tell(connection, ("delete", tenant, name, 0))

    def _tell(self, connection: sqlite3.Connection, event: tuple[str, str, str, int]) -> None:
        query = "INSERT INTO events (kind, tenant, task, revision) VALUES (?, ?, ?, ?)"
        last = connection.execute(query, event).lastrowid
        assert last is not None
        if last % min(_TRIM_EVERY, self._max_events) == 0:
            connection.execute("DELETE FROM events WHERE id <= ?", (last - self._max_events,))

    # --- the feed --------------------------------------------------------------------------------
    def events(self, after: str | None) -> list[Event]:
        """Those after a cursor; one ``reset`` where that is none of this file's, or too old."""
        query = """
            SELECT id, kind, tenant, task, revision FROM events WHERE id >= ? ORDER BY id LIMIT ?
        """
        number = self._number(after)
        with self.reading() as connection:
            if number:
                rows = connection.execute(query, (number, _READ_LIMIT + 1)).fetchall()
                with suppress(ValueError):  # a row that somebody has damaged
                    if rows and rows[0][0] == number:
                        return [self._event(*row) for row in rows[1:]]
            (last,) = connection.execute("SELECT max(id) FROM events").fetchone()
            return [self._event(last, "reset")]

    def _event(self, number: int, kind: Any, tenant: str = "", task: str = "", n: int = 0) -> Event:
        cursor = f"{self._generation}:{number}"
        return Event(cursor=cursor, kind=kind, tenant=tenant, task=task, revision=n)

    def _number(self, cursor: str | None) -> int:
        """Of a cursor's event; 0, which none has, where the cursor is none of this file's."""
        generation, _, number = (cursor or "").partition(":")
        known = generation == self._generation and number.isascii() and number.isdigit()
        return int(number) if known and len(number) < 19 else 0


class _Connection:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._turn = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._file = (0, 0)

    @contextmanager
    def turn(self) -> Iterator[sqlite3.Connection]:
        if not self._turn.acquire(timeout=_BUSY_S):
            raise StoreUnavailable(f"{self._path} was busy for {_BUSY_S:g} s")
        try:
            if self._connection is None:
                self._connection, self._file = self._connect(), self._present()
            yield self._connection
        finally:
            self._turn.release()

    def check(self) -> None:
        """A connection outlives its file: what it then wrote would be lost."""
        if self._present() != self._file:
            raise StoreUnavailable(f"{self._path} was replaced while in use; start again")

    def close(self) -> None:
        with self._turn:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _present(self) -> tuple[int, int]:
        found = os.stat(self._path)
        return found.st_dev, found.st_ino

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self._path.as_uri()}?mode=rw",
            uri=True,
            timeout=_BUSY_S,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            if (layout := _layout(connection)) != _LAYOUT:
                raise StoreUnavailable(f"{self._path} has layout {layout}, not {_LAYOUT}")
            connection.execute("PRAGMA synchronous = FULL")
        except BaseException:
            connection.close()
            raise
        return connection


def find(connection: sqlite3.Connection, tenant: str, name: str) -> Row | None:
    query = "SELECT tenant, name, record FROM tasks WHERE tenant = ? AND name = ?"
    row = connection.execute(query, (tenant, name)).fetchone()
    return Row(*row) if row else None


def _make_tables(path: Path, first: Callable[[], Iterable[Row]]) -> None:
    """In a new file, or one whose creator died; who comes at the same time waits."""
    with closing(sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)) as connection:
        _set_wal_mode(connection)
        if _layout(connection) != 0:
            return
        connection.execute("BEGIN IMMEDIATE")
        if _layout(connection) == 0:
            for statement in _TABLES:
                connection.execute(statement)
            connection.executemany("INSERT INTO tasks VALUES (?, ?, ?)", first())
            connection.execute("INSERT INTO generation VALUES (?)", (uuid.uuid4().hex,))
            connection.execute(f"PRAGMA user_version = {_LAYOUT}")
        connection.execute("COMMIT")
    fsync_folder(path.parent)


def _layout(connection: sqlite3.Connection) -> int:
    (layout,) = connection.execute("PRAGMA user_version").fetchone()
    return int(layout)


def _set_wal_mode(connection: sqlite3.Connection) -> None:
    """Kept in the file. SQLite does not wait for others with this one, so we do."""
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            if mode != "wal":
                raise StoreUnavailable(f"SQLite cannot keep a write-ahead log here, only {mode}")
            return
