"""The disk store's feed of changes: one append-only log of JSON lines that readers poll.

The first line names the log's *generation*; a cursor is ``<generation>:<offset of the next
line>``. A log that has grown too long is replaced by an empty one of a new generation, and readers
of the old one are told to read everything anew. Appends happen under the store's lock, reads need
none: only complete lines count.

The log is for processes that run. A power loss may take its end, which nobody is left to miss, or
leave anything there: what is not lines is replaced, too.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from pathlib import Path
from typing import BinaryIO

from prefixd_store.disk_files import replace_file
from prefixd_store.records import Event

__all__ = ["EventLog", "NotLines"]

_READ_LIMIT = 1 << 20
_TAIL = 4096  # longer than any line: two names of at most 128 characters and a revision
_GENERATION = 32  # hex digits


class NotLines(Exception):
    """What a machine that lost its power left of the log."""


class EventLog:
    def __init__(self, path: Path, tmp: Path, max_bytes: int) -> None:
        self._path = path
        self._tmp = tmp
        self._max_bytes = max_bytes

    def ensure(self) -> None:
        """Start the log if there is none, or none that can go on. Needs the store's lock."""
        try:
            with self._path.open("rb") as log:
                _complete_end(log)
        except (FileNotFoundError, NotLines):
            self._start_generation()

    def append(self, event: Event) -> None:
        """Needs the store's lock. Cuts off the torn last line of a writer that died."""
        line = event.model_dump_json(exclude={"cursor"}).encode() + b"\n"
        try:
            written = self._append(line, self._max_bytes)
        except (FileNotFoundError, NotLines):
            written = False
        if not written:
            self._start_generation()
            self._append(line, sys.maxsize)

    def _append(self, line: bytes, most: int) -> bool:
        """False: the log has ``most`` bytes already. Raises FileNotFoundError, NotLines."""
        with self._path.open("r+b", buffering=0) as log:
            end = _complete_end(log)
            if end >= most:
                return False
            if log.tell() > end:  # a torn line
                log.truncate(end)
                log.seek(end)
            log.write(line)
            return True

    def stamp(self) -> tuple[int, int, int] | None:
        """Equal as long as there is nothing new to read, for less than a read; None: no log."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    @staticmethod
    def is_end(cursor: str, stamp: tuple[int, int, int]) -> bool:
        """Whether ``cursor`` is the end of the log that had this stamp before it was read."""
        return cursor.endswith(f":{stamp[1]}")

    def read(self, after: str | None) -> list[Event]:
        """Events after the cursor, or one reset if they cannot be told. Raises NotLines."""
        with self._path.open("rb") as log:
            generation = log.read(_GENERATION).decode(errors="replace")
            start = _offset(log, generation, after)
            events = None if start is None else _read_lines(log, generation, start)
            if events is None:
                return [Event(cursor=f"{generation}:{_complete_end(log)}", kind="reset")]
        return events

    def _start_generation(self) -> None:
        replace_file(self._tmp, self._path, uuid.uuid4().hex.encode() + b"\n")


def _complete_end(log: BinaryIO) -> int:
    """The offset after the last complete line; the log is left at its end. Raises NotLines if there
    is no complete line near it."""
    size = log.seek(0, os.SEEK_END)
    base = max(0, size - _TAIL)
    log.seek(base)
    end = base + log.read(size - base).rfind(b"\n") + 1
    if end <= max(base, _GENERATION):
        raise NotLines
    return end


def _offset(log: BinaryIO, generation: str, after: str | None) -> int | None:
    """Where cursor ``after`` points to; None if it is not the start of a line of this log."""
    theirs, _, digits = (after or "").partition(":")
    if theirs != generation or not (digits.isascii() and digits.isdigit()):
        return None
    offset = int(digits)
    if not _GENERATION < offset <= _complete_end(log):
        return None
    log.seek(offset - 1)
    return offset if log.read(1) == b"\n" else None


def _read_lines(log: BinaryIO, generation: str, offset: int) -> list[Event] | None:
    """Complete lines from ``offset``; None if one is damaged."""
    log.seek(offset)
    data = log.read(_READ_LIMIT)
    events = []
    for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
        offset += len(line)
        try:
            events.append(Event(cursor=f"{generation}:{offset}", **json.loads(line)))
        except (TypeError, ValueError):  # pydantic's ValidationError is a ValueError
            return None
    return events
