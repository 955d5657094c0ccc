from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from prefixd_server.config import LimitsConfig
from prefixd_server.errors import Conflict, InvalidRequest, NotFound, StoreUnavailable
from prefixd_server.prefix import References, Registry
from prefixd_server.prefix.registry import pick_version
from prefixd_server.types import PrefixKey
from prefixd_store.records import TaskRecord
from prefixd_store.store import PutResult
from tests.prefix.support import TENANT, FaultyStore, write_blob


class Replica:
    """A registry of its own on a store that others may share."""

    def __init__(self, root: Path, **limits: int) -> None:
        self.store = FaultyStore(root / "store")
        self.blobs = root / "blobs"
        self.registry = Registry(self.store, LimitsConfig(**limits), poll_s=0.05)
        self.changed = threading.Condition()
        self.registry.on_change(self._notify)

    def _notify(self, old: TaskRecord | None, new: TaskRecord | None) -> None:
        with self.changed:
            self.changed.notify_all()

    def publish(
        self, task: str, seed: int = 0, *, tenant: str = TENANT, **options: object
    ) -> PutResult:
        source = {"source_format": options.pop("source_format", "prefixd")}
        record = write_blob(self.blobs, 3, seed, **source)
        return self.registry.publish(
            tenant,
            task,
            self.blobs / record.sha256,
            record,
            **options,  # type: ignore[arg-type]
        )

    def wait_for(self, task: str, revision: int) -> TaskRecord:
        """Until the feed has brought the revision (the test's own time limit ends a hang)."""
        while True:
            with self.changed:
                page = self.registry.list(TENANT, prefix=task)
                if page.tasks and page.tasks[0].revision >= revision:
                    return page.tasks[0]
                self.changed.wait(0.1)


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[Replica]:
    replica = Replica(tmp_path)
    replica.registry.start()
    yield replica
    replica.registry.close()


def test_what_was_published_can_be_resolved_at_once(replica: Replica) -> None:
    put = replica.publish("a")
    found = replica.registry.resolve(TENANT, "a", None, 0.0)
    assert (found.task, found.version, found.sha256) == ("a", 1, put.version.sha256)
    assert (found.num_virtual_tokens, found.query_offset) == (3, 3)
    assert not found.starts_sequence


def test_only_a_compiled_prefix_starts_the_sequence(replica: Replica) -> None:
    replica.publish("a", source_format="compiled")
    assert replica.registry.resolve(TENANT, "a", 1, 0.0).starts_sequence


def test_unknown_names_versions_and_tenants_are_not_found(replica: Replica) -> None:
    replica.publish("a")
    for tenant, task, version in [
        (TENANT, "b", None),
        (TENANT, "a", 2),
        ("rival", "a", None),
        ("rival", "a", 1),
    ]:
        with pytest.raises(NotFound):
            replica.registry.resolve(tenant, task, version, 0.0)
    with pytest.raises(NotFound):
        replica.registry.get("rival", "a")


def test_a_task_with_nothing_active_says_so(replica: Replica) -> None:
    replica.publish("a", activate=False)
    with pytest.raises(NotFound, match="'a' has no active version") as caught:
        replica.registry.resolve(TENANT, "a", None, 0.5)
    assert caught.value.code == "no_active_version"
    assert replica.registry.resolve(TENANT, "a", 1, 0.5).version == 1


def test_a_split_gives_each_version_its_share_in_numeric_order(replica: Replica) -> None:
    for seed in range(11):
        replica.publish("a", seed)
    replica.registry.activate(TENANT, "a", {10: 0.25, 2: 0.5, 9: 0.25})
    draws = [i / 1000 for i in range(1000)]
    picks = [replica.registry.resolve(TENANT, "a", None, draw).version for draw in draws]
    assert picks == sorted(picks)
    assert Counter(picks) == {2: 500, 9: 250, 10: 250}


def test_the_largest_draw_falls_in_the_last_version_whatever_the_rounding() -> None:
    split = dict.fromkeys(range(1, 11), 0.1)
    task = TaskRecord(tenant=TENANT, name="a", split=split)
    assert pick_version(task, 0.9999999999999999) == 10
    assert pick_version(task, 0.0) == 1


def test_changes_show_at_once_and_honour_if_match(replica: Replica) -> None:
    registry = replica.registry
    etag = replica.publish("a").task.etag
    replica.publish("a", 1)
    with pytest.raises(Conflict):
        registry.activate(TENANT, "a", {1: 1.0}, if_match=etag)
    assert registry.get(TENANT, "a").active == 2
    registry.activate(TENANT, "a", {1: 1.0}, if_match=registry.get(TENANT, "a").etag)
    assert registry.get(TENANT, "a").active == 1
    registry.update(TENANT, "a", {"description": "x", "pinned": True})
    assert registry.get(TENANT, "a").pinned
    with pytest.raises(Conflict):
        registry.delete_version(TENANT, "a", 1)
    registry.delete_version(TENANT, "a", 2)
    assert set(registry.get(TENANT, "a").versions) == {1}
    registry.delete_task(TENANT, "a")
    with pytest.raises(NotFound):
        registry.get(TENANT, "a")


def test_the_same_bytes_are_the_same_version(replica: Replica) -> None:
    assert replica.publish("a").created
    again = replica.publish("a")
    assert not again.created
    assert again.version.version == 1


def test_listing_pages_through_the_names(replica: Replica) -> None:
    names = [f"t{i}" for i in range(7)] + ["other", "u"]
    for name in names:
        replica.publish(name)
    replica.publish("t-of-a-rival", tenant="rival")
    listed: list[str] = []
    cursor = None
    while True:
        page = replica.registry.list(TENANT, prefix="t", limit=3, cursor=cursor)
        listed += [task.name for task in page.tasks]
        assert len(page.tasks) <= 3
        cursor = page.next_cursor
        if cursor is None:
            break
    assert listed == [f"t{i}" for i in range(7)]
    assert [t.name for t in replica.registry.list(TENANT).tasks] == sorted(names)
    assert replica.registry.list(TENANT, prefix="zz").tasks == []
    assert replica.registry.list(TENANT, cursor="u").tasks == []


def test_limits_name_both_numbers(tmp_path: Path) -> None:
    replica = Replica(tmp_path, max_tasks_per_tenant=2, max_versions_per_task=2)
    replica.publish("a", 0)
    replica.publish("a", 1)
    with pytest.raises(InvalidRequest, match=r"has 2 versions, at most 2"):
        replica.publish("a", 2)
    assert not replica.publish("a", 0).created, "bytes that already are a version need no room"
    replica.publish("b")
    with pytest.raises(InvalidRequest, match=r"has 2 tasks, at most 2"):
        replica.publish("c")
    replica.publish("c", tenant="rival")


def test_get_asks_the_store_for_what_another_replica_just_made(tmp_path: Path) -> None:
    here, there = Replica(tmp_path), Replica(tmp_path)
    there.publish("a")
    assert here.registry.get(TENANT, "a").active == 1
    here.store.down = True
    assert here.registry.get(TENANT, "a").active == 1, "it is in memory now"
    with pytest.raises(StoreUnavailable):
        here.registry.get(TENANT, "b")
    assert here.registry.resolve(TENANT, "a", None, 0.0).version == 1


def test_two_replicas_converge(tmp_path: Path) -> None:
    here, there = Replica(tmp_path), Replica(tmp_path)
    there.publish("early")
    for replica in (here, there):
        replica.registry.start()
        assert replica.registry.health.healthy
        assert replica.registry.resolve(TENANT, "early", None, 0.0).version == 1
    try:
        here.publish("a")
        there.wait_for("a", 1)
        there.publish("a", 1)
        here.wait_for("a", 2)
        assert here.registry.resolve(TENANT, "a", None, 0.0).version == 2
        here.registry.delete_task(TENANT, "a")
        here.publish("a", 2)
        last = here.publish("z").task
        there.wait_for("z", 1)
        assert there.registry.get(TENANT, "a") == here.registry.get(TENANT, "a")
        assert there.registry.list(TENANT) == here.registry.list(TENANT)
        assert there.registry.get(TENANT, "z") == last
    finally:
        here.registry.close()
        there.registry.close()


def test_a_change_made_here_is_not_read_again_when_the_feed_tells_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = Replica(tmp_path), Replica(tmp_path)
    read: list[str] = []
    get_task = here.store.get_task

    def counted(tenant: str, name: str) -> TaskRecord:
        read.append(name)
        return get_task(tenant, name)

    monkeypatch.setattr(here.store, "get_task", counted)
    here.registry.start()
    here.publish("mine", seed=0)
    here.publish("mine", seed=1)
    here.registry.activate(TENANT, "mine", {1: 1.0})
    there.publish("theirs")
    here.wait_for("theirs", 1)
    assert read == ["theirs"]
    here.registry.delete_task(TENANT, "mine")
    there.publish("mine")  # a new task, of a revision that was known of the old one
    assert here.wait_for("mine", 1).split == {1: 1.0}
    here.registry.close()


def test_many_threads_on_two_replicas_end_with_what_the_store_has(tmp_path: Path) -> None:
    replicas = [Replica(tmp_path), Replica(tmp_path)]
    for seed in range(2):
        write_blob(replicas[0].blobs, 3, seed)
    for replica in replicas:
        replica.registry.start()

    def work(replica: Replica, worker: int) -> None:
        for turn in range(12):
            task = f"t{(worker + turn) % 2}"
            record = write_blob(tmp_path / f"blobs{worker}", 3, turn % 3)
            try:
                if turn % 3 == 2:
                    replica.registry.delete_task(TENANT, task)
                else:
                    blob = tmp_path / f"blobs{worker}" / record.sha256
                    replica.registry.publish(TENANT, task, blob, record)
            except NotFound:
                pass  # the other one was faster

    threads = [
        threading.Thread(target=work, args=(replica, 2 * i + j))
        for i, replica in enumerate(replicas)
        for j in range(2)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Both see it through the feed, so after all that came before it.
        Replica(tmp_path).publish("end")
        for replica in replicas:
            replica.wait_for("end", 1)
            truth = {task.name: task for task in replica.store.all_tasks()}
            assert {task.name: task for task in replica.registry.list(TENANT).tasks} == truth
    finally:
        for replica in replicas:
            replica.registry.close()


def test_an_outage_shows_and_ends_without_a_restart(tmp_path: Path) -> None:
    here, there = Replica(tmp_path), Replica(tmp_path)
    assert not here.registry.health.healthy
    here.store.down = True
    with pytest.raises(StoreUnavailable):
        here.registry.start()
    here.store.down = False
    here.registry.start()
    assert here.registry.health.healthy
    try:
        here.store.down = True
        while here.registry.health.healthy:
            threading.Event().wait(0.01)
        health = here.registry.health
        assert isinstance(health.error, StoreUnavailable)
        there.publish("a")
        here.store.down = False
        here.wait_for("a", 1)
        while not here.registry.health.healthy:
            threading.Event().wait(0.01)
        assert here.registry.health.error is None
        assert here.registry.health.since >= health.since
    finally:
        here.registry.close()
    assert not here.registry.health.healthy, "a feed that has stopped is not healthy"


def test_a_damaged_record_does_not_hold_up_the_others(tmp_path: Path) -> None:
    here, there = Replica(tmp_path), Replica(tmp_path)
    there.publish("bad")
    here.registry.start()
    try:
        there.registry.activate(TENANT, "bad", {1: 1.0})
        with closing(sqlite3.connect(there.store.root / "tasks.db")) as database, database:
            database.execute("UPDATE tasks SET record = '{' WHERE name = 'bad'")
        there.publish("good")
        here.wait_for("good", 1)
        assert here.registry.resolve(TENANT, "bad", None, 0.0).version == 1
    finally:
        here.registry.close()


class Owner:
    def __init__(self) -> None:
        self.retired: list[PrefixKey] = []
        self.pinned: set[PrefixKey] = set()

    def retire(self, key: PrefixKey) -> None:
        self.retired.append(key)

    def set_pinned(self, key: PrefixKey, pinned: bool) -> None:
        assert pinned == (key not in self.pinned), "told twice"
        (self.pinned.add if pinned else self.pinned.remove)(key)


def test_a_hash_retires_when_no_version_of_its_tenant_names_it(replica: Replica) -> None:
    owner = Owner()
    replica.publish("before")
    replica.registry.on_change(References(owner))
    key = PrefixKey(TENANT, replica.publish("a").version.sha256)
    replica.publish("a", 1)
    replica.publish("a", tenant="rival")
    replica.registry.delete_version(TENANT, "a", 1)
    assert owner.retired == [], "task `before` still names it"
    replica.registry.delete_task(TENANT, "before")
    assert owner.retired == [key], "the rival's equal bytes are another key"
    replica.registry.delete_task("rival", "a")
    assert owner.retired == [key, PrefixKey("rival", key.sha256)]


def test_pinned_prefixes_are_those_that_take_traffic_of_pinned_tasks(replica: Replica) -> None:
    owner = Owner()
    replica.registry.on_change(References(owner))
    first = PrefixKey(TENANT, replica.publish("a").version.sha256)
    replica.registry.update(TENANT, "a", {"pinned": True})
    assert owner.pinned == {first}
    second = PrefixKey(TENANT, replica.publish("a", 1).version.sha256)
    assert owner.pinned == {second}
    replica.registry.activate(TENANT, "a", {1: 0.5, 2: 0.5})
    assert owner.pinned == {first, second}
    replica.publish("b")
    replica.registry.update(TENANT, "b", {"pinned": True})
    replica.registry.update(TENANT, "a", {"pinned": False})
    assert owner.pinned == {first}
    replica.registry.delete_task(TENANT, "b")
    assert owner.pinned == set()
