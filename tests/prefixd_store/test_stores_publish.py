"""The contract of a store, held to by both: uploads make versions."""

from __future__ import annotations

import pytest

from prefixd_store.errors import InvalidRequest, NotFound
from prefixd_store.store import Store
from tests.prefixd_store.support import TENANT, MakeBlob, put


def test_first_upload_creates_the_task(store: Store, blob: MakeBlob) -> None:
    first = blob()
    task, version, created = put(store, "e2e", first)
    assert created
    assert (version.version, version.sha256) == (1, first.sha256)
    assert (task.revision, task.next_version, task.split, task.active) == (1, 2, {1: 1.0}, 1)
    assert store.get_task(TENANT, "e2e") == task
    assert task.versions[1].model_copy(update={"version": 1}) == first.version


def test_versions_count_up_and_the_newest_is_active(store: Store, blob: MakeBlob) -> None:
    numbers = [put(store, "e2e", blob()).version.version for _ in range(3)]
    task = store.get_task(TENANT, "e2e")
    assert numbers == [1, 2, 3] == sorted(task.versions)
    assert task.split == {3: 1.0}
    assert task.revision == 3


def test_upload_without_activate_changes_no_traffic(store: Store, blob: MakeBlob) -> None:
    assert put(store, "new", blob(), activate=False).task.split == {}
    put(store, "old", blob())
    assert put(store, "old", blob(), activate=False).task.split == {1: 1.0}


def test_same_bytes_are_the_same_version(store: Store, blob: MakeBlob) -> None:
    first, second = blob(), blob()
    put(store, "e2e", first)
    before = put(store, "e2e", second).task
    task, version, created = put(store, "e2e", first, activate=False)
    assert not created
    assert version.version == 1
    assert task == before == store.get_task(TENANT, "e2e")


def test_same_bytes_may_be_activated(store: Store, blob: MakeBlob) -> None:
    first = blob()
    put(store, "e2e", first)
    put(store, "e2e", blob())
    task, version, created = put(store, "e2e", first)
    assert (created, version.version, task.split, sorted(task.versions)) == (
        False,
        1,
        {1: 1.0},
        [1, 2],
    )
    assert task.revision == 3


def test_bytes_of_a_deleted_version_get_a_new_number(store: Store, blob: MakeBlob) -> None:
    first = blob()
    put(store, "e2e", first)
    put(store, "e2e", blob())
    store.delete_version(TENANT, "e2e", 1)
    task, version, created = put(store, "e2e", first)
    assert (created, version.version, sorted(task.versions)) == (True, 3, [2, 3])
    assert store.read_blob(TENANT, first.sha256) == first.data


def test_the_uploaded_file_stays_its_owners(store: Store, blob: MakeBlob) -> None:
    upload = blob()
    put(store, "e2e", upload)
    assert upload.path.read_bytes() == upload.data
    upload.path.write_bytes(b"something else")
    assert store.read_blob(TENANT, upload.sha256) == upload.data


def test_bytes_that_are_not_those_of_the_record_are_not_published(
    store: Store, blob: MakeBlob
) -> None:
    upload = blob()
    upload.path.write_bytes(upload.data[:-1])
    with pytest.raises(Exception, match=upload.sha256):
        put(store, "e2e", upload)
    with pytest.raises(NotFound):
        store.get_task(TENANT, "e2e")


def test_provenance_that_is_not_json_is_refused(store: Store, blob: MakeBlob) -> None:
    upload = blob()
    odd = upload.version.model_copy(update={"provenance": {"note": "\ud800"}})
    with pytest.raises(InvalidRequest):
        store.put_version(TENANT, "e2e", upload.path, odd)
    assert store.list_tasks(TENANT).tasks == []


@pytest.mark.parametrize("name", ["", "UPPER", "../x", "a/b", "a b", ".hidden", "x" * 129, "a\n"])
def test_names_are_checked(store: Store, blob: MakeBlob, name: str) -> None:
    with pytest.raises(InvalidRequest):
        put(store, name, blob())
    with pytest.raises(InvalidRequest):
        put(store, "e2e", blob(), tenant=name)
    with pytest.raises(InvalidRequest):
        store.get_task(TENANT, name)
