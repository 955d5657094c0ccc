"""What each change does to a task's record: pure functions, shared by every store.

A mutation takes the record as it is now (None: there is no such task) and returns the record as it
should be, or the same object when nothing changes. The store makes the replacement atomic and, when
somebody else was faster, runs the mutation again on the newer record.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from pydantic_core import PydanticSerializationError

from prefixd_store.errors import Conflict, InvalidRequest, NotFound
from prefixd_store.records import TaskRecord, VersionRecord, utcnow

__all__ = [
    "MUST_NOT_EXIST",
    "Mutation",
    "activate",
    "blobs_of",
    "check_if_match",
    "decode",
    "delete_task",
    "delete_version",
    "encode",
    "find_blob",
    "publish",
    "update_task",
]

Mutation = Callable[[TaskRecord | None], TaskRecord | None]

MUST_NOT_EXIST = "!*"
"""The ``if_match`` of a create-only upload, HTTP's ``If-None-Match: *``."""

_WEIGHT_TOLERANCE = 1e-6


def check_if_match(now: TaskRecord | None, name: str, if_match: str | None) -> None:
    """Raise :class:`Conflict` unless the task is in the state that ``if_match`` asks for."""
    if if_match is None:
        return
    found = "does not exist" if now is None else f"is at {now.etag}"
    if if_match == MUST_NOT_EXIST:
        holds = now is None
    elif if_match == "*":
        holds = now is not None
    else:
        holds = now is not None and now.etag == if_match
    if not holds:
        wanted = {MUST_NOT_EXIST: "it not to exist", "*": "it to exist"}.get(if_match, if_match)
        raise Conflict(f"task {name!r} {found}, the request wants {wanted}", param="if_match")


def publish(
    now: TaskRecord | None,
    tenant: str,
    name: str,
    version: VersionRecord,
    *,
    activate: bool,
    if_match: str | None,
) -> TaskRecord:
    """Add ``version`` under the next number, unless its bytes already are one of the versions."""
    check_if_match(now, name, if_match)
    task = now or TaskRecord(tenant=tenant, name=name, revision=0)
    existing = find_blob(task, version.sha256)
    number = existing.version if existing else task.next_version
    changes: dict[str, Any] = {}
    if existing is None:
        numbered = version.model_copy(update={"version": number})
        changes = {"versions": {**task.versions, number: numbered}, "next_version": number + 1}
    if activate and task.split != {number: 1.0}:
        changes["split"] = {number: 1.0}
    return _changed(task, changes) if changes else task


def activate(
    now: TaskRecord | None, name: str, split: Mapping[int, float], *, if_match: str | None
) -> TaskRecord:
    task = _existing(now, name, if_match)
    for number, weight in split.items():
        task.version(number)
        if not (math.isfinite(weight) and weight > 0):
            raise InvalidRequest(
                f"split gives version {number} weight {weight}, which is not positive",
                param="split",
            )
    total = math.fsum(split.values())
    if abs(total - 1.0) > _WEIGHT_TOLERANCE:
        raise InvalidRequest(f"split sums to {total:g}, not to 1", param="split")
    return _changed(task, {"split": {number: float(weight) for number, weight in split.items()}})


def update_task(
    now: TaskRecord | None, name: str, changes: Mapping[str, Any], *, if_match: str | None
) -> TaskRecord:
    task = _existing(now, name, if_match)
    kinds = {"description": str, "pinned": bool, "defaults": dict}
    for field, value in changes.items():
        if field not in kinds:
            raise InvalidRequest(
                f"a task has no field {field!r} to change, only {', '.join(kinds)}", param=field
            )
        if not isinstance(value, kinds[field]):
            raise InvalidRequest(
                f"{field} must be a {kinds[field].__name__}, not a {type(value).__name__}",
                param=field,
            )
        _check_json(field, value)
    return _changed(task, dict(changes)) if changes else task


def delete_version(
    now: TaskRecord | None, name: str, number: int, *, if_match: str | None
) -> TaskRecord:
    task = _existing(now, name, if_match)
    task.version(number)
    if number in task.split and len(task.versions) > 1:
        raise Conflict(
            f"version {number} of task {name!r} takes {task.split[number]:g} of its traffic; "
            "activate another version first",
            param="version",
        )
    left = {n: version for n, version in task.versions.items() if n != number}
    split = {n: weight for n, weight in task.split.items() if n != number}
    return _changed(task, {"versions": left, "split": split})


def delete_task(now: TaskRecord | None, name: str, *, if_match: str | None) -> None:
    _existing(now, name, if_match)


def find_blob(task: TaskRecord, sha256: str) -> VersionRecord | None:
    return next((v for v in task.versions.values() if v.sha256 == sha256), None)


def blobs_of(task: TaskRecord | None) -> set[str]:
    """SHA-256 of every blob that the task names."""
    return {version.sha256 for version in task.versions.values()} if task else set()


def encode(task: TaskRecord) -> bytes:
    try:
        return task.model_dump_json().encode()
    except PydanticSerializationError as error:
        raise InvalidRequest(f"task {task.name!r} cannot be written as JSON: {error}") from None


def decode(raw: bytes, tenant: str, name: str) -> TaskRecord:
    """The record in ``raw``. Raises ValueError if it is damaged or another task's."""
    task = TaskRecord.model_validate_json(raw)
    if (task.tenant, task.name) != (tenant, name):
        raise ValueError(f"it names task {task.name!r} of tenant {task.tenant!r}")
    return task


def _existing(now: TaskRecord | None, name: str, if_match: str | None) -> TaskRecord:
    if now is None:
        raise NotFound(f"task {name!r} does not exist", param="task")
    check_if_match(now, name, if_match)
    return now


def _changed(task: TaskRecord, changes: dict[str, Any]) -> TaskRecord:
    stamp = {"revision": task.revision + 1, "updated_at": utcnow()}
    return task.model_copy(update={**changes, **stamp})


def _check_json(field: str, value: Any) -> None:
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{field} cannot be written as JSON: {error}", param=field) from None
