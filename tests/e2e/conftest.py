"""One tiny model, a few prefixes that PEFT saved, and servers that must end with nothing held."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from prefixd import Client
from tests.support.models import load_base, save_peft_prefix, tiny_model_folder
from tests.support.redis_server import RedisServer, running_redis
from tests.support.server import LiveServer

LENGTHS = (1, 7, 20, 33)
"""virtual tokens of the prefixes: less than a page, not a multiple, more than one page"""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder("llama", tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="session")
def prefixes(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """PEFT checkpoints of :data:`LENGTHS`; none like another."""
    root = tmp_path_factory.mktemp("prefixes")
    base = load_base(model)
    return [
        save_peft_prefix(base, root / f"p{length}", num_virtual_tokens=length, seed=length)
        for length in LENGTHS
    ]


@pytest.fixture(scope="module")
def disk_server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(model, str(tmp_path_factory.mktemp("store"))) as server:
        yield server


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running_redis(tmp_path_factory.mktemp("redis"), appendonly=True) as server:
        yield server


@pytest.fixture(scope="module")
def redis_server(model: Path, redis: RedisServer) -> Iterator[LiveServer]:
    with LiveServer(model, redis.url) as server:
        yield server


@pytest.fixture
def live(disk_server: LiveServer) -> Iterator[LiveServer]:
    """The module's server on a disk store, empty; whatever a test did, nothing may be left."""
    yield disk_server
    disk_server.check_nothing_held()
    with disk_server.client() as client:
        for task in list(client.tasks()):
            client.delete(task.task)
    disk_server.evict_all()


@pytest.fixture
def client(live: LiveServer) -> Iterator[Client]:
    with live.client() as client:
        yield client
