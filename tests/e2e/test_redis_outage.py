"""Redis goes away and comes back: what is resident is served on, the rest says so and recovers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefixd import Client, UnavailableError
from prefixd_store.format import read_manifest
from prefixd_store.records import DEFAULT_TENANT
from prefixd_store.store import Store
from tests.support.redis_server import RedisServer
from tests.support.server import LiveServer, wait_until


@pytest.fixture
def server(redis_server: LiveServer) -> Iterator[LiveServer]:
    yield redis_server
    redis_server.check_nothing_held()
    with redis_server.client() as client:
        for task in list(client.tasks()):
            client.delete(task.task)


def text(client: Client, task: str, **parameters: float) -> str:
    answer = client.generate(
        task,
        "once upon",
        max_new_tokens=10,
        ignore_eos=True,
        **parameters,  # type: ignore[arg-type]
    )
    return answer.generated_text


class Load:
    """Four clients that ask for one task over and over."""

    def __init__(self, server: LiveServer, task: str) -> None:
        self.answers: list[str] = []
        self.errors: list[Exception] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(server, task)) for _ in range(4)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, server: LiveServer, task: str) -> None:
        with server.client() as client:
            while not self._stop.is_set():
                try:
                    self.answers.append(text(client, task))
                except Exception as error:
                    self.errors.append(error)

    def goes_on(self) -> bool:
        """Whether twenty more requests come through, none with an error."""
        wanted = len(self.answers) + 20
        wait_until(lambda: len(self.answers) >= wanted or self.errors, what="answers")
        return not self.errors


def publish(store: Store, task: str, file: Path, sha256: str) -> None:
    """An upload through another replica."""
    version = read_manifest(file).version_record(sha256, file.stat().st_size)
    store.put_version(DEFAULT_TENANT, task, file, version)


def test_killed_and_restarted_under_load(
    server: LiveServer, redis: RedisServer, prefixes: list[Path], tmp_path: Path
) -> None:
    with server.client() as client, Load(server, "base") as on_base:
        client.push("warm", prefixes[2])
        client.push("cold", prefixes[3])
        expected = text(client, "warm")
        file = client.pull("cold", tmp_path / "cold.safetensors")
        assert client.version("cold", 1).residency == "stored"
        with Load(server, "warm") as load:
            assert load.goes_on()
            redis.kill()
            assert load.goes_on()
            wait_until(lambda: client.ready().status == "store_unavailable")
            assert client.live().ok

            with pytest.raises(UnavailableError) as not_loaded:
                text(client, "cold", timeout_s=0.7)
            assert "cold@1" in not_loaded.value.message
            for call in (
                lambda: client.push("new", prefixes[1]),
                lambda: client.activate("warm", 1),
                lambda: client.delete("cold"),
                lambda: client.pull("cold", tmp_path / "again.safetensors"),
                lambda: text(client, "unknown"),
            ):
                with pytest.raises(UnavailableError) as away:
                    call()
                assert (away.value.status, away.value.code) == (503, "store_unavailable")
                assert away.value.retry_after is not None
            assert [task.task for task in client.tasks()] == ["cold", "warm"]
            assert load.goes_on()

            redis.start()
            wait_until(lambda: client.ready().ok)
            assert text(client, "cold")
            assert client.push("new", prefixes[1]).version == 1
            sha256 = client.version("cold", 1).sha256
            publish(server.open_store(), "from-elsewhere", file, sha256)
            wait_until(lambda: "from-elsewhere" in [task.task for task in client.tasks()])
            assert text(client, "from-elsewhere") == text(client, "cold")
            assert load.goes_on()
        assert set(load.answers) == {expected}
    assert on_base.errors == []


def test_a_redis_that_hangs(server: LiveServer, redis: RedisServer, prefixes: list[Path]) -> None:
    """It takes connections and answers nothing for a while, as one whose disk is stuck does."""
    with server.client() as client:
        client.push("warm", prefixes[2])
        client.push("cold", prefixes[3])
        text(client, "warm")
        with Load(server, "warm") as load:
            with redis.client() as admin:
                admin.client_pause(4000)
            with pytest.raises(UnavailableError) as not_loaded:
                text(client, "cold", timeout_s=0.7)
            assert "cold@1" in not_loaded.value.message
            assert load.goes_on()
            wait_until(lambda: redis.client().ping())
            assert text(client, "cold")
            assert load.goes_on()
