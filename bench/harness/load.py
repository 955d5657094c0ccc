"""HTTP load from a client that costs little, as it shares the cores with the server.

A request is one connection. Times are seconds of ``time.perf_counter``; latencies count from the
moment at which a request was *due*, so a server that falls behind cannot hide it by being asked
less often.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import uvloop
from peers.common.prompts import prompts

__all__ = ["Ask", "Connection", "Reply", "batch", "closed_loop", "latencies", "open_loop"]


class Ask(NamedTuple):
    task: str
    prompt: str
    new_tokens: int
    stream: bool = True
    """the answer token by token, else whole"""


@dataclass(slots=True)
class Reply:
    due: float
    tokens_at: list[float]
    """when each token arrived: of a whole answer, all at its end"""

    @property
    def first_s(self) -> float:
        return self.tokens_at[0] - self.due

    @property
    def total_s(self) -> float:
        return self.tokens_at[-1] - self.due

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.tokens_at, self.tokens_at[1:], strict=False)]


def batch(
    url: str, requests: int, new_tokens: int, tasks: int, *, stream: bool = True
) -> dict[str, Any]:
    """``requests`` at once over ``task-0``, ``task-1`` … (0 tasks: the base model); the figures."""
    asks = [
        Ask(f"task-{number % tasks}" if tasks else "base", prompt, new_tokens, stream)
        for number, prompt in enumerate(prompts(requests))
    ]
    start = time.perf_counter()
    replies = uvloop.run(closed_loop(url, asks, requests))
    seconds = time.perf_counter() - start
    figures = {"tokens": requests * new_tokens, "seconds": seconds}
    return figures | latencies(replies) if stream else figures


async def closed_loop(url: str, asks: Sequence[Ask], concurrency: int) -> list[Reply]:
    """Always ``concurrency`` requests in flight, until all are answered."""
    waiting = iter(asks)

    async def worker() -> list[Reply]:
        return [await _ask(url, ask, time.perf_counter()) for ask in waiting]

    replies = await asyncio.gather(*(worker() for _ in range(min(concurrency, len(asks)))))
    return [reply for some in replies for reply in some]


async def open_loop(url: str, asks: Sequence[Ask], rate: float, seed: int) -> list[Reply]:
    """Poisson arrivals at ``rate`` requests a second, whether or not the server keeps up."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, size=len(asks))
    start = time.perf_counter() + 0.05
    due = start + np.cumsum(gaps)
    return await asyncio.gather(
        *(_ask_at(url, ask, float(when)) for ask, when in zip(asks, due, strict=True))
    )


async def _ask_at(url: str, ask: Ask, due: float) -> Reply:
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    return await _ask(url, ask, due)


async def _ask(url: str, ask: Ask, due: float) -> Reply:
    """One request. Raises RuntimeError unless every token came."""
    address = urlsplit(url)
    body = json.dumps(
        {
            "inputs": ask.prompt,
            "parameters": {"max_new_tokens": ask.new_tokens, "ignore_eos": True},
            "stream": ask.stream,
        }
    ).encode()
    head = (
        f"POST /v1/tasks/{ask.task}/generate HTTP/1.1\r\nHost: {address.netloc}\r\n"
        "Content-Type: application/json\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    transport, answer = await loop.create_connection(_Answer, address.hostname, address.port)
    try:
        transport.write(head.encode() + body)
        await answer.ended
    finally:
        transport.close()
    status = answer.status.decode().strip()
    if " 200 " not in status:
        raise RuntimeError(f"{ask.task}: {status}, {answer.rest.decode()}")
    tokens_at = answer.tokens_at
    if not ask.stream:
        tokens_at = [time.perf_counter()] * json.loads(answer.rest)["usage"]["completion_tokens"]
    if len(tokens_at) != ask.new_tokens:
        raise RuntimeError(f"{ask.task}: {len(tokens_at)} tokens, not {ask.new_tokens}")
    return Reply(due, tokens_at)


class Connection:
    """Posts JSON over one connection, one request after another, and blocks: what of an event loop
    a request would use costs the client as much as the request costs the server's."""

    def __init__(self, url: str) -> None:
        self._address = urlsplit(url)
        assert self._address.hostname is not None
        assert self._address.port is not None
        self._socket = socket.create_connection((self._address.hostname, self._address.port))

    def post(self, path: str, body: dict[str, Any]) -> None:
        """Raises RuntimeError unless the answer is 200."""
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {self._address.netloc}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        self._socket.sendall(head.encode() + data)
        answer, text = b"", b""
        while not text:
            answer = self._more(answer)
            fields, _, text = answer.partition(b"\r\n\r\n")
        length = int(fields.lower().partition(b"content-length: ")[2].split(b"\r\n", 1)[0])
        while len(text) < length:
            text = self._more(text)
        if b" 200 " not in fields.split(b"\r\n", 1)[0]:
            raise RuntimeError(f"{path}: {text.decode()}")

    def _more(self, data: bytes) -> bytes:
        piece = self._socket.recv(1 << 16)
        if not piece:
            raise RuntimeError("the server closed the connection")
        return data + piece

    def close(self) -> None:
        self._socket.close()


class _Answer(asyncio.Protocol):
    """Counts the events of an answer as they arrive, and parses nothing else of it.

    ``rest`` is what follows the last line: a whole answer's JSON.
    """

    def __init__(self) -> None:
        self.status = b""
        self.tokens_at: list[float] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.rest = b""

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        *lines, self.rest = (self.rest + data).split(b"\n")
        if lines and not self.status:
            self.status = lines[0]
        self.tokens_at += [now for line in lines if line.startswith(b'data: {"index"')]

    def connection_lost(self, error: Exception | None) -> None:
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)


def latencies(replies: Iterable[Reply]) -> dict[str, Any]:
    """p50 and p99 of time to first token, between tokens and to the end; in seconds."""
    replies = list(replies)
    samples = {
        "ttft": [reply.first_s for reply in replies],
        "itl": [gap for reply in replies for gap in reply.gaps_s],
        "e2e": [reply.total_s for reply in replies],
    }
    return {
        f"{name}_p{percent}_s": float(np.percentile(values, percent))
        for name, values in samples.items()
        for percent in (50, 99)
    }
