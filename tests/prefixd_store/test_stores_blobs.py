"""The contract of a store, held to by both: reading blobs, and garbage."""

from __future__ import annotations

import pytest

from prefixd_store.errors import InvalidRequest, NotFound
from prefixd_store.store import Store
from tests.prefixd_store.support import TENANT, MakeBlob, put


def test_read_blob_gives_the_bytes_and_tells_progress(store: Store, blob: MakeBlob) -> None:
    upload = blob(300_000)
    put(store, "e2e", upload)
    steps: list[int] = []
    data = store.read_blob(TENANT, upload.sha256, progress=steps.append)
    assert not data.readonly
    assert data == upload.data
    assert sum(steps) == 300_000


def test_unknown_blobs_are_not_found(store: Store) -> None:
    with pytest.raises(NotFound):
        store.read_blob(TENANT, "0" * 64)
    with pytest.raises(InvalidRequest):
        store.read_blob(TENANT, "../../etc/passwd")


def test_garbage_is_what_no_version_names(store: Store, blob: MakeBlob) -> None:
    kept, freed, shared = blob(100), blob(5000), blob(700)
    put(store, "e2e", freed)
    put(store, "e2e", shared)
    put(store, "e2e", kept)
    put(store, "other", shared)
    store.delete_version(TENANT, "e2e", 1)
    store.delete_version(TENANT, "e2e", 2)
    assert store.read_blob(TENANT, freed.sha256) == freed.data
    assert store.collect_garbage(grace_seconds=3600) == 0
    assert store.read_blob(TENANT, freed.sha256) == freed.data
    assert store.collect_garbage(grace_seconds=0) == 5000
    with pytest.raises(NotFound):
        store.read_blob(TENANT, freed.sha256)
    for upload in (kept, shared):
        assert store.read_blob(TENANT, upload.sha256) == upload.data
    assert store.collect_garbage(grace_seconds=0) == 0


def test_bytes_released_and_uploaded_again_are_no_garbage(store: Store, blob: MakeBlob) -> None:
    upload = blob()
    put(store, "e2e", upload)
    store.delete_task(TENANT, "e2e")
    put(store, "again", upload)
    assert store.collect_garbage(grace_seconds=0) == 0
    assert store.read_blob(TENANT, upload.sha256) == upload.data


def test_bytes_collected_can_be_uploaded_again(store: Store, blob: MakeBlob) -> None:
    upload = blob()
    put(store, "e2e", upload)
    store.delete_task(TENANT, "e2e")
    assert store.collect_garbage(grace_seconds=0) == 1000
    put(store, "e2e", upload)
    assert store.collect_garbage(grace_seconds=0) == 0
    assert store.read_blob(TENANT, upload.sha256) == upload.data
