"""Every form of URL against the real thing: TLS, ACL users, sockets, Sentinel, Cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis

from prefixd_store.errors import InvalidRequest, StoreUnavailable
from prefixd_store.redis_urls import public_url
from prefixd_store.store import open_store
from tests.prefixd_store.support import TENANT, MakeBlob, Replica, put
from tests.support.redis_server import RedisServer, TlsFiles, running_redis

PASSWORD = "s3cr3t/@:#"
COMMANDS = (
    "get set strlen unlink hget hmget hset hdel hexists hincrby zadd zrem zscore zrange "
    "zrangebylex zrangebyscore xadd xread eval time ping info"
)
QUOTED = "s3cr3t%2F%40%3A%23"


def use(url: str, blob: MakeBlob) -> None:
    """Everything a server does with its store, once."""
    store = open_store(url, chunk_bytes=400)
    replica = Replica(store)
    upload = blob(1000)
    put(store, "e2e", upload)
    put(store, "e2e", blob())
    store.ping()
    assert store.read_blob(TENANT, upload.sha256) == upload.data
    assert [task.name for task in store.list_tasks(TENANT, prefix="e").tasks] == ["e2e"]
    replica.follow(timeout=0.01)
    assert replica.tasks == {(TENANT, "e2e"): store.get_task(TENANT, "e2e")}
    store.delete_version(TENANT, "e2e", 1)
    assert store.collect_garbage(grace_seconds=0) == 1000
    store.delete_task(TENANT, "e2e")
    assert store.all_tasks() == []
    assert store.collect_garbage(grace_seconds=0) == 1000
    store.close()


def test_tls(tmp_path: Path, blob: MakeBlob) -> None:
    with running_redis(tmp_path / "redis", tls=TlsFiles(tmp_path)) as server:
        use(server.url, blob)
        with pytest.raises(StoreUnavailable, match="certificate"):
            open_store(f"rediss://127.0.0.1:{server.port}/0")
        with pytest.raises(StoreUnavailable):
            open_store(f"redis://127.0.0.1:{server.port}/0")


@pytest.fixture(scope="module")
def acl_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Its user may do what docs/stores.md says that the store needs, and nothing else."""
    allowed = " ".join(f"+{command}" for command in COMMANDS.split())
    socket = tmp_path_factory.mktemp("socket") / "redis.sock"
    options = [
        f"user prefixd on >{PASSWORD} ~{{prefixd}}:* ~prefixd:blob:* {allowed}",
        f"user reader on >{PASSWORD} ~* +ping +info",
        f"unixsocket {socket}",
    ]
    with running_redis(socket.parent, options=options, password="other") as server:
        yield server


def test_acl_user(acl_server: RedisServer, blob: MakeBlob) -> None:
    use(f"redis://prefixd:{QUOTED}@127.0.0.1:{acl_server.port}/0", blob)


def test_unix_socket(acl_server: RedisServer, blob: MakeBlob) -> None:
    use(f"unix://prefixd:{QUOTED}@{acl_server.folder}/redis.sock?db=0", blob)


@pytest.mark.parametrize(
    ("user", "reason"),
    [(f"prefixd:wrong-{QUOTED}", "invalid username-password"), ("", "Authentication required")],
)
def test_wrong_credentials_say_why_and_show_no_password(
    acl_server: RedisServer, user: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(StoreUnavailable, match=reason) as caught:
        open_store(f"redis://{user}@127.0.0.1:{acl_server.port}/0")
    told = f"{caught.value.message} {caught.value!r} {caplog.text}"
    assert "s3cr3t" not in told
    assert f"redis://127.0.0.1:{acl_server.port}/0" in told


def test_a_user_without_the_right_is_unavailable(acl_server: RedisServer, blob: MakeBlob) -> None:
    store = open_store(f"redis://reader:{QUOTED}@127.0.0.1:{acl_server.port}/0")
    with pytest.raises(StoreUnavailable, match="permissions"):
        store.all_tasks()
    with pytest.raises(StoreUnavailable, match="permissions"):
        put(store, "e2e", blob())
    store.close()


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:s3cr3t/x@host:6379/0",
        "redis://:s3cr3t@host:port/0",
        "redis+cluster://:s3cr3t@host:99999999",
        "redis+cluster://:s3cr3t@",
        "redis+sentinel://:s3cr3t@host:1",
        "redis+sentinel://:s3cr3t@host:1/service/zero",
        "redis+magic://:s3cr3t@host:1",
        "redis://:s3cr3t@host/0?socket_timeout=soon",
    ],
)
def test_urls_that_cannot_be_parsed_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        open_store(url)
    assert caught.value.param == "store"
    assert "s3cr3t" not in f"{caught.value} {caught.value.__cause__}"


def test_public_url_has_no_secrets() -> None:
    assert public_url("rediss://u:p@h:1/0?ssl_password=p") == "rediss://h:1/0"
    assert public_url("redis+sentinel://u:p@h:1,i:2/s/0") == "redis+sentinel://h:1,i:2/s/0"
    assert public_url("unix:///run/redis.sock?password=p") == "unix:///run/redis.sock"


# --- Sentinel ----------------------------------------------------------------------------------


def wait_until(what: Callable[[], object], seconds: float = 30.0) -> None:
    """Poll; the deadline only ends a test that would hang."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if what():
                return
        except (redis.RedisError, StoreUnavailable):
            pass
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sentinel_fails_over(tmp_path: Path, blob: MakeBlob) -> None:
    with ExitStack() as stack:
        password = f"masterauth {PASSWORD}"
        master = stack.enter_context(
            running_redis(
                tmp_path / "master",
                password=PASSWORD,
                options=[password, "repl-diskless-sync-delay 0"],
            )
        )
        replica = stack.enter_context(
            running_redis(
                tmp_path / "replica",
                password=PASSWORD,
                options=[password, f"replicaof 127.0.0.1 {master.port}"],
            )
        )
        with replica.client() as client:
            wait_until(lambda: client.info("replication")["master_link_status"] == "up")
        monitor = [
            f"sentinel monitor main 127.0.0.1 {master.port} 1",
            f"sentinel auth-pass main {PASSWORD}",
            "sentinel down-after-milliseconds main 300",
            "sentinel failover-timeout main 3000",
        ]
        sentinel = stack.enter_context(
            running_redis(tmp_path / "sentinel", sentinel=True, options=monitor)
        )
        url = f"redis+sentinel://:{QUOTED}@127.0.0.1:{sentinel.port},127.0.0.1:1/main/0"
        use(url, blob)

        store = open_store(url)
        follower = Replica(store)
        upload = blob()
        put(store, "e2e", upload)
        with master.client() as client:
            assert client.wait(1, 10_000) == 1
        with sentinel.client() as client:
            wait_until(lambda: client.sentinel_slaves("main"))
        master.kill()
        wait_until(lambda: put(store, "after", blob()))
        assert store.read_blob(TENANT, upload.sha256) == upload.data
        follower.follow()
        assert follower.tasks == {(t.tenant, t.name): t for t in store.all_tasks()}
        assert len(follower.tasks) == 2
        store.close()


def test_sentinel_of_an_unknown_service(tmp_path: Path) -> None:
    with (
        running_redis(tmp_path / "sentinel", sentinel=True) as sentinel,
        pytest.raises(StoreUnavailable, match="nosuch"),
    ):
        open_store(f"redis+sentinel://127.0.0.1:{sentinel.port}/nosuch")


# --- Cluster -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RedisServer]]:
    """Three primaries, a third of the slots each."""
    folder = tmp_path_factory.mktemp("cluster")
    with ExitStack() as stack:
        options = {"cluster": True, "appendonly": True, "options": ["cluster-node-timeout 1000"]}
        nodes = [stack.enter_context(running_redis(folder / f"{n}", **options)) for n in range(3)]
        bounds = [0, 5461, 10922, 16384]
        for n, node in enumerate(nodes):
            with node.client() as client:
                client.execute_command("CLUSTER ADDSLOTSRANGE", bounds[n], bounds[n + 1] - 1)
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", n + 1)
                for other in nodes[:n]:
                    bus = int(other.client().config_get("cluster-port")["cluster-port"])
                    client.execute_command("CLUSTER MEET", "127.0.0.1", other.port, bus)
        for node in nodes:
            with node.client() as client:
                wait_until(lambda c=client: _is_formed(c))  # type: ignore[misc]
        yield nodes


def _is_formed(client: Any) -> bool:
    info = client.execute_command("CLUSTER INFO")
    text = info if isinstance(info, dict) else dict(x.split(":") for x in info.decode().split())
    return (text["cluster_state"], text["cluster_known_nodes"]) == ("ok", "3")


def cluster_url(nodes: list[RedisServer]) -> str:
    return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes)


def test_cluster(cluster: list[RedisServer], blob: MakeBlob) -> None:
    use(cluster_url(cluster[:2]), blob)


def test_a_cluster_spreads_the_chunks(cluster: list[RedisServer], blob: MakeBlob) -> None:
    store = open_store(cluster_url(cluster), chunk_bytes=100)
    upload = blob(5000)
    put(store, "e2e", upload)
    assert store.read_blob(TENANT, upload.sha256) == upload.data
    chunks = [len(node.client().keys(f"prefixd:blob:*:{upload.sha256}:*")) for node in cluster]
    assert sum(chunks) == 50
    assert all(chunks)
    store.close()


def test_a_cluster_outage(cluster: list[RedisServer], blob: MakeBlob) -> None:
    store = open_store(cluster_url(cluster))
    put(store, "before", blob())
    replica = Replica(store)
    slot = cluster[0].client().execute_command("CLUSTER KEYSLOT", "{prefixd}:tasks")
    node = cluster[slot * 3 // 16384]
    node.kill()
    with pytest.raises(StoreUnavailable, match=r"redis\+cluster://127\.0\.0\.1"):
        put(store, "e2e", blob())
    node.start()
    wait_until(lambda: put(store, "after", blob()))
    replica.follow()
    assert replica.tasks == {(t.tenant, t.name): t for t in store.all_tasks()}
    assert replica.resets == 1
    store.close()
