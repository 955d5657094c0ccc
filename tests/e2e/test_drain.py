"""``prefixd serve`` as a process: how it is configured, how it refuses to start, how it leaves."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefixd import Client, StreamError, TokenStream, UnavailableError
from tests.support.redis_server import free_port
from tests.support.server import ServerProcess, wait_until

FOREVER = 3900
"""tokens: all that the context has room for; many seconds' work"""


def begun(client: Client, num_tokens: int) -> TokenStream:
    """A stream whose first token has come."""
    events = client.stream("base", "x", max_new_tokens=num_tokens, ignore_eos=True)
    next(events)
    return events


def test_sigterm_lets_streams_finish_and_refuses_new_requests(model: Path, tmp_path: Path) -> None:
    with ServerProcess(model=model, store=tmp_path) as server, server.client() as client:
        streams = [begun(client, 1000) for _ in range(4)]
        server.terminate()
        wait_until(lambda: client.ready().status == "draining")
        assert httpx.get(f"{server.url}/readyz").status_code == 503
        assert client.live().ok
        with pytest.raises(UnavailableError) as refused:
            client.generate("base", "x")
        assert (refused.value.status, refused.value.code) == (503, "draining")
        assert refused.value.retry_after is not None
        with pytest.raises(UnavailableError):
            client.compile("late", "a text")
        for events in streams:
            *_, last = events
            assert last.details is not None
            assert last.details.generated_tokens == 1000
        assert server.wait() == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/livez")
    assert server.levels() <= {"info", "warning"}


def test_a_stream_longer_than_the_drain_is_told(model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": model, "store": tmp_path, "drain_timeout_s": 0.3}
    with ServerProcess(**options) as server, server.client() as client:
        events = begun(client, FOREVER)
        server.terminate()
        with pytest.raises(StreamError) as cut:
            list(events)
        assert (cut.value.type, cut.value.code) == ("unavailable_error", "draining")
        assert server.wait() == 0
    assert any("drain timed out" in line["event"] for line in server.log())


def test_a_second_sigterm_does_not_wait(model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": model, "store": tmp_path, "drain_timeout_s": 3600}
    with ServerProcess(**options) as server, server.client() as client:
        events = begun(client, FOREVER)
        server.terminate()
        wait_until(lambda: client.ready().status == "draining")
        server.send(signal.SIGTERM)
        with pytest.raises(StreamError):
            list(events)
        assert server.wait() == 0


def fails_to_start(**options: Any) -> tuple[int, str]:
    """The exit status and the one line that says why."""
    server = ServerProcess(**options).spawn()
    status = server.wait()
    (line,) = [line for line in server.stderr.splitlines() if not line.startswith("{")]
    return status, line


def test_a_port_that_is_taken(model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status, line = fails_to_start(model=model, store=tmp_path, port=port)
    assert (status, line) == (1, f"cannot listen on 127.0.0.1:{port}: Address already in use")


def test_a_redis_that_is_not_there(model: Path) -> None:
    url = f"redis://:secret@127.0.0.1:{free_port()}/0"
    status, line = fails_to_start(model=model, store=url)
    assert status == 1
    assert "Connection refused" in line
    assert url.rpartition("@")[2] in line
    assert "secret" not in line


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "no-such-model"
    status, line = fails_to_start(model=missing, store=tmp_path)
    assert status == 1
    assert str(missing) in line


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"page_size": 0}, "page_size"),
        ({"env": {"PREFIXD_MAX_QUEUE": "-3"}}, "max_queue"),
        ({"drain_timeout_s": "soon"}, "drain-timeout-s"),
        ({"colour": "red"}, "--colour"),
    ],
)
def test_a_bad_setting(options: dict[str, Any], named: str) -> None:
    server = ServerProcess(**options).spawn()
    assert server.wait() == 2
    assert named in server.stderr
    assert "Traceback" not in server.stderr


def test_a_bad_setting_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "prefixd.toml"
    file.write_text('max_queue = "many"\n')
    status, line = fails_to_start(config=file)
    assert status == 2
    assert "max_queue" in line
    assert "many" in line
    file.write_text("max_qeue = 3\n")
    status, line = fails_to_start(config=file)
    assert (status, line) == (2, f"{file}: unknown setting 'max_qeue'")


def test_options_win_over_the_environment_and_that_over_the_file(
    model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prefixd.toml"
    file.write_text('served_name = "of-the-file"\nmax_queue = 7\nmax_num_seqs = 7\n')
    environment = {
        "PREFIXD_CONFIG": str(file),
        "PREFIXD_MAX_QUEUE": "8",
        "PREFIXD_MAX_NUM_SEQS": "8",
    }
    options: dict[str, Any] = {"model": model, "store": tmp_path / "store", "max_num_seqs": 9}
    with ServerProcess(env=environment, **options) as server, server.client() as client:
        info = client.info()
    assert info.model.name == "of-the-file"
    assert info.limits["max_queue"] == 8
    assert info.limits["max_num_seqs"] == 9
    assert info.limits["max_virtual_tokens"] == 65536
