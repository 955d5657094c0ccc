"""What a task means may change at any moment; a request keeps the version that it began with."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from prefixd import AsyncClient, Client, NotFoundError
from tests.support.models import Reference
from tests.support.redis_server import RedisServer, running_redis
from tests.support.server import LiveServer, ServerProcess, wait_until

SECONDS = 30
RATE = 50
"""activations a second that the server has to keep up with"""
NUM_CLIENTS = 16
PROMPTS = ["one two three", "a", "The quick brown fox jumps over the lazy dog.", "name: Blue Spice"]
NEW_TOKENS = 12

Answers = dict[tuple[int, str], list[int]]
"""(version, prompt) → the tokens of its greedy answer"""


def ask(client: Client, task: str, prompt: str, num_tokens: int = NEW_TOKENS) -> list[int]:
    answer = client.generate(task, prompt, max_new_tokens=num_tokens, ignore_eos=True, details=True)
    assert answer.details is not None
    return [token.id for token in answer.details.tokens]


def two_versions(client: Client, prefixes: list[Path]) -> Answers:
    """Two versions of ``e2e`` and what each has to say, told one at a time."""
    for prefix in prefixes[2:]:
        client.push("e2e", prefix)
    return {(v, p): ask(client, f"e2e@{v}", p) for v in (1, 2) for p in PROMPTS}


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Durability is tested elsewhere; without it, the rate is the server's and not the disk's."""
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def answers(client: Client, prefixes: list[Path]) -> Answers:
    return two_versions(client, prefixes)


def test_known_answers_are_pefts(answers: Answers, model: Path, prefixes: list[Path]) -> None:
    """So the answers that the tests below compare with are those of the right prefix."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    reference = Reference(model)
    for (version, prompt), tokens in answers.items():
        ids = tokenizer(prompt)["input_ids"]
        expected, _ = reference.generate(prefixes[1 + version], ids, NEW_TOKENS)
        # transformers stops at the end of sequence, these answers do not.
        assert tokens[: len(expected)] == expected
    assert all(answers[1, prompt] != answers[2, prompt] for prompt in PROMPTS)


@dataclass
class Traffic:
    """``NUM_CLIENTS`` clients on a thread of their own, half of them streaming, until stopped."""

    url: str
    task: str
    answers: Answers
    served: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    async def _run(self) -> None:
        async with AsyncClient(self.url, max_retries=0) as client:
            await asyncio.gather(*(self._ask_on(client, i) for i in range(NUM_CLIENTS)))

    async def _ask_on(self, client: AsyncClient, number: int) -> None:
        ask = self._stream if number % 2 else self._whole
        for prompt in itertools.islice(itertools.cycle(PROMPTS), number, None):
            if self._stop.is_set():
                return
            try:
                version, tokens = await ask(client, prompt)
            except Exception as error:  # any is a finding; a task that ended would hide the next
                self.wrong.append(repr(error))
                continue
            self.served[version] += 1
            if self.answers[version, prompt] != tokens:
                self.wrong.append(f"version {version} answered {prompt!r} with {tokens}")

    async def _whole(self, client: AsyncClient, prompt: str) -> tuple[int, list[int]]:
        answer = await client.generate(
            self.task, prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True, details=True
        )
        assert answer.version is not None
        assert answer.details is not None
        return answer.version, [token.id for token in answer.details.tokens]

    async def _stream(self, client: AsyncClient, prompt: str) -> tuple[int, list[int]]:
        stream = client.stream(self.task, prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True)
        events = [event async for event in stream]
        assert events[-1].version is not None
        return events[-1].version, [event.token.id for event in events]


def activate_in_turns(client: Client, first: int, seconds: float) -> list[float]:
    """Version ``first``, the other, ``first`` …, at ``RATE`` at most; how long each took."""
    latencies: list[float] = []
    began = sent = time.monotonic()
    while sent < began + seconds:
        version = first if len(latencies) % 2 == 0 else 3 - first
        assert client.activate("e2e", version).active == version
        latencies.append(time.monotonic() - sent)
        time.sleep(max(0.0, began + len(latencies) / RATE - time.monotonic()))
        sent = time.monotonic()
    return latencies


def swap_under_load(url: str, client: Client, prefixes: list[Path], seconds: float) -> list[float]:
    """Two operators activate back and forth under load; how long each activation took."""
    answers = two_versions(client, prefixes)
    with Traffic(url, "e2e", answers) as traffic, ThreadPoolExecutor(2) as operators:
        done = operators.map(lambda first: activate_in_turns(client, first, seconds), (1, 2))
        latencies = [latency for of_one in done for latency in of_one]
    p99 = sorted(latencies)[int(0.99 * len(latencies))]
    print(
        f"\n{len(latencies) / seconds:.0f} activations/s (p99 {p99 * 1e3:.0f} ms),"
        f" {traffic.served.total() / seconds:.0f} answers/s: {dict(traffic.served)}"
    )
    assert traffic.wrong == []
    assert traffic.served.total() > 2 * NUM_CLIENTS
    assert min(traffic.served[1], traffic.served[2]) > traffic.served.total() / 10
    return latencies


@pytest.mark.slow
def test_activating_back_and_forth_at_speed(
    redis: RedisServer, model: Path, prefixes: list[Path]
) -> None:
    with ServerProcess(model=model, store=redis.url) as server, server.client() as client:
        latencies = swap_under_load(server.url, client, prefixes, SECONDS)
        assert len(latencies) >= RATE * SECONDS
        client.delete("e2e")
        wait_until(lambda: all_pages_free(client), what="all pages to be free")
        server.terminate()
        assert server.wait() == 0
    assert "error" not in server.levels()


def test_activating_back_and_forth_on_disk(
    live: LiveServer, client: Client, prefixes: list[Path]
) -> None:
    """Each change waits for the device four times, so the rate is the device's."""
    swap_under_load(live.url, client, prefixes, 4)


def all_pages_free(client: Client) -> bool:
    cache = client.info().cache
    assert cache is not None
    return cache.free_pages == cache.num_pages


def test_a_split_serves_both_versions_by_weight(client: Client, answers: Answers) -> None:
    client.activate("e2e", split={1: 0.7, 2: 0.3})
    served: Counter[int] = Counter()
    for prompt in itertools.islice(itertools.cycle(PROMPTS), 120):
        answer = client.generate(
            "e2e", prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True, details=True
        )
        assert answer.version is not None
        assert answer.details is not None
        assert [token.id for token in answer.details.tokens] == answers[answer.version, prompt]
        served[answer.version] += 1
    # 36 of 120 are expected to be version 2's, with a standard deviation of 5.
    assert 8 < served[2] < 64


@dataclass
class LongStream:
    """A stream that is under way, and what it would say if nobody interfered."""

    events: Iterator[object]
    tokens: list[int]
    expected: list[int]

    def finish(self) -> tuple[list[int], int | None]:
        version = None
        for event in self.events:
            self.tokens.append(event.token.id)  # type: ignore[attr-defined]
            version = event.version  # type: ignore[attr-defined]
        return self.tokens, version


def long_stream(client: Client, task: str, num_tokens: int) -> LongStream:
    expected = ask(client, task, "a long story", num_tokens)
    events = client.stream(task, "a long story", max_new_tokens=num_tokens, ignore_eos=True)
    return LongStream(events, [next(events).token.id], expected)


def test_a_version_deleted_in_use_serves_to_the_end(
    live: LiveServer, client: Client, answers: Answers
) -> None:
    version = client.version("e2e", 1)
    stream = long_stream(client, "e2e@1", 500)
    with_both = live.prefix_pages()
    client.delete_version("e2e", 1)
    store = live.open_store()
    # Its bytes may go at once: who runs has them.
    assert store.collect_garbage(grace_seconds=0) == version.bytes
    with pytest.raises(NotFoundError):
        client.generate("e2e@1", "a")
    assert client.task("e2e").requests_running == 1, "the stream was too short for this test"
    assert live.prefix_pages() == with_both

    assert stream.finish() == (stream.expected, 1)
    live.check_nothing_held()
    assert live.prefix_pages() == with_both - live.pages_for(version.num_virtual_tokens)
    assert ask(client, "e2e", PROMPTS[0]) == answers[2, PROMPTS[0]]


def test_a_task_deleted_in_use_serves_to_the_end(
    live: LiveServer, client: Client, answers: Answers
) -> None:
    stored = sum(version.bytes for version in client.task("e2e").versions)
    stream = long_stream(client, "e2e", 500)
    client.delete("e2e")
    for reference in ("e2e", "e2e@1", "e2e@2"):
        with pytest.raises(NotFoundError):
            client.generate(reference, "a")
    assert live.open_store().collect_garbage(grace_seconds=0) == stored
    assert not live.idle, "the stream was too short for this test"

    assert stream.finish() == (stream.expected, 2)
    live.check_nothing_held()
    assert live.prefix_pages() == 0
