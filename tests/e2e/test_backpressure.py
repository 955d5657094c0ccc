"""More than fits: the queue refuses, a deadline ends, a full pool preempts. Nobody gets less."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from prefixd import Client, DeadlineError, RateLimitError
from prefixd_server.config import CacheConfig, SchedulerConfig
from tests.support.server import LiveServer, wait_until

BUSY = 3000
"""tokens that keep the one place in the batch taken"""


@pytest.fixture
def small(model: Path, tmp_path: Path) -> Iterator[LiveServer]:
    """One sequence runs, two wait, the next is refused."""
    scheduler = SchedulerConfig(max_num_seqs=1, max_queue=2)
    with LiveServer(model, str(tmp_path / "store"), scheduler=scheduler) as server:
        yield server


@contextmanager
def full_queue(server: LiveServer) -> Iterator[None]:
    """Three streams that last, until the block is left: then they hang up."""
    with server.client() as client:
        streams = []
        with ThreadPoolExecutor(3) as threads:
            running = client.stream("base", "x", max_new_tokens=BUSY, ignore_eos=True)
            next(running)
            streams.append(running)
            waiting = [
                threads.submit(client.generate, "base", "x", max_new_tokens=1) for _ in range(2)
            ]
            wait_until(lambda: server.server.engine.num_waiting == 2)
            try:
                yield
            finally:
                running.close()
            for answer in waiting:
                assert answer.result().usage.completion_tokens == 1


def test_a_full_queue_refuses_and_says_when_to_come_back(small: LiveServer) -> None:
    with full_queue(small):
        url = f"{small.url}/v1/tasks/base/generate"
        answer = httpx.post(url, json={"inputs": "x", "parameters": {"max_new_tokens": 1}})
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"] == {
            "message": "2 sequences are waiting and the queue holds 2",
            "type": "overloaded_error",
            "code": "queue_full",
            "param": None,
        }
        with small.client() as client:
            assert client.ready().ok  # busy is not broken
            with pytest.raises(RateLimitError):
                next(client.stream("base", "x", max_new_tokens=1))
            with pytest.raises(RateLimitError):
                client.compile("late", "a text")


def test_n_sequences_are_refused_together(small: LiveServer) -> None:
    with small.client() as client:
        with pytest.raises(RateLimitError):
            client.generate("base", "x", max_new_tokens=1, n=3, temperature=1.0)
        answer = client.generate("base", "x", max_new_tokens=1, n=2, temperature=1.0)
        assert answer.sequences is not None
        assert len(answer.sequences) == 2


def test_the_client_comes_back(small: LiveServer) -> None:
    with small.client(max_retries=5) as client, ThreadPoolExecutor(1) as threads:
        with full_queue(small):
            refused = small.count_answers(429)
            answer = threads.submit(client.generate, "base", "x", max_new_tokens=3, ignore_eos=True)
            wait_until(lambda: small.count_answers(429) > refused)
        assert answer.result().usage.completion_tokens == 3


def test_a_deadline_ends_who_runs_and_who_waits(small: LiveServer) -> None:
    with small.client() as client, ThreadPoolExecutor(2) as threads:
        calls = [
            threads.submit(
                client.generate, "base", "x", max_new_tokens=BUSY, ignore_eos=True, timeout_s=0.2
            )
            for _ in range(2)
        ]
        for call in calls:
            with pytest.raises(DeadlineError) as late:
                call.result()
            assert (late.value.status, late.value.param) == (504, "parameters.timeout_s")
        small.check_nothing_held()
        assert client.generate("base", "x", max_new_tokens=2, ignore_eos=True).generated_text


def test_a_tiny_pool_preempts_and_every_answer_is_right(
    model: Path, prefixes: list[Path], tmp_path: Path
) -> None:
    """Room for all prefixes and about four of the 24 requests' tokens."""
    page = 2 * 3 * 2 * 8 * 4 * 16  # K and V, layers, heads, head_dim, bytes, tokens
    cache = CacheConfig(kv_cache_bytes=30 * page)
    with (
        LiveServer(model, str(tmp_path / "store"), cache=cache) as server,
        server.client() as client,
        ThreadPoolExecutor(24) as threads,
    ):
        assert server.server.allocator.num_pages == 30
        for number, prefix in enumerate(prefixes):
            client.push(f"task-{number}", prefix)
        prompts = ["one", "two three four", "five six seven eight nine ten"]
        jobs = list(itertools.product(range(len(prefixes)), prompts))
        alone = [tokens(client, *job) for job in jobs]
        before = server.server.engine.scheduler.num_preemptions
        together = [threads.submit(tokens, client, *job) for job in [*jobs, *jobs]]
        assert [answer.result() for answer in together] == alone + alone
        assert server.server.engine.scheduler.num_preemptions > before


def tokens(client: Client, task: int, prompt: str) -> list[int]:
    answer = client.generate(
        f"task-{task}", prompt, max_new_tokens=60, ignore_eos=True, details=True
    )
    assert answer.details is not None
    return [token.id for token in answer.details.tokens]
