"""The health check program against a real HTTP server on a loopback port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.docker.files import DOCKER


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, body = {
            "/livez": (200, b'{"status": "ok"}'),
            "/readyz": (503, b'{"status": "store_unavailable"}'),
        }[self.path]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), _Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def check(path: str, port: int, **environment: str) -> tuple[int, str]:
    answer = subprocess.run(
        [sys.executable, str(DOCKER / "healthcheck.py"), path],
        env={**os.environ, "PREFIXD_PORT": str(port), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert not answer.stderr, answer.stderr
    return answer.returncode, answer.stdout


def test_200_is_healthy(port: int) -> None:
    assert check("/livez", port) == (0, "GET /livez: 200\n")


def test_503_is_not_and_the_reason_is_shown(port: int) -> None:
    status, output = check("/readyz", port)
    assert status == 1
    assert "503" in output
    assert "store_unavailable" in output


def test_no_listener_is_unhealthy() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        status, output = check("/livez", taken.getsockname()[1])
    assert status == 1
    assert "refused" in output


def test_a_proxy_for_downloads_is_not_asked(port: int) -> None:
    dead = "http://127.0.0.1:9"
    assert check("/livez", port, http_proxy=dead, HTTP_PROXY=dead, no_proxy="")[0] == 0
