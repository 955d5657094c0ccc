"""Ten thousand tasks, Zipf traffic and a small device cache: ``python bench/zipf.py``.

32 requests are always in flight, with answers of half to one and a half times the usual length:
of one length they would all end and begin together, and no decode would meet a prompt but where a
miss has broken the step. Three cases, over HTTP:

one task   every request names the same task
cold       tasks drawn by Zipf's law with exponent 1; a fresh server, nothing cached in host memory,
           256 prefixes on the device, the blobs dropped from the page cache: every miss reads disk
no misses  the same draws on a server that holds all of them
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import uvloop
from harness.alternate import Case, Figures, take_turns
from harness.load import Ask, closed_loop, latencies
from harness.options import Options, begin
from harness.prefixes import fill_store, task_names
from harness.processes import Served, serve
from harness.report import TOKENS_PER_S, Column, Report
from peers.common.prompts import prompts

NUM_VIRTUAL_TOKENS = 4
"""few, to keep ten thousand distinct blobs within a gigabyte of disk"""
CONCURRENCY = 32


class Size(NamedTuple):
    rounds: int
    tasks: int
    device_prefixes: int
    requests: int
    new_tokens: int


SIZES = {"smoke": Size(1, 1000, 64, 64, 8), "full": Size(3, 10_000, 256, 768, 32)}


class Bench:
    def __init__(self, options: Options, size: Size, store: Path) -> None:
        self.options, self.size, self.store = options, size, store
        self.cold_flags = (f"--max-device-prefixes={size.device_prefixes}", "--host-cache-bytes=0")
        self._rounds = {"cold": 0, "no misses": 0}

    def draw(self, case: str) -> list[Ask]:
        """The next round's requests: the same for both cases of that round."""
        self._rounds[case] += 1
        weights = 1 / np.arange(1, self.size.tasks + 1)
        random = np.random.default_rng(self._rounds[case])
        tasks = random.choice(self.size.tasks, size=self.size.requests, p=weights / weights.sum())
        return self._asks([f"task-{number}" for number in tasks])

    def one_task(self, warm: Served) -> Figures:
        with warm.turn():
            return load(warm.url, self._asks(["task-0"] * self.size.requests))

    def no_misses(self, warm: Served) -> Figures:
        work = self.draw("no misses")
        distinct = sorted({ask.task for ask in work})
        with warm.turn():
            first = [Ask(task, "Hello", 1) for task in distinct]
            uvloop.run(closed_loop(warm.url, first, CONCURRENCY))
            return load(warm.url, work)

    def cold(self) -> Figures:
        work = self.draw("cold")
        drop_from_page_cache(self.store)
        with serve(self.options.flags(self.store, *self.cold_flags)) as served:
            warm = [Ask("base", text, 4) for text in prompts(CONCURRENCY)]
            uvloop.run(closed_loop(served.url, warm, CONCURRENCY))
            figures = load(served.url, work)
            loads = httpx.get(f"{served.url}/metrics").text
        distinct = len({ask.task for ask in work})
        return figures | {"distinct": distinct, "loads": count_loads(loads)}

    def _asks(self, tasks: Sequence[str]) -> list[Ask]:
        texts, mean = prompts(len(tasks)), self.size.new_tokens
        lengths = np.random.default_rng(0).integers(mean // 2, mean + mean // 2 + 1, len(tasks))
        return [Ask(*ask) for ask in zip(tasks, texts, lengths.tolist(), strict=True)]


def load(url: str, work: Sequence[Ask]) -> Figures:
    start = time.perf_counter()
    replies = uvloop.run(closed_loop(url, work, CONCURRENCY))
    seconds = time.perf_counter() - start
    return {"tokens": sum(a.new_tokens for a in work), "seconds": seconds, **latencies(replies)}


def drop_from_page_cache(store: Path) -> None:
    for path in store.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def count_loads(metrics: str) -> float:
    """Prefixes read from the store so far."""
    series = r'^prefixd_prefix_load_seconds_count\{.*tier="store".*\} (\S+)$'
    lines = re.findall(series, metrics, re.MULTILINE)
    return sum(map(float, lines))


def main() -> None:
    options, size, machine = begin(__doc__, SIZES)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        names = task_names(size.tasks)
        fill_store(store, names, options.geometry, NUM_VIRTUAL_TOKENS, dtype=np.float16)
        os.sync()  # a dirty page cannot be dropped from the cache
        bench = Bench(options, size, store)
        with serve(options.flags(store)) as served:
            warm = Case("one task", partial(bench.one_task, served))
            uvloop.run(closed_loop(served.url, [Ask("task-0", "Hello", 2)] * 32, CONCURRENCY))
            cold = Case(f"Zipf, {size.tasks} tasks, cold", bench.cold)
            hits = Case("Zipf, no misses", partial(bench.no_misses, served))
            take_turns([warm, cold, hits], size.rounds)
    report = Report(
        "zipf",
        options.size,
        f"{size.requests} requests of {size.new_tokens // 2} to {size.new_tokens * 3 // 2} greedy "
        f"tokens, {CONCURRENCY} in flight, "
        f"{size.tasks} tasks with prefixes of {NUM_VIRTUAL_TOKENS} virtual tokens (float16, "
        f"distinct files) in a disk store, {size.rounds} rounds. "
        f"Cold: {size.device_prefixes} prefixes on the device, none in host memory, "
        "a fresh server each round.",
        machine,
        options.settings(*bench.cold_flags),
        [warm, cold, hits],
        (
            TOKENS_PER_S,
            Column("ttft_p99_s", "first token p99, ms", 1e3),
            Column("itl_p50_s", "between p50, ms", 1e3),
            Column("itl_p99_s", "between p99, ms", 1e3),
            Column("distinct", "distinct tasks"),
            Column("loads", "loads"),
        ),
    )
    report.compare("throughput: Zipf cold ÷ one task", cold, warm)
    report.compare("p99 between tokens: Zipf cold ÷ no misses", cold, hits, "itl_p99_s")
    report.publish(save=options.save)


if __name__ == "__main__":
    main()
