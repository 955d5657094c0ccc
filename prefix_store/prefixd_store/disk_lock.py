"""The disk store's lock between threads and processes, which is also a journal of one entry.

The lock file is empty except while a task is being changed, when it names that task. A writer that
dies on the way leaves the name behind; whoever takes the lock next finds it and tells the feed
about that task as it now is, so a record can never have changed without an event.

None of it needs to reach the device: the intent is for readers of the feed that outlive a writer,
and none outlives the machine's memory. Who starts after a power loss reads all records anew.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["HeldLock", "StoreLock"]


class HeldLock:
    """The lock while it is held: the intent of its holder, or of one who died holding it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read_intent(self) -> tuple[str, str] | None:
        """(tenant, task) that a dead holder was changing. A torn intent is none, and is cleared:
        its change had not begun."""
        data = os.pread(self._fd, 4096, 0)
        if not data:
            return None
        try:
            tenant, task = json.loads(data)
        except ValueError:
            self.clear_intent()
            return None
        return str(tenant), str(task)

    def write_intent(self, tenant: str, task: str) -> None:
        os.pwrite(self._fd, json.dumps([tenant, task]).encode(), 0)

    def clear_intent(self) -> None:
        os.ftruncate(self._fd, 0)  # if not: one event too many, which is harmless


class StoreLock:
    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def hold(self, *, wait: bool = True) -> Iterator[HeldLock | None]:
        """Hold the lock; with ``wait=False`` yield None where somebody else holds it.

        Every holder opens the file anew: flock belongs to the open file, so that threads exclude
        each other exactly as processes do.
        """
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(fd)
            yield None
            return
        try:
            yield HeldLock(fd)
        finally:
            # Explicitly: a child forked meanwhile shares the open file and would keep it locked.
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def has_intent(self) -> bool:
        try:
            return self._path.stat().st_size > 0
        except FileNotFoundError:
            return False
