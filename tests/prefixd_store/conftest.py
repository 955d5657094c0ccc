"""One fresh backend a test, disk or Redis, and blobs of random bytes to put into it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prefixd_store.disk import DiskStore
from prefixd_store.store import Store
from tests.prefixd_store.support import Backend, Blob, make_blob
from tests.support.redis_server import RedisServer, running_redis


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["disk", "redis"])
def new_backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Backend]]:
    """A factory of backends that nothing is in."""
    made: list[Backend] = []

    def make() -> Backend:
        if request.param == "disk":
            made.append(Backend(str(tmp_path / f"store-{len(made)}")))
        else:
            server: RedisServer = request.getfixturevalue("redis_server")
            made.append(Backend(server.url, {"namespace": f"test-{uuid.uuid4().hex}"}))
        return made[-1]

    yield make
    for backend in made:
        backend.close()


@pytest.fixture
def backend(new_backend: Callable[[], Backend]) -> Backend:
    """An empty backend; ``backend.open()`` gives one more handle on it."""
    return new_backend()


@pytest.fixture
def store(backend: Backend) -> Store:
    return backend.open()


@pytest.fixture
def blob(tmp_path: Path) -> Any:
    """A factory: ``blob()`` or ``blob(size)`` is a new file of random bytes and its record."""

    def make(size: int = 1000) -> Blob:
        return make_blob(tmp_path, size)

    return make


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def disk(root: Path) -> DiskStore:
    return DiskStore(root)
