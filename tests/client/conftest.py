from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from prefixd import Client
from prefixd.cli import main
from tests.client.server import Server


@pytest.fixture(scope="session")
def running() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    """A server with no tasks."""
    running.reset()
    return running


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url, timeout=10) as client:
        yield client


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, recorded and not waited for: the one thing that is not real."""
    recorded: list[float] = []

    async def sleep(seconds: float) -> None:
        recorded.append(seconds)

    monkeypatch.setattr("prefixd._client.sleep", recorded.append)
    monkeypatch.setattr("prefixd._async_client.sleep", sleep)
    return recorded


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What PEFT leaves after training: two files that matter, among others that do not."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(b'{"peft_type": "PREFIX_TUNING"}')
    (folder / "adapter_model.safetensors").write_bytes(b"\x00weights" * 50_000)
    (folder / "README.md").write_text("a model card")
    (folder / "optimizer.pt").write_bytes(b"moments")
    (folder / "training_args.bin").write_bytes(b"pickle")
    return folder


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Ran]


@pytest.fixture
def cli(server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run a command line in this process, against ``server``."""
    monkeypatch.setenv("PREFIXD_URL", server.url)
    monkeypatch.setenv("COLUMNS", "80")  # what rich takes a pipe for

    def run(*args: str) -> Ran:
        capsys.readouterr()
        try:
            code = main(args)
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return run


def on_a_terminal(server: Server, *args: str) -> list[str]:
    """The lines that a terminal of 80 columns gets."""
    terminal, its_end = pty.openpty()
    termios.tcsetwinsize(its_end, (24, 80))
    environment = {name: v for name, v in os.environ.items() if name not in ("COLUMNS", "LINES")}
    running = subprocess.Popen(
        [sys.executable, "-m", "prefixd", *args, "--url", server.url],
        stdin=its_end,
        stdout=its_end,
        stderr=its_end,
        env=environment | {"TERM": "xterm", "NO_COLOR": "1"},
    )
    os.close(its_end)
    written = b""
    with contextlib.suppress(OSError):  # Linux's word for the end of a terminal
        while part := os.read(terminal, 65_536):
            written += part
    os.close(terminal)
    assert running.wait(60) == 0, written
    return written.decode().replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()
