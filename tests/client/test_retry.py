from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefixd import (
    APIConnectionError,
    APITimeoutError,
    AsyncClient,
    Client,
    InvalidValueError,
    RateLimitError,
    StreamError,
    UnavailableError,
)
from prefixd._retry import Retry
from tests.client.server import TEXT, Server, error


def refused(status: int, after: str | None = None) -> RateLimitError | UnavailableError:
    kind = RateLimitError if status == 429 else UnavailableError
    return kind("no", status=status, retry_after=float(after) if after else None)


def test_backoff_doubles_with_jitter_up_to_its_cap() -> None:
    retry = Retry(max_retries=10, base_s=0.5, cap_s=8.0)
    random.seed(0)
    for attempt, full in enumerate([0.5, 1, 2, 4, 8, 8]):
        delays = [retry.delay(refused(503), attempt, "POST") for _ in range(50)]
        assert all(delay is not None and full / 2 <= delay <= full for delay in delays)
        assert len(set(delays)) > 1
    assert retry.delay(refused(503), 10, "POST") is None


def test_retry_after_is_a_least_wait_within_patience() -> None:
    retry = Retry(base_s=0.5, patience_s=60.0)
    delay = retry.delay(refused(429, "7"), 0, "POST")
    assert delay is not None
    assert 7.0 < delay <= 7.5
    assert retry.delay(refused(429, "61"), 0, "POST") is None


@pytest.mark.parametrize("status", [429, 503])
def test_refusals_are_tried_again(
    client: Client, server: Server, waits: list[float], status: int
) -> None:
    server.add_version("e2e", b"x")
    server.script += [error(status, "busy", {"retry-after": "3"}), error(status, "busy")]
    assert client.generate("e2e", "hi").generated_text == TEXT
    assert [seen.path for seen in server.seen] == ["/v1/tasks/e2e/generate"] * 3
    assert len(waits) == 2
    assert waits[0] >= 3.0
    assert 0.5 <= waits[1] <= 1.0


def test_the_last_refusal_is_raised(client: Client, server: Server, waits: list[float]) -> None:
    server.script += [error(429, f"busy {i}") for i in range(5)]
    with pytest.raises(RateLimitError, match="busy 3"):
        client.info()
    assert len(waits) == 3


def test_other_errors_are_not_tried_again(
    client: Client, server: Server, waits: list[float]
) -> None:
    server.script.append(error(422, "no"))
    with pytest.raises(InvalidValueError):
        client.info()
    assert (len(server.seen), waits) == (1, [])


def test_a_stream_is_tried_again_only_before_it_begins(
    client: Client, server: Server, waits: list[float]
) -> None:
    server.script.append(error(503, "loading"))
    with client.stream("broken", "hi") as events, pytest.raises(StreamError):
        list(events)
    assert (len(server.seen), len(waits)) == (2, 1)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "."])
def test_an_upload_is_sent_whole_at_every_attempt(
    client: Client, server: Server, waits: list[float], folder: Path, name: str
) -> None:
    server.script.append(error(503, "store away"))
    moved: list[int] = []
    client.push("e2e", folder / name, progress=lambda done, _: moved.append(done))
    first, second = server.seen
    assert (first.body, first.parts) == (second.body, second.parts)
    assert first.body or first.parts
    assert moved.count(0) == 2  # the bar starts again with the body


def test_a_server_that_is_not_up_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    late = Server()  # bound but not listening: connections are refused
    waits: list[float] = []

    def start_meanwhile(seconds: float) -> None:
        waits.append(seconds)
        late.start()

    monkeypatch.setattr("prefixd._client.sleep", start_meanwhile)
    with Client(late.url) as client:
        assert client.compile("e2e", "not a GET").version == 1  # it was never sent
    late.stop()
    assert len(waits) == 1


@contextlib.contextmanager
def listener(answers: list[bytes]) -> Iterator[tuple[str, list[bytes]]]:
    """A socket that reads a request, sends the next of ``answers`` and hangs up."""
    received: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def run() -> None:
            for answer in answers:
                connection, _ = listening.accept()
                with connection:
                    received.append(connection.recv(65536))
                    connection.sendall(answer)

        thread = threading.Thread(target=run)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", received
        thread.join(10)


def test_a_lost_answer_is_asked_again_only_by_get(waits: list[float]) -> None:
    ok = b'HTTP/1.1 200 OK\r\ncontent-length: 16\r\n\r\n{"status": "ok"}'
    with listener([b"", ok]) as (url, received), Client(url) as client:
        assert client.live().ok
    assert (len(received), len(waits)) == (2, 1)

    with listener([b""]) as (url, received), Client(url) as client:
        with pytest.raises(APIConnectionError) as caught:
            client.compile("e2e", "text")
        assert caught.value.was_sent
    assert (len(received), len(waits)) == (1, 1)


def test_the_clients_own_timeout(waits: list[float]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Client(url, timeout=0.05) as client, pytest.raises(APITimeoutError, match="timed out"):
            client.info()
    assert waits == []


async def test_async_retries_too(server: Server, waits: list[float], folder: Path) -> None:
    async with AsyncClient(server.url) as client:
        server.script += [error(429, "busy", {"retry-after": "2"}), error(503, "busy")]
        assert (await client.push("e2e", folder)).version == 1
        server.script += [error(429, "busy")] * 4
        with pytest.raises(RateLimitError):
            await client.info()
    assert len(waits) == 5
    assert waits[0] >= 2.0
    assert server.seen[0].parts == server.seen[2].parts != []
