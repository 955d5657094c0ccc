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
from contextlib import closing, contextmanager
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
_BUSY_S = 30.0
_READ_LIMIT = 1000
_TRIM_EVERY = 1000


class Row(NamedTuple):
    tenant: str
    name: str
    record: bytes


class RecordFile:
    """One connection, which threads share. Raises OSError and sqlite3.Error.

    The feed keeps about ``max_events``. A new file begins with the records that ``first`` gives.
    """

    def __init__(self, path: Path, max_events: int, first: Callable[[], Iterable[Row]]) -> None:
        self._path = path
        self._max_events = max_events
        self._turn = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._generation = ""
        _make_tables(path, first)
        with self.reading():
            pass

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        with self._turn:
            yield self._opened()

    @contextmanager
    def changing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that excludes others' changes from its beginning; nothing on an error."""
        with self._turn:
            connection = self._opened()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        with self._turn:
            self._close()

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

    def of_tenant(self, connection: sqlite3.Connection, tenant: str) -> list[Row]:
        query = "SELECT tenant, name, record FROM tasks WHERE tenant = ?"
        return [Row(*row) for row in connection.execute(query, (tenant,))]

    # --- within a change -------------------------------------------------------------------------
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
        with self.reading() as connection:
            number = self._number(after)
            rows = connection.execute(query, (number, _READ_LIMIT + 1)).fetchall()
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

    # --- the file --------------------------------------------------------------------------------
    def _opened(self) -> sqlite3.Connection:
        # A connection outlives its file: what it then wrote would be lost.
        found = os.stat(self._path)
        if self._connection is None or self._file != (found.st_dev, found.st_ino):
            self._close()
            self._connection, self._file = self._connect(), (found.st_dev, found.st_ino)
        return self._connection

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self._path.as_uri()}?mode=rw",
            uri=True,
            timeout=_BUSY_S,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            (layout,) = connection.execute("PRAGMA user_version").fetchone()
            if layout != _LAYOUT:
                raise StoreUnavailable(f"{self._path} has layout {layout}, not {_LAYOUT}")
            connection.execute("PRAGMA synchronous = FULL")
            # With the inode: a cursor is of no use to a copy that was put in the file's place.
            (generation,) = connection.execute("SELECT id FROM generation").fetchone()
            self._generation = f"{generation}{os.stat(self._path).st_ino:x}"
        except BaseException:
            connection.close()
            raise
        return connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def find(connection: sqlite3.Connection, tenant: str, name: str) -> Row | None:
    query = "SELECT tenant, name, record FROM tasks WHERE tenant = ? AND name = ?"
    row = connection.execute(query, (tenant, name)).fetchone()
    return Row(*row) if row else None


def _make_tables(path: Path, first: Callable[[], Iterable[Row]]) -> None:
    """In a new file, or one whose creator died; who comes at the same time waits."""
    with closing(sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)) as connection:
        _set_wal_mode(connection)
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute("PRAGMA user_version").fetchone() == (0,):
            for statement in _TABLES:
                connection.execute(statement)
            connection.executemany("INSERT INTO tasks VALUES (?, ?, ?)", first())
            connection.execute("INSERT INTO generation VALUES (?)", (uuid.uuid4().hex,))
            connection.execute(f"PRAGMA user_version = {_LAYOUT}")
        connection.execute("COMMIT")
    fsync_folder(path.parent)


def _set_wal_mode(connection: sqlite3.Connection) -> None:
    """Kept in the file. SQLite does not wait for others with this one, so we do."""
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)
