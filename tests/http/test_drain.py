"""SIGTERM to a real process: requests in flight finish, new ones are refused, it exits 0."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from tests.http.harness import wait_until

ROOT = Path(__file__).parents[2]
STREAM = {"inputs": "fox", "stream": True, "parameters": {"max_new_tokens": 5}}


class Server(NamedTuple):
    process: subprocess.Popen[str]
    url: str
    folder: Path

    def finish(self) -> tuple[int, str]:
        """Its exit code and its log."""
        _, log = self.process.communicate(timeout=20)
        return self.process.returncode, log


@contextmanager
def server(folder: Path, drain_timeout_s: float) -> Iterator[Server]:
    command = [sys.executable, "-m", "tests.http.drain_server", str(folder), str(drain_timeout_s)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield Server(process, process.stdout.readline().strip(), folder)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def not_ready(url: str) -> bool:
    return httpx.get(f"{url}/readyz").status_code == 503


def test_requests_in_flight_finish(tmp_path: Path) -> None:
    with server(tmp_path, 30) as running:
        url = running.url
        with httpx.stream("POST", f"{url}/v1/tasks/base/generate", json=STREAM) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.process.send_signal(signal.SIGTERM)
            wait_until(lambda: not_ready(url))
            assert httpx.get(f"{url}/readyz").json() == {"status": "draining"}
            assert httpx.get(f"{url}/livez").status_code == 200
            refused = httpx.post(f"{url}/v1/tasks/base/generate", json=STREAM)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert refused.headers["retry-after"] == "1"
            (running.folder / "go").touch()
            events = [json.loads(line[6:]) for line in lines if line]
        assert events[-1]["details"]["finish_reason"] == "length"
        code, log = running.finish()
        assert code == 0
        assert "Traceback" not in log
        records = [json.loads(line) for line in log.splitlines()]
        assert [r["status"] for r in records if r["event"] == "request"] == [503, 200]


def test_what_does_not_finish_is_ended(tmp_path: Path) -> None:
    with server(tmp_path, 0.3) as running:
        path = f"{running.url}/v1/tasks/base/generate"
        with httpx.stream("POST", path, json=STREAM) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.process.send_signal(signal.SIGTERM)
            events = [json.loads(line[6:]) for line in lines if line]
        assert events[-1]["error"]["code"] == "draining"
        code, log = running.finish()
        assert code == 0
        assert "Traceback" not in log


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_leaves_at_once(tmp_path: Path, first: signal.Signals) -> None:
    with server(tmp_path, 600) as running:
        path = f"{running.url}/v1/tasks/base/generate"
        with httpx.stream("POST", path, json=STREAM) as answer:
            lines = answer.iter_lines()  # kept: a dropped iterator closes the connection
            next(lines)
            running.process.send_signal(first)
            wait_until(lambda: not_ready(running.url))
            running.process.send_signal(signal.SIGTERM)
            code, log = running.finish()
        assert code == 0
        assert "Traceback" not in log


def test_an_idle_server_leaves(tmp_path: Path) -> None:
    with server(tmp_path, 600) as running:
        with httpx.Client(base_url=running.url) as kept_alive:
            assert kept_alive.get("/livez").status_code == 200
            running.process.send_signal(signal.SIGTERM)
            code, log = running.finish()
        assert code == 0
        assert "Traceback" not in log
