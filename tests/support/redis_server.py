"""A private, real redis-server for tests: on a free loopback port, in a folder of its own."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis

START_SECONDS = 20.0


class RedisServer:
    """``port`` stays the same over restarts. Also runs Sentinel (``sentinel=True``) and, with
    ``cluster=True``, a node of a cluster.

    ``options`` are lines of redis.conf, such as ``"maxmemory 100mb"`` or a ``user`` rule.
    """

    def __init__(
        self,
        folder: Path,
        *,
        appendonly: bool = False,
        options: Sequence[str] = (),
        tls: TlsFiles | None = None,
        cluster: bool = False,
        sentinel: bool = False,
        password: str | None = None,
    ) -> None:
        self.folder = folder
        self.port = free_port()
        self.tls = tls
        self.password = password
        self._arguments = ["--sentinel"] if sentinel else []
        self._cluster = cluster
        self._lines = [*self._config(appendonly), *options]
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "redis.conf").write_text("\n".join(self._lines) + "\n")

    def _config(self, appendonly: bool) -> list[str]:
        lines = [f"dir {self.folder}", "bind 127.0.0.1", "daemonize no", "save ''"]
        if self._arguments:
            lines.remove("save ''")
        if self.tls is None:
            lines.append(f"port {self.port}")
        else:
            lines += ["port 0", f"tls-port {self.port}", "tls-auth-clients no"]
            lines += [f"tls-cert-file {self.tls.cert}", f"tls-key-file {self.tls.key}"]
            lines += [f"tls-ca-cert-file {self.tls.cert}"]
        if appendonly:
            lines += ["appendonly yes", "appendfsync always"]
        if self._cluster:
            # The bus port is the port plus 10,000 by default, which may be out of range.
            lines += ["cluster-enabled yes", f"cluster-port {free_port()}"]
        if self.password is not None:
            lines.append(f"requirepass {self.password}")
        return lines

    @property
    def url(self) -> str:
        user = f":{quote(self.password, safe='')}@" if self.password else ""
        if self.tls is not None:
            return f"rediss://{user}127.0.0.1:{self.port}/0?ssl_ca_certs={self.tls.cert}"
        return f"redis://{user}127.0.0.1:{self.port}/0"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> RedisServer:
        """Start and wait until it has loaded its data and answers."""
        assert self._process is None
        with (self.folder / "redis.log").open("ab") as log:
            command = ["redis-server", str(self.folder / "redis.conf"), *self._arguments]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self.running, f"redis-server ended: {self.log()[-1000:]}"
            assert time.monotonic() < deadline, f"redis-server is silent: {self.log()[-1000:]}"
            time.sleep(0.02)
        return self

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.AuthenticationError:
            return True
        except (redis.ConnectionError, redis.TimeoutError, redis.BusyLoadingError):
            return False

    def client(self, **options: Any) -> Any:
        """redis-py, typed Any: its answers are unions with awaitables."""
        return redis.Redis.from_url(self.url, **options)

    def log(self) -> str:
        return (self.folder / "redis.log").read_text(errors="replace")

    def stop(self) -> None:
        """Shut down in order."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """kill -9."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(timeout=START_SECONDS)
            self._process = None


class TlsFiles:
    """A self-signed certificate for 127.0.0.1, made by openssl in ``folder``."""

    def __init__(self, folder: Path) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("openssl is not installed")
        folder.mkdir(parents=True, exist_ok=True)
        self.cert = folder / "cert.pem"
        self.key = folder / "key.pem"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-nodes", "-days", "2"]
        command += ["-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", "/CN=127.0.0.1"]
        command += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(self.cert)]
        subprocess.run([*command, "-keyout", str(self.key)], check=True, capture_output=True)


@contextmanager
def running_redis(folder: Path, **options: Any) -> Iterator[RedisServer]:
    """A started :class:`RedisServer`; skips the test where redis-server is not installed."""
    require_redis()
    server = RedisServer(folder, **options)
    try:
        yield server.start()
    finally:
        server.kill()


def require_redis() -> None:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
