"""The half of a store that does not depend on where the bytes are: checks, then one mutation."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prefixd_store import mutations
from prefixd_store.errors import InvalidRequest, NotFound, StoreUnavailable
from prefixd_store.mutations import Mutation
from prefixd_store.records import TaskRecord, VersionRecord, check_name
from prefixd_store.store import PutResult, Store

__all__ = [
    "Change",
    "RecordStore",
    "check_limit",
    "check_sha256",
    "damaged_record",
    "is_sha256",
    "make_change",
]

_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


class Change(NamedTuple):
    before: TaskRecord | None
    after: TaskRecord | None
    """None: the task is deleted; the same object as ``before``: nothing changed"""
    encoded: bytes = b""
    """``after`` as it is kept, where something changed and the task is not deleted"""

    @property
    def acquired(self) -> set[str]:
        return mutations.blobs_of(self.after) - mutations.blobs_of(self.before)

    @property
    def released(self) -> set[str]:
        return mutations.blobs_of(self.before) - mutations.blobs_of(self.after)


def make_change(before: TaskRecord | None, mutation: Mutation) -> Change:
    """What ``mutation`` does to ``before``, exactly as it will be read back."""
    after = mutation(before)
    if after is None or after is before:
        return Change(before, after)
    encoded = mutations.encode(after)
    return Change(before, mutations.decode(encoded, after.tenant, after.name), encoded)


class RecordStore(Store):
    """Implements the mutating calls of :class:`Store` on two methods of the subclass."""

    @abstractmethod
    def _find(self, tenant: str, task: str) -> TaskRecord | None:
        """The record as it is now; None if there is none."""

    @abstractmethod
    def _apply(self, tenant: str, task: str, mutation: Mutation) -> Change:
        """Run ``mutation`` on the record and replace it atomically and durably."""

    @abstractmethod
    def _publish(
        self, tenant: str, task: str, mutation: Mutation, blob: Path, version: VersionRecord
    ) -> Change:
        """As :meth:`_apply`, with ``blob`` in place before the record that names it is visible."""

    def get_task(self, tenant: str, task: str) -> TaskRecord:
        record = self._find(check_name(tenant, param="tenant"), check_name(task))
        if record is None:
            raise NotFound(f"task {task!r} does not exist", param="task")
        return record

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
        check_name(tenant, param="tenant")
        check_name(task)
        check_sha256(version.sha256)

        def publish(now: TaskRecord | None) -> TaskRecord:
            return mutations.publish(
                now, tenant, task, version, activate=activate, if_match=if_match
            )

        publish(self._find(tenant, task))  # an upload that must fail need not move its bytes
        before, after, _ = self._publish(tenant, task, publish, blob, version)
        assert after is not None
        found = mutations.find_blob(after, version.sha256)
        assert found is not None
        return PutResult(after, found, before is None or found.version not in before.versions)

    def activate(
        self, tenant: str, task: str, split: Mapping[int, float], *, if_match: str | None = None
    ) -> TaskRecord:
        return self._change(
            tenant, task, lambda now: mutations.activate(now, task, split, if_match=if_match)
        )

    def update_task(
        self, tenant: str, task: str, changes: Mapping[str, Any], *, if_match: str | None = None
    ) -> TaskRecord:
        return self._change(
            tenant, task, lambda now: mutations.update_task(now, task, changes, if_match=if_match)
        )

    def delete_version(
        self, tenant: str, task: str, version: int, *, if_match: str | None = None
    ) -> TaskRecord:
        return self._change(
            tenant,
            task,
            lambda now: mutations.delete_version(now, task, version, if_match=if_match),
        )

    def delete_task(self, tenant: str, task: str, *, if_match: str | None = None) -> None:
        def delete(now: TaskRecord | None) -> None:
            mutations.delete_task(now, task, if_match=if_match)

        check_name(tenant, param="tenant")
        self._apply(tenant, check_name(task), delete)

    def _change(self, tenant: str, task: str, mutation: Mutation) -> TaskRecord:
        check_name(tenant, param="tenant")
        after = self._apply(tenant, check_name(task), mutation).after
        assert after is not None
        return after


def check_sha256(sha256: str) -> str:
    """A blob's name becomes part of a path and of a key, so nothing else may pass."""
    if not is_sha256(sha256):
        raise InvalidRequest(f"sha256 {sha256[:80]!r} is not 64 hex digits", param="sha256")
    return sha256


def is_sha256(text: str) -> bool:
    return _SHA256.match(text) is not None


def check_limit(limit: int) -> int:
    if limit < 1:
        raise InvalidRequest(f"limit must be at least 1, not {limit}", param="limit")
    return limit


def damaged_record(where: str, error: Exception) -> StoreUnavailable:
    """The error for a record that cannot be read; the first line of ``error`` says why."""
    reason = str(error).split("\n", 1)[0]
    return StoreUnavailable(f"task record {where} is damaged: {reason}", code="corrupt_record")
