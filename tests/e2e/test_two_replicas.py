"""Two servers on one store are one service: a change made on either is a change of both."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from prefixd import Client, NotFoundError
from tests.support.redis_server import RedisServer
from tests.support.server import LiveServer, wait_until


class Pair(NamedTuple):
    a: Client
    b: Client


@pytest.fixture(params=["disk", "redis"])
def pair(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> Iterator[Pair]:
    if request.param == "disk":
        store = str(tmp_path / "store")
    else:
        redis: RedisServer = request.getfixturevalue("redis")
        store = redis.url
        with redis.client() as client:
            client.flushall()
    with LiveServer(model, store) as a, LiveServer(model, store) as b:
        with a.client() as client_a, b.client() as client_b:
            yield Pair(client_a, client_b)
        a.check_nothing_held()
        b.check_nothing_held()


def text(client: Client, task: str) -> str:
    return client.generate(task, "x y z", max_new_tokens=8, ignore_eos=True).generated_text


def test_changes_of_one_are_seen_by_the_other(pair: Pair, prefixes: list[Path]) -> None:
    a, b = pair
    a.push("e2e", prefixes[2])
    assert text(b, "e2e") == text(a, "e2e")  # at once: b asks the store for what it does not know

    assert a.push("e2e", prefixes[3]).version == 2
    wait_until(lambda: b.task("e2e").active == 2)
    assert b.generate("e2e", "x", max_new_tokens=1).version == 2
    assert text(b, "e2e") == text(a, "e2e@2") != text(a, "e2e@1")

    b.activate("e2e", 1)
    wait_until(lambda: a.task("e2e").active == 1)
    assert text(a, "e2e") == text(b, "e2e@1")

    a.activate("e2e", split={1: 0.5, 2: 0.5})
    wait_until(lambda: b.task("e2e").split == {1: 0.5, 2: 0.5})

    b.activate("e2e", 2)
    b.delete_version("e2e", 1)
    wait_until(lambda: [v.version for v in a.task("e2e").versions] == [2])
    with pytest.raises(NotFoundError):
        text(a, "e2e@1")

    a.delete("e2e")
    wait_until(lambda: list(b.tasks()) == [])
    with pytest.raises(NotFoundError):
        text(b, "e2e")


def test_the_task_made_again_is_the_new_one(pair: Pair, prefixes: list[Path]) -> None:
    """Same name, same version number, other bytes: nothing of the old one may be left on b."""
    a, b = pair
    a.push("e2e", prefixes[1])
    old = text(b, "e2e")
    a.delete("e2e")
    a.push("e2e", prefixes[3])
    new = text(a, "e2e")
    assert new != old
    sha256 = a.version("e2e", 1).sha256
    wait_until(lambda: b.version("e2e", 1).sha256 == sha256)
    assert text(b, "e2e") == new


def test_both_upload_to_one_task_at_once(pair: Pair, prefixes: list[Path]) -> None:
    threads = [
        threading.Thread(target=client.push, args=("e2e", prefix))
        for client, prefix in zip([*pair, *pair], prefixes, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: all(len(client.task("e2e").versions) == 4 for client in pair))
    a, b = (client.task("e2e") for client in pair)
    assert a.etag == b.etag
    assert [v.version for v in a.versions] == [1, 2, 3, 4]
    assert len({v.sha256 for v in a.versions}) == 4
    assert a.active is not None
