"""A client that goes away takes its request with it, whatever it was waiting for."""

from __future__ import annotations

import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import orjson
import pytest

from prefixd import Client
from tests.support.server import LiveServer, wait_until

LONG = {"max_new_tokens": 3000, "ignore_eos": True}


ABORTED = 'vllm:request_success_total{finished_reason="abort",model_name="tiny-llama"}'
GENERATED = 'vllm:generation_tokens_total{model_name="tiny-llama"}'
RUNNING = 'vllm:num_requests_running{model_name="tiny-llama"}'


def metric(client: Client, series: str) -> int:
    """As Prometheus sees it."""
    values = [line for line in client.metrics().splitlines() if line.startswith(series)]
    return int(float(values[0].rpartition(" ")[2])) if values else 0


def send(server: LiveServer, task: str, *, stream: bool) -> socket.socket:
    """A request on a bare socket, so that it can be dropped at any moment."""
    body = orjson.dumps({"inputs": "one two three", "parameters": LONG, "stream": stream})
    url = urlsplit(server.url)
    head = (
        f"POST /v1/tasks/{task}/generate HTTP/1.1\r\nhost: {url.netloc}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    connection = socket.create_connection((url.hostname, url.port or 0), timeout=20)
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_closing_the_connection_ends_the_request(
    live: LiveServer, client: Client, prefixes: list[Path], stream: bool
) -> None:
    client.push("e2e", prefixes[2])
    client.generate("e2e", "x", max_new_tokens=1)
    of_prefix = live.used_pages()
    aborted, generated = metric(client, ABORTED), metric(client, GENERATED)
    connection = send(live, "e2e", stream=stream)
    # On a busy machine the request may end by itself before many questions are answered.
    wait_until(lambda: client.task("e2e").requests_running == 1)
    wait_until(lambda: live.used_pages() > of_prefix)
    assert metric(client, RUNNING) == 1
    if stream:
        assert b"200 OK" in connection.recv(1000)
    connection.close()
    wait_until(lambda: live.used_pages() == of_prefix)
    assert metric(client, RUNNING) == 0
    assert metric(client, ABORTED) - aborted == 1
    assert metric(client, GENERATED) - generated < LONG["max_new_tokens"]
    wait_until(lambda: client.task("e2e").requests_running == 0)


def test_a_hundred_clients_that_vanish_leave_nothing(
    live: LiveServer, client: Client, prefixes: list[Path]
) -> None:
    for number, prefix in enumerate(prefixes):
        client.push(f"task-{number}", prefix)
    moments = random.Random(0)
    plan = [(moments.randrange(len(prefixes)), moments.random()) for _ in range(100)]
    gone = threading.Event()

    def come_and_go(step: tuple[int, float]) -> None:
        task, moment = step
        connection = send(live, f"task-{task}", stream=moment < 0.5)
        gone.wait(moment / 2)
        connection.close()

    with ThreadPoolExecutor(20) as threads:
        list(threads.map(come_and_go, plan))
    wait_until(lambda: live.idle)
    assert metric(client, RUNNING) == 0
    live.check_nothing_held()
    assert client.generate("task-0", "still serving", max_new_tokens=4).version == 1
