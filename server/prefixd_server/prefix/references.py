"""From tasks to prefixes: which are still named by a version, which belong to pinned tasks.

A listener of the registry. It counts, so that a change costs what that task has, not what all have.
"""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from prefixd_server.types import PrefixKey
from prefixd_store.records import TaskRecord

__all__ = ["KeyOwner", "References"]


class KeyOwner(Protocol):
    """What residency is told; both may be called on any thread."""

    def retire(self, key: PrefixKey) -> None: ...

    def set_pinned(self, key: PrefixKey, pinned: bool) -> None: ...


class References:
    """``registry.on_change(References(residency))``. Called one change at a time."""

    def __init__(self, owner: KeyOwner) -> None:
        self._owner = owner
        self._named: Counter[PrefixKey] = Counter()
        self._pinned: Counter[PrefixKey] = Counter()

    def __call__(self, old: TaskRecord | None, new: TaskRecord | None) -> None:
        gone, _ = _move(self._named, _named(old), _named(new))
        unpinned, pinned = _move(self._pinned, _pinned(old), _pinned(new))
        for key in sorted(gone):
            self._owner.retire(key)
        for key in sorted(unpinned):
            self._owner.set_pinned(key, False)
        for key in sorted(pinned):
            self._owner.set_pinned(key, True)


def _named(task: TaskRecord | None) -> set[PrefixKey]:
    if task is None:
        return set()
    return {PrefixKey(task.tenant, version.sha256) for version in task.versions.values()}


def _pinned(task: TaskRecord | None) -> set[PrefixKey]:
    """The prefixes that a pinned task's traffic goes to."""
    if task is None or not task.pinned:
        return set()
    return {PrefixKey(task.tenant, task.versions[number].sha256) for number in task.split}


def _move(
    counts: Counter[PrefixKey], old: set[PrefixKey], new: set[PrefixKey]
) -> tuple[set[PrefixKey], set[PrefixKey]]:
    """Count a task's new keys for its old ones; returns (fell to 0, rose from 0)."""
    came = {key for key in new - old if counts[key] == 0}
    counts.update(new - old)
    counts.subtract(old - new)
    gone = {key for key in old - new if counts[key] == 0}
    for key in gone:
        del counts[key]
    return gone, came
