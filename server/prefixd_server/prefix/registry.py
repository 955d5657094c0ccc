"""Task → immutable version: every tenant's records, kept in memory and equal to the store's.

::

    HTTP ──publish, activate, …──▶ store ──the record──▶ mirror ◀──re-read── feed ◀──events── store
    engine ──resolve──▶ mirror                             │                (others' changes)
                                                           └─ on_change ─▶ references.py, metrics

A change made here is in the mirror when the call returns; one made on another replica when the feed
brings it. The engine reads the mirror only, so it neither blocks nor depends on the store.
"""

from __future__ import annotations

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefixd_server.config import LimitsConfig
from prefixd_server.errors import InvalidRequest, NotFound, StoreUnavailable
from prefixd_server.prefix.feed import Feed, FeedHealth
from prefixd_server.prefix.mirror import ChangeListener, Mirror, TaskKey
from prefixd_server.types import PrefixVersion, SiteLengths
from prefixd_store.records import TaskRecord, VersionRecord
from prefixd_store.store import PutResult, Store, TaskPage

__all__ = ["Registry", "pick_version", "to_prefix_version"]

_log = logging.getLogger(__name__)


class Registry:
    """``poll_s`` bounds how long one wait for events lasts, and so how long :meth:`close` takes."""

    def __init__(self, store: Store, limits: LimitsConfig, *, poll_s: float = 1.0) -> None:
        self._store = store
        self._limits = limits
        self._mirror = Mirror()
        self._feed = Feed(
            store,
            refresh=self._refresh,
            refill=self._refill,
            revision=self._revision,
            poll_s=poll_s,
        )

    def start(self) -> None:
        """Read all tasks, then follow the feed. Raises StoreUnavailable; may be called again."""
        self._feed.start()

    def close(self) -> None:
        self._feed.close()

    @property
    def health(self) -> FeedHealth:
        """Whether the mirror follows the store, for readiness."""
        return self._feed.health

    @property
    def num_tasks(self) -> int:
        """Of all tenants."""
        return len(self._mirror)

    def on_change(self, listener: ChangeListener) -> None:
        """Call ``listener(old, new)`` for all there is (old is None) and then for each change.

        In order, one at a time, on the thread that brought the change. It must be quick and must
        not change the registry.
        """
        self._mirror.listen(listener)

    # --- reads -----------------------------------------------------------------------------------
    def resolve(self, tenant: str, task: str, version: int | None, draw: float) -> PrefixVersion:
        """What a request is to run, from memory alone; never blocks.

        ``draw``, in [0, 1), picks from a split. Raises NotFound for an unknown task or version and
        for a task with nothing active: never another prefix and never the base model instead.
        """
        record = self._mirror.get(TaskKey(tenant, task))
        if record is None:
            raise _unknown(task)
        number = pick_version(record, draw) if version is None else version
        return to_prefix_version(record, record.version(number))

    def peek(self, tenant: str, name: str) -> TaskRecord | None:
        """The record if it is in memory; never blocks."""
        return self._mirror.get(TaskKey(tenant, name))

    def get(self, tenant: str, name: str) -> TaskRecord:
        """May ask the store (another replica may just have made the task), so may block.

        Raises NotFound, StoreUnavailable.
        """
        key = TaskKey(tenant, name)
        if self._mirror.get(key) is None:
            self._refresh(key)
        record = self._mirror.get(key)
        if record is None:
            raise _unknown(name)
        return record

    def list(
        self, tenant: str, *, prefix: str = "", limit: int = 100, cursor: str | None = None
    ) -> TaskPage:
        """Tasks whose names begin with ``prefix``, by name, after the name ``cursor``."""
        names = self._mirror.names(tenant)
        start = bisect_left(names, prefix)
        if cursor is not None:
            start = max(start, bisect_right(names, cursor))
        page = [name for name in names[start : start + limit + 1] if name.startswith(prefix)]
        records = [self._mirror.get(TaskKey(tenant, name)) for name in page[:limit]]
        tasks = [record for record in records if record is not None]
        return TaskPage(tasks, page[limit - 1] if len(page) > limit else None)

    # --- changes: each blocks on the store -------------------------------------------------------
    def publish(
        self,
        tenant: str,
        task: str,
        blob: Path,
        version: VersionRecord,
        *,
        activate: bool = True,
        if_match: str | None = None,
    ) -> PutResult:
        """As :meth:`Store.put_version`; InvalidRequest where the tenant or task has no room."""
        key, ticket = TaskKey(tenant, task), self._mirror.ticket()
        self._check_room(key, version.sha256)
        result = self._store.put_version(
            tenant, task, blob, version, activate=activate, if_match=if_match
        )
        self._apply(key, result.task, ticket)
        return result

    def activate(
        self, tenant: str, task: str, split: Mapping[int, float], *, if_match: str | None = None
    ) -> TaskRecord:
        key, ticket = TaskKey(tenant, task), self._mirror.ticket()
        record = self._store.activate(tenant, task, split, if_match=if_match)
        self._apply(key, record, ticket)
        return record

    def update(
        self, tenant: str, task: str, changes: Mapping[str, Any], *, if_match: str | None = None
    ) -> TaskRecord:
        key, ticket = TaskKey(tenant, task), self._mirror.ticket()
        record = self._store.update_task(tenant, task, changes, if_match=if_match)
        self._apply(key, record, ticket)
        return record

    def delete_version(
        self, tenant: str, task: str, version: int, *, if_match: str | None = None
    ) -> TaskRecord:
        key, ticket = TaskKey(tenant, task), self._mirror.ticket()
        record = self._store.delete_version(tenant, task, version, if_match=if_match)
        self._apply(key, record, ticket)
        return record

    def delete_task(self, tenant: str, task: str, *, if_match: str | None = None) -> None:
        key, ticket = TaskKey(tenant, task), self._mirror.ticket()
        self._store.delete_task(tenant, task, if_match=if_match)
        self._apply(key, None, ticket)

    # --- the mirror ------------------------------------------------------------------------------
    def _check_room(self, key: TaskKey, sha256: str) -> None:
        record = self._mirror.get(key)
        if record is None:
            count, most = self._mirror.count(key.tenant), self._limits.max_tasks_per_tenant
            what = f"tenant {key.tenant!r} has {count} tasks"
        elif any(version.sha256 == sha256 for version in record.versions.values()):
            return
        else:
            count, most = len(record.versions), self._limits.max_versions_per_task
            what = f"task {key.name!r} has {count} versions"
        if count >= most:
            raise InvalidRequest(f"{what}, at most {most} allowed", param="task")

    def _apply(self, key: TaskKey, record: TaskRecord | None, ticket: int) -> None:
        """Take in the answer to a change, which was made whatever becomes of the mirror."""
        if self._mirror.apply(key, record, ticket):
            return
        try:
            self._refresh(key)
        except StoreUnavailable as error:
            _log.warning("task %s of tenant %s waits for the feed: %s", key.name, key.tenant, error)

    def _refresh(self, key: TaskKey) -> None:
        """Read one task from the store until what was read is not outdated on arrival."""
        while True:
            ticket = self._mirror.ticket()
            if self._mirror.apply(key, self._read(key), ticket):
                return

    def _revision(self, key: TaskKey) -> int:
        record = self._mirror.get(key)
        return record.revision if record else 0

    def _read(self, key: TaskKey) -> TaskRecord | None:
        try:
            return self._store.get_task(key.tenant, key.name)
        except NotFound:
            return None

    def _refill(self) -> None:
        """Read everything: at the start, and when events were missed."""
        ticket = self._mirror.ticket()
        before = self._mirror.keys()
        found = {TaskKey(task.tenant, task.name): task for task in self._store.all_tasks()}
        for key in before | found.keys():
            if not self._mirror.apply(key, found.get(key), ticket):
                self._refresh(key)


def pick_version(record: TaskRecord, draw: float) -> int:
    """The version at ``draw``, in [0, 1), of the split, in order of version number.

    Raises NotFound (code ``no_active_version``) when nothing is active.
    """
    assert 0.0 <= draw < 1.0
    if not record.split:
        raise NotFound(
            f"task {record.name!r} has no active version",
            param="task",
            code="no_active_version",
        )
    point = draw * sum(record.split.values())
    *others, last = sorted(record.split)
    for number in others:
        point -= record.split[number]
        if point < 0:
            return number
    return last


def to_prefix_version(task: TaskRecord, version: VersionRecord) -> PrefixVersion:
    return PrefixVersion(
        tenant=task.tenant,
        task=task.name,
        version=version.version,
        sha256=version.sha256,
        num_virtual_tokens=version.num_virtual_tokens,
        query_offset=version.query_offset,
        starts_sequence=version.format == "compiled",
        sites=SiteLengths(**{site: shape[2] for site, shape in version.sites.items()}),
    )


def _unknown(task: str) -> NotFound:
    return NotFound(f"task {task!r} does not exist", param="task")
