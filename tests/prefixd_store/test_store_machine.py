"""Both stores against a dictionary: random changes through two handles, a replica on the feed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from prefixd_store.errors import Conflict, NotFound
from prefixd_store.records import TaskRecord
from tests.prefixd_store.support import Backend, Blob, Replica, blob_of, put

TENANTS = st.sampled_from(["default", "other"])
TASKS = st.sampled_from(["a", "a.json", "b"])
HANDLES = st.integers(0, 1)
BLOBS = st.integers(0, 3)
VERSIONS = st.integers(1, 5)
IF_MATCH = st.sampled_from([None, None, "current", "stale", "*"])


@dataclass
class Task:
    """What a task should be. ``versions`` maps number to the index of its blob."""

    versions: dict[int, int] = field(default_factory=dict)
    split: dict[int, float] = field(default_factory=dict)
    next_version: int = 1
    description: str = ""


class StoreMachine(RuleBasedStateMachine):
    def __init__(self, backend: Backend, blobs: list[Blob]) -> None:
        super().__init__()
        self.backend = backend
        self.blobs = blobs
        self.stores = [backend.open(), backend.open()]
        self.replica = Replica(self.stores[0])
        self.model: dict[tuple[str, str], Task] = {}

    def attempt(
        self,
        key: tuple[str, str],
        if_match: str | None,
        fails: type[Exception] | None,
        change: Callable[[str | None], Any],
    ) -> bool:
        """Make the change with the ETag that ``if_match`` speaks of; whether it should succeed."""
        exists = key in self.model
        etag = if_match
        if if_match in {"current", "stale"}:
            etag = self.stores[0].get_task(*key).etag if exists else '"0-1"'
            etag = '"0-1"' if if_match == "stale" else etag
        refused = if_match == "stale" or (if_match is not None and not exists)
        expected = Conflict if refused and (exists or fails is None) else fails
        if expected is None:
            change(etag)
            return True
        with pytest.raises(expected):
            change(etag)
        return False

    @rule(
        tenant=TENANTS, task=TASKS, h=HANDLES, blob=BLOBS, activate=st.booleans(), if_match=IF_MATCH
    )
    def upload(
        self, tenant: str, task: str, h: int, blob: int, activate: bool, if_match: str | None
    ) -> None:
        def change(etag: str | None) -> None:
            put(
                self.stores[h],
                task,
                self.blobs[blob],
                tenant=tenant,
                activate=activate,
                if_match=etag,
            )

        if not self.attempt((tenant, task), if_match, None, change):
            return
        model = self.model.setdefault((tenant, task), Task())
        number = next((n for n, b in model.versions.items() if b == blob), None)
        if number is None:
            number, model.next_version = model.next_version, model.next_version + 1
            model.versions[number] = blob
        if activate:
            model.split = {number: 1.0}

    @rule(tenant=TENANTS, task=TASKS, h=HANDLES, one=VERSIONS, two=VERSIONS, if_match=IF_MATCH)
    def activate(
        self, tenant: str, task: str, h: int, one: int, two: int, if_match: str | None
    ) -> None:
        split = {one: 1.0} if one == two else {one: 0.75, two: 0.25}
        model = self.model.get((tenant, task))
        known = model is not None and split.keys() <= model.versions.keys()
        if self.attempt(
            (tenant, task),
            if_match,
            None if known else NotFound,
            lambda etag: self.stores[h].activate(tenant, task, split, if_match=etag),
        ):
            assert model is not None
            model.split = split

    @rule(tenant=TENANTS, task=TASKS, h=HANDLES, text=st.text(max_size=5), if_match=IF_MATCH)
    def describe(self, tenant: str, task: str, h: int, text: str, if_match: str | None) -> None:
        model = self.model.get((tenant, task))
        if self.attempt(
            (tenant, task),
            if_match,
            None if model else NotFound,
            lambda etag: self.stores[h].update_task(
                tenant, task, {"description": text}, if_match=etag
            ),
        ):
            assert model is not None
            model.description = text

    @rule(tenant=TENANTS, task=TASKS, h=HANDLES, version=VERSIONS, if_match=IF_MATCH)
    def delete_version(
        self, tenant: str, task: str, h: int, version: int, if_match: str | None
    ) -> None:
        model = self.model.get((tenant, task))
        fails: type[Exception] | None = None
        if model is None or version not in model.versions:
            fails = NotFound
        elif version in model.split and len(model.versions) > 1:
            fails = Conflict
        if self.attempt(
            (tenant, task),
            if_match,
            fails,
            lambda etag: self.stores[h].delete_version(tenant, task, version, if_match=etag),
        ):
            assert model is not None
            del model.versions[version]
            model.split.pop(version, None)

    @rule(tenant=TENANTS, task=TASKS, h=HANDLES, if_match=IF_MATCH)
    def delete_task(self, tenant: str, task: str, h: int, if_match: str | None) -> None:
        if self.attempt(
            (tenant, task),
            if_match,
            None if (tenant, task) in self.model else NotFound,
            lambda etag: self.stores[h].delete_task(tenant, task, if_match=etag),
        ):
            del self.model[tenant, task]

    @rule(h=HANDLES)
    def collect_garbage(self, h: int) -> None:
        self.stores[h].collect_garbage(grace_seconds=0)
        for tenant in ("default", "other"):
            named = {
                b for key, t in self.model.items() if key[0] == tenant for b in t.versions.values()
            }
            for index, blob in enumerate(self.blobs):
                if index in named:
                    assert self.stores[h].read_blob(tenant, blob.sha256) == blob.data
                else:
                    with pytest.raises(NotFound):
                        self.stores[h].read_blob(tenant, blob.sha256)

    @rule(h=HANDLES)
    def reopen(self, h: int) -> None:
        self.stores[h] = self.backend.open()

    @rule(tenant=TENANTS, h=HANDLES, prefix=st.sampled_from(["", "a", "a."]))
    def list_tasks(self, tenant: str, h: int, prefix: str) -> None:
        listed: list[str] = []
        cursor: str | None = None
        while True:
            tasks, cursor = self.stores[h].list_tasks(tenant, prefix=prefix, limit=1, cursor=cursor)
            listed += [task.name for task in tasks]
            if cursor is None:
                break
        expected = [n for t, n in self.model if t == tenant and n.startswith(prefix)]
        assert listed == sorted(expected)

    @rule()
    def follow(self) -> None:
        self.replica.follow()
        assert self.replica.tasks.keys() == self.model.keys()
        for key, record in self.replica.tasks.items():
            self.check(record, self.model[key])

    @invariant()
    def the_second_handle_agrees(self) -> None:
        records = {(task.tenant, task.name): task for task in self.stores[1].all_tasks()}
        assert records.keys() == self.model.keys()
        for key, record in records.items():
            self.check(record, self.model[key])

    def check(self, record: TaskRecord, task: Task) -> None:
        shas = {number: self.blobs[blob].sha256 for number, blob in task.versions.items()}
        assert {number: v.sha256 for number, v in record.versions.items()} == shas
        assert all(number == version.version for number, version in record.versions.items())
        assert (record.split, record.next_version) == (task.split, task.next_version)
        assert record.description == task.description

    def teardown(self) -> None:
        self.follow()
        assert self.replica.resets == 1
        self.backend.close()


def test_a_store_is_a_dictionary(new_backend: Callable[[], Backend]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        blobs = [blob_of(Path(folder), bytes([n]) * (500 + n)) for n in range(4)]
        run_state_machine_as_test(
            lambda: StoreMachine(new_backend(), blobs),  # type: ignore[arg-type]
            settings=settings(
                max_examples=60,
                stateful_step_count=40,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
