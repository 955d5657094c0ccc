from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from prefixd_server.prefix import mirror as mirror_module
from prefixd_server.prefix.mirror import Mirror, TaskKey
from prefixd_store.records import TaskRecord

KEY = TaskKey("default", "a")
START = datetime(2026, 1, 1, tzinfo=UTC)


def record(revision: int, *, life: int = 0, name: str = "a") -> TaskRecord:
    created = START + timedelta(seconds=life)
    return TaskRecord(tenant="default", name=name, revision=revision, created_at=created)


def test_an_older_revision_never_replaces_a_newer_one() -> None:
    mirror = Mirror()
    assert mirror.apply(KEY, record(2), mirror.ticket())
    for revision, shown in [(1, 2), (2, 2), (3, 3), (1, 3)]:
        for ticket in (0, mirror.ticket()):
            assert mirror.apply(KEY, record(revision), ticket)
            found = mirror.get(KEY)
            assert found is not None
            assert found.revision == shown


def test_what_was_read_before_a_deletion_does_not_bring_the_task_back() -> None:
    mirror = Mirror()
    mirror.apply(KEY, record(1), mirror.ticket())
    ticket = mirror.ticket()
    assert mirror.apply(KEY, None, mirror.ticket())
    assert not mirror.apply(KEY, record(5), ticket)
    assert mirror.get(KEY) is None


def test_a_task_made_again_replaces_the_old_one_whatever_the_clocks_say() -> None:
    mirror = Mirror()
    mirror.apply(KEY, record(7, life=100), mirror.ticket())
    assert mirror.apply(KEY, record(1, life=50), mirror.ticket())
    found = mirror.get(KEY)
    assert found is not None
    assert found.revision == 1


def test_a_deletion_that_is_older_than_what_is_known_is_refused() -> None:
    mirror = Mirror()
    ticket = mirror.ticket()
    mirror.apply(KEY, record(1), mirror.ticket())
    assert not mirror.apply(KEY, None, ticket)
    assert mirror.get(KEY) is not None


def test_forgotten_deletions_make_old_tickets_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_module, "_MAX_TOMBSTONES", 2)
    mirror = Mirror()
    for name in "abcd":
        key = TaskKey("default", name)
        mirror.apply(key, record(1, name=name), mirror.ticket())
    ticket = mirror.ticket()
    for name in "abcd":
        mirror.apply(TaskKey("default", name), None, mirror.ticket())
    for name in "abcd":
        key = TaskKey("default", name)
        assert not mirror.apply(key, record(9, name=name), ticket)
        assert mirror.apply(key, record(1, name=name, life=1), mirror.ticket())


def test_listeners_see_every_change_once_and_in_order() -> None:
    mirror = Mirror()
    mirror.apply(KEY, record(1), mirror.ticket())
    seen: list[tuple[int | None, int | None]] = []
    mirror.listen(
        lambda old, new: seen.append((old and old.revision, new and new.revision))  # type: ignore[func-returns-value]
    )
    for revision in (3, 2, 3, 4):
        mirror.apply(KEY, record(revision), mirror.ticket())
    mirror.apply(KEY, None, mirror.ticket())
    mirror.apply(KEY, None, mirror.ticket())
    assert seen == [(None, 1), (1, 3), (3, 4), (4, None)]


def test_names_are_sorted_and_a_list_once_read_stays_as_it_was() -> None:
    mirror = Mirror()
    for name in ("b", "a", "c"):
        mirror.apply(TaskKey("default", name), record(1, name=name), mirror.ticket())
    before = mirror.names("default")
    mirror.apply(TaskKey("default", "a"), None, mirror.ticket())
    assert before == ["a", "b", "c"]
    assert mirror.names("default") == ["b", "c"]
    assert mirror.count("default") == 2
    assert mirror.names("nobody") == []
