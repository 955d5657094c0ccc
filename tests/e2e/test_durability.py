"""What was answered with 201 survives kill -9 of the server and of Redis; a torn blob is told.

The stores' own tests sweep the moment of death finely; these go through HTTP and the client.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from prefixd import Client, PrefixdError, UnavailableError, UploadResult
from prefixd_store.arrays import PrefixArray
from prefixd_store.format import write_prefix
from tests.support.redis_server import RedisServer
from tests.support.server import LiveServer, ServerProcess

TASKS = ["a", "b", "c"]


class PrefixFiles:
    """New prefix files of the tiny model's shape, one after the other."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        self._values = np.random.default_rng(0)

    def new(self) -> Path:
        path = self._folder / f"prefix-{next(self._numbers)}.safetensors"
        length = int(self._values.integers(1, 100))
        arrays = {
            name: PrefixArray(
                self._values.standard_normal((3, 2, length, 8)).astype("<f4"), "float32"
            )
            for name in ("decoder.key", "decoder.value")
        }
        write_prefix(path, arrays, query_offset=length, base_model="tiny-llama")
        return path


@pytest.fixture
def files(tmp_path: Path) -> PrefixFiles:
    folder = tmp_path / "files"
    folder.mkdir()
    return PrefixFiles(folder)


class Uploads:
    """A stream of uploads that ends when the server does; ``acknowledged`` were answered 201."""

    def __init__(self, client: Client, files: PrefixFiles, seed: int) -> None:
        self.acknowledged: list[UploadResult] = []
        self._client = client
        self._files = files
        self._moments = random.Random(seed)
        self._thread = threading.Thread(target=self._upload)

    def _upload(self) -> None:
        while True:
            try:
                result = self._client.push(self._moments.choice(TASKS), self._files.new())
            except PrefixdError:
                return
            assert result.created
            self.acknowledged.append(result)

    def until_killed(self, kill: Callable[[], None]) -> None:
        """Upload, kill at some moment after at least one acknowledgement, wait for the end."""
        self._thread.start()
        while not self.acknowledged and self._thread.is_alive():
            time.sleep(0.001)
        time.sleep(self._moments.uniform(0, 0.15))
        kill()
        self._thread.join()


class Seen(NamedTuple):
    task: str
    version: int
    sha256: str


class Checker:
    """Looks at each version that appears once, and at the whole each time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: set[Seen] = set()

    def check(self, client: Client, acknowledged: list[UploadResult]) -> None:
        tasks = list(client.tasks())
        visible = {Seen(v.task, v.version, v.sha256) for task in tasks for v in task.versions}
        assert {Seen(a.task, a.version, a.sha256) for a in acknowledged} <= visible
        assert self._seen <= visible
        for task in tasks:
            numbers = [version.version for version in task.versions]
            assert numbers == list(range(1, len(numbers) + 1))
            assert sum(task.split.values()) == 1.0
            served = client.generate(task.task, "x", max_new_tokens=1).version
            # An upload that nobody waits for any more may still have arrived meanwhile.
            assert served in (task.active, client.task(task.task).active)
        for version in visible - self._seen:
            self._check_whole(client, version)
        self._seen = visible

    def _check_whole(self, client: Client, version: Seen) -> None:
        path = client.pull(version.task, self._folder / "pulled", version=version.version)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == version.sha256
        answer = client.generate(
            version.task, "x", version=version.version, max_new_tokens=1, ignore_eos=True
        )
        assert answer.usage.completion_tokens == 1


@pytest.mark.parametrize(("kind", "rounds"), [("disk", 3), ("redis", 1)])
def test_uploads_survive_a_killed_server(
    request: pytest.FixtureRequest,
    model: Path,
    tmp_path: Path,
    files: PrefixFiles,
    kind: str,
    rounds: int,
) -> None:
    folder = tmp_path / "store"
    store = str(folder) if kind == "disk" else empty(request.getfixturevalue("redis"))
    checker = Checker(tmp_path)
    acknowledged: list[UploadResult] = []
    spool = tmp_path / "spool"
    spool.mkdir()
    server = ServerProcess(model=model, store=store, env={"TMPDIR": str(spool)})
    with server, server.client() as client:
        for seed in range(rounds):
            uploads = Uploads(client, files, seed)
            uploads.until_killed(server.kill)
            acknowledged += uploads.acknowledged
            server.start()
            checker.check(client, acknowledged)
            # What the dead one was in the middle of is swept away.
            (own,) = spool.iterdir()
            assert list(own.iterdir()) == []
            if kind == "disk":
                assert list((folder / "tmp").iterdir()) == []
        assert len(acknowledged) >= rounds


def empty(redis: RedisServer) -> str:
    with redis.client() as client:
        client.flushall()
    return redis.url


def test_uploads_survive_a_killed_redis(
    redis_server: LiveServer, redis: RedisServer, tmp_path: Path, files: PrefixFiles
) -> None:
    empty(redis)
    checker = Checker(tmp_path)
    acknowledged: list[UploadResult] = []
    with redis_server.client() as client, redis_server.client(max_retries=8) as patient:
        for seed in range(6):
            uploads = Uploads(client, files, seed)
            uploads.until_killed(redis.kill)
            acknowledged += uploads.acknowledged
            redis.start()
            patient.push("alive", files.new())
            checker.check(patient, acknowledged)
        assert len(acknowledged) >= 6
    redis_server.check_nothing_held()


def flip(blob: bytearray) -> bytearray:
    blob[-100] ^= 0x10
    return blob


def cut(blob: bytearray) -> bytearray:
    return blob[: len(blob) // 2]


def zero(blob: bytearray) -> bytearray:
    """As a filesystem leaves a file whose data never reached the device."""
    return bytearray(len(blob))


@pytest.fixture
def torn(live: LiveServer, client: Client, files: PrefixFiles) -> tuple[Path, Path]:
    """The upload and the blob of task ``torn``, not loaded yet, beside the sound ``whole``."""
    upload = files.new()
    sha256 = client.push("torn", upload).sha256
    client.push("whole", files.new())
    root = Path(live.server.config.store.store)
    (blob,) = root.glob(f"tenants/*/blobs/{sha256}.safetensors")
    return upload, blob


@pytest.mark.parametrize("tear", [flip, cut, zero])
def test_a_torn_blob_is_told_and_never_served(
    torn: tuple[Path, Path],
    live: LiveServer,
    client: Client,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    tear: Callable[[bytearray], bytearray],
) -> None:
    upload, blob = torn
    blob.write_bytes(tear(bytearray(blob.read_bytes())))
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            with pytest.raises(UnavailableError) as unusable:
                client.generate("torn", "x", max_new_tokens=1)
            assert (unusable.value.status, unusable.value.code) == (503, "corrupt_blob")
        with pytest.raises(UnavailableError) as unusable:
            client.pull("torn", tmp_path / "pulled")
        assert unusable.value.code == "corrupt_blob"
    assert any(str(blob) in record.message for record in caplog.records)
    assert client.version("torn", 1).residency in ("failed", "stored")
    assert client.generate("whole", "x", max_new_tokens=1).version == 1
    assert client.ready().ok

    # The same bytes once more mend it.
    again = client.push("torn", upload)
    assert (again.created, again.version) == (False, 1)
    with live.client(max_retries=5) as patient:
        assert patient.generate("torn", "x", max_new_tokens=1).version == 1
