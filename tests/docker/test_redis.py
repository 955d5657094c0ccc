"""The Redis service's own command and configuration, run with a real redis-server."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from tests.docker.files import DOCKER, interpolate, load_yaml

SERVICE = load_yaml("compose.yaml")["services"]["redis"]
PASSWORD = "s3cret-Pass_word"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """Run the service's command, with the container's paths replaced by those of this machine."""
    settings = folder / "redis.conf"
    text = (DOCKER / "redis.conf").read_text()
    settings.write_text(text.replace("dir /data", f"dir {folder}") + f"port {port}\n")
    shell, flag, script = (interpolate(word) for word in SERVICE["command"])
    script = script.replace("/usr/local/etc/redis.conf", str(settings))
    environment = {**os.environ, "REDIS_PASSWORD": PASSWORD, "REDIS_MAXMEMORY": "64mb"}
    return subprocess.Popen([shell, flag, script], env=environment, stdout=subprocess.DEVNULL)


def connect(port: int) -> redis.Redis:
    client = redis.Redis(port=port, password=PASSWORD, decode_responses=True)
    for _ in range(200):
        try:
            client.ping()
            return client
        except redis.ConnectionError:
            time.sleep(0.05)
    raise AssertionError("redis-server did not start")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    if not shutil.which("redis-server"):
        pytest.skip("redis-server is not installed")
    port = free_port()
    process = start(tmp_path, port)
    yield process, port
    if process.poll() is None:
        process.kill()
        process.wait()


def test_it_is_a_durable_store_that_evicts_nothing(
    server: tuple[subprocess.Popen[bytes], int],
) -> None:
    _, port = server
    with connect(port) as client:
        settings = client.config_get("*")
    assert settings["appendonly"] == "yes"
    assert settings["appendfsync"] == "always"
    assert settings["maxmemory-policy"] == "noeviction"
    assert settings["maxmemory"] == str(64 << 20)
    assert settings["save"] == ""


def test_it_wants_the_password_and_does_not_show_it(
    server: tuple[subprocess.Popen[bytes], int],
) -> None:
    process, port = server
    connect(port).close()
    with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    assert PASSWORD.encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes()


def test_its_health_check_tells_a_server_from_none(
    server: tuple[subprocess.Popen[bytes], int],
) -> None:
    _, port = server
    connect(port).close()
    assert "REDISCLI_AUTH" in SERVICE["environment"]
    assert health(port, PASSWORD) == 0
    assert health(port, "wrong") != 0
    assert health(free_port(), PASSWORD) != 0


def health(port: int, password: str) -> int:
    program, *arguments = SERVICE["healthcheck"]["test"][1:]
    environment = {**os.environ, "REDISCLI_AUTH": password}
    command = [program, "-p", str(port), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, timeout=60).returncode


@contextmanager
def restarted(folder: Path) -> Iterator[redis.Redis]:
    """A second server on the files in a folder; it must end well on SIGTERM."""
    port = free_port()
    process = start(folder, port)
    try:
        with connect(port) as client:
            yield client
        process.terminate()
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()


def test_what_it_acknowledged_survives_being_killed(
    server: tuple[subprocess.Popen[bytes], int], tmp_path: Path
) -> None:
    process, port = server
    with connect(port) as client:
        client.set("task", "version 3")
    process.kill()
    process.wait()
    with restarted(tmp_path) as client:
        assert client.get("task") == "version 3"


def test_a_copy_of_a_running_server_is_a_backup(
    server: tuple[subprocess.Popen[bytes], int], tmp_path: Path
) -> None:
    _, port = server
    backup = tmp_path / "backup"
    backup.mkdir()
    with connect(port) as client:
        client.set("task", "version 3")
        client.config_set("auto-aof-rewrite-percentage", 0)
        shutil.copytree(tmp_path / "appendonlydir", backup / "appendonlydir")
        client.set("task", "version 4")
    with restarted(backup) as client:
        assert client.get("task") == "version 3"
