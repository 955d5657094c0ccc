"""All task records in memory. Reads take no lock, on any thread; writers are ordered by tickets.

A record that was read from the store may be old by the time it gets here: another thread may have
applied a newer one meanwhile. Within one life of a task the revision tells. Across a deletion it
does not (the task may be back, at revision 1), so a writer takes a ticket *before* it asks the
store; what it then brings is the truth unless the mirror changed that task after the ticket, in
which case :meth:`Mirror.apply` refuses and the writer has to read again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from prefixd_store.records import TaskRecord

__all__ = ["ChangeListener", "Mirror", "TaskKey"]


class TaskKey(NamedTuple):
    tenant: str
    name: str


ChangeListener = Callable[[TaskRecord | None, TaskRecord | None], None]
"""(old, new): None is a task that does not exist"""

_MAX_TOMBSTONES = 10_000


class Mirror:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: dict[TaskKey, TaskRecord] = {}
        self._names: dict[str, set[str]] = {}
        self._sorted_names: dict[str, list[str]] = {}
        """tenant → names, made when asked for; a list is never changed, so readers may keep it"""
        self._ticket = 0
        self._changed: dict[TaskKey, int] = {}
        self._deleted: OrderedDict[TaskKey, int] = OrderedDict()
        self._oldest_deletion = 0
        """what is deleted and no longer in ``_deleted`` went at this ticket or before"""
        self._listeners: list[ChangeListener] = []

    # --- reads -----------------------------------------------------------------------------------
    def get(self, key: TaskKey) -> TaskRecord | None:
        return self._records.get(key)

    def names(self, tenant: str) -> list[str]:
        """Sorted; not to be changed. Takes the lock if the tenant's tasks came or went."""
        names = self._sorted_names.get(tenant)
        if names is None:
            with self._lock:
                names = sorted(self._names.get(tenant, ()))
                if names:  # or anybody's guess of a tenant would stay
                    self._sorted_names[tenant] = names
        return names

    def count(self, tenant: str) -> int:
        return len(self._names.get(tenant, ()))

    def __len__(self) -> int:
        return len(self._records)

    def keys(self) -> set[TaskKey]:
        with self._lock:
            return set(self._records)

    def ticket(self) -> int:
        """To be taken before the store is asked."""
        return self._ticket

    # --- writes ----------------------------------------------------------------------------------
    def listen(self, listener: ChangeListener) -> None:
        """Call ``listener`` for every record there is and for each change from now on.

        In order, under the mirror's lock, on the thread that brought the change: it must be quick
        and must not write to the mirror.
        """
        with self._lock:
            for record in self._records.values():
                listener(None, record)
            self._listeners.append(listener)

    def apply(self, key: TaskKey, record: TaskRecord | None, ticket: int) -> bool:
        """Take in what the store said about a task when asked after ``ticket``; None: not found.

        False, changing nothing, if that may be outdated: ask the store again.
        """
        with self._lock:
            current = self._records.get(key)
            if current and record and current.created_at == record.created_at:
                if current.revision < record.revision:
                    self._set(key, current, record)
            elif self._changed_at(key) > ticket:
                return False
            elif current or record:
                self._set(key, current, record)
            return True

    def _changed_at(self, key: TaskKey) -> int:
        changed = self._changed.get(key)
        return self._deleted.get(key, self._oldest_deletion) if changed is None else changed

    def _set(self, key: TaskKey, old: TaskRecord | None, new: TaskRecord | None) -> None:
        self._ticket += 1
        if new is None:
            self._remove(key)
        else:
            self._records[key] = new
            self._changed[key] = self._ticket
            self._deleted.pop(key, None)
            if old is None:
                self._add_name(key)
        for listener in self._listeners:
            listener(old, new)

    def _remove(self, key: TaskKey) -> None:
        del self._records[key]
        del self._changed[key]
        self._deleted[key] = self._ticket
        if len(self._deleted) > _MAX_TOMBSTONES:
            _, self._oldest_deletion = self._deleted.popitem(last=False)
        names = self._names[key.tenant]
        names.remove(key.name)
        if not names:
            del self._names[key.tenant]
        self._sorted_names.pop(key.tenant, None)

    def _add_name(self, key: TaskKey) -> None:
        self._names.setdefault(key.tenant, set()).add(key.name)
        self._sorted_names.pop(key.tenant, None)
