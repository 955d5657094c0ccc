"""The processes under test: a server, and peers that answer ``run`` on their standard input.

All stay loaded, and a process is stopped while it is not its turn: what idles may spin or wake.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from harness.memory import status_bytes
from prefixd import Client

__all__ = ["Peer", "PeerFailed", "Served", "serve"]

_COMMON = Path(__file__).parents[1] / "peers" / "common"
_ENGINE = Path(__file__).with_name("engine_process.py")


@dataclass(frozen=True)
class Served:
    url: str
    pid: int
    ready_s: float
    """from the process's start until it was ready"""

    @property
    def rss_bytes(self) -> int:
        """Memory of the process that is in RAM now."""
        return status_bytes("VmRSS", self.pid)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """It runs within, and is stopped after."""
        os.killpg(self.pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.killpg(self.pid, signal.SIGSTOP)


@contextmanager
def serve(flags: Sequence[str]) -> Iterator[Served]:
    """``prefixd serve`` with these flags on a free loopback port, until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "prefixd", "serve", f"--port={port}", "--log-level=error"]
    start = time.perf_counter()
    process = subprocess.Popen([*command, *flags], process_group=0)
    url = f"http://127.0.0.1:{port}"
    try:
        with Client(url) as client:
            while not _is_ready(client):
                if process.poll() is not None:
                    raise RuntimeError(f"the server ended with {process.returncode}")
                time.sleep(0.02)
        yield Served(url, process.pid, time.perf_counter() - start)
    finally:
        process.terminate()
        process.send_signal(signal.SIGCONT)
        process.wait()


def _is_ready(client: Client) -> bool:
    try:
        return client.ready().status == "ready"
    except Exception:
        return False


class PeerFailed(Exception):
    """It did not start, or a run failed; the message says why."""


class Peer:
    """A process that stays loaded and runs a batch when asked. Speaks peers/common/peer.py."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | {"PYTHONPATH": _python_path()} | dict(environment or {}),
            process_group=0,
        )
        self.settings: dict[str, Any] = {}

    @classmethod
    def engine(cls, flags: Sequence[str]) -> Self:
        """prefixd's engine without HTTP and without text, with the flags of ``prefixd serve``."""
        return cls("prefixd engine", [sys.executable, str(_ENGINE), *flags])

    def wait_until_ready(self) -> None:
        self.settings = self._answer()["ready"]
        self._signal(signal.SIGSTOP)

    def run(self, requests: int, new_tokens: int, tasks: int) -> dict[str, Any]:
        """Figures of one batch: ``tokens``, ``seconds``, ``first`` and what the peer adds."""
        assert self._process.stdin is not None
        try:
            self._signal(signal.SIGCONT)
            self._process.stdin.write(f"run {requests} {new_tokens} {tasks}\n")
            self._process.stdin.flush()
        except OSError:
            raise PeerFailed(self._last_words()) from None
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        if "error" in answer:
            raise PeerFailed(answer["error"])
        return answer

    def close(self) -> None:
        self._process.terminate()
        if self._process.poll() is None:
            self._signal(signal.SIGCONT)
        self._process.wait()
        self._errors.close()

    def _signal(self, number: signal.Signals) -> None:
        """To it and to the processes that it has started."""
        os.killpg(self._process.pid, number)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerFailed(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"exit {code}: {lines[-1] if lines else 'no message'}"


def _python_path() -> str:
    inherited = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(_COMMON), *([inherited] if inherited else [])])
