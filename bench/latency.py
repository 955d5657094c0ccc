"""Latency under open-loop load, and under activations: ``python bench/latency.py``.

Requests arrive as a Poisson process at 50, 80 and 95% of the capacity that is measured first, each
for one of 32 tasks. Every latency counts from the scheduled arrival, so none is hidden by a client
that waits. At 50 and 80% there is a second case with 20 activations a second (each moves one task
to its other version).
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import uvloop
from harness.alternate import Case, Figures, take_turns
from harness.load import Ask, Connection, Reply, closed_loop, latencies, open_loop
from harness.options import begin
from harness.prefixes import fill_store, task_names
from harness.processes import serve
from harness.report import Column, Report
from peers.common.prompts import prompts

TASKS = 32
NUM_VIRTUAL_TOKENS = 20
LOADS = (0.5, 0.8, 0.95)
SWAPPED_LOADS = (0.5, 0.8)
SWAPS_PER_S = 20


class Size(NamedTuple):
    rounds: int
    new_tokens: int
    seconds: float
    capacity_requests: int


SIZES = {"smoke": Size(1, 16, 4, 64), "full": Size(3, 64, 30, 96)}
MS = 1e3
COLUMNS = (
    Column("tokens_per_s", "tokens/s"),
    *(
        Column(f"{figure}_p{percent}_s", f"{title} p{percent}, ms", MS)
        for figure, title in (("ttft", "first token"), ("itl", "between"), ("e2e", "whole"))
        for percent in (50, 99)
    ),
    Column("activate_p99_s", "activate p99, ms", MS),
)


def asks(number: int, new_tokens: int) -> list[Ask]:
    return [Ask(f"task-{n % TASKS}", text, new_tokens) for n, text in enumerate(prompts(number))]


def measure_capacity(url: str, size: Size) -> float:
    """Requests a second with always 32 in flight; the median of as many runs as rounds."""
    rates = []
    for _ in range(size.rounds):
        start = time.perf_counter()
        uvloop.run(closed_loop(url, asks(size.capacity_requests, size.new_tokens), 32))
        rates.append(size.capacity_requests / (time.perf_counter() - start))
    return statistics.median(rates)


def run(url: str, size: Size, rate: float, swaps_per_s: int) -> Figures:
    work = asks(max(8, round(rate * size.seconds)), size.new_tokens)
    start = time.perf_counter()
    if swaps_per_s:
        replies, swaps = uvloop.run(_with_swaps(url, work, rate, swaps_per_s))
        more = {"activate_p99_s": float(np.percentile(swaps, 99)), "activations": len(swaps)}
    else:
        replies, more = uvloop.run(open_loop(url, work, rate, seed=1)), {}
    seconds = time.perf_counter() - start
    tokens = len(work) * size.new_tokens
    return {"tokens": tokens, "seconds": seconds, **latencies(replies), **more}


async def _with_swaps(
    url: str, work: Sequence[Ask], rate: float, swaps_per_s: int
) -> tuple[list[Reply], list[float]]:
    stop = threading.Event()
    swapping = asyncio.create_task(asyncio.to_thread(_swap, url, swaps_per_s, stop))
    replies = await open_loop(url, work, rate, seed=1)
    stop.set()
    return replies, await swapping


def _swap(url: str, per_second: int, stop: threading.Event) -> list[float]:
    """Activate until told to stop; the seconds that each took, from the moment when it was due."""
    took: list[float] = []
    connection = Connection(url)
    start = time.perf_counter()
    due = start
    while not stop.wait(max(0.0, due - time.perf_counter())):
        number = len(took)
        body = {"version": 2 - (number // TASKS) % 2}
        connection.post(f"/v1/tasks/task-{number % TASKS}/activate", body)
        took.append(time.perf_counter() - due)
        due = start + len(took) / per_second
    connection.close()
    return took


def main() -> None:
    options, size, machine = begin(__doc__, SIZES)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        fill_store(store, task_names(TASKS), options.geometry, NUM_VIRTUAL_TOKENS, versions=2)
        with serve(options.flags(store)) as served:
            uvloop.run(closed_loop(served.url, asks(64, 4), 32))
            capacity = measure_capacity(served.url, size)

            def case(name: str, load: float, swaps_per_s: int) -> Case:
                return Case(name, partial(run, served.url, size, load * capacity, swaps_per_s))

            plain = {load: case(f"{load:.0%}", load, 0) for load in LOADS}
            swapped = {
                load: case(f"{load:.0%}, {SWAPS_PER_S} activations/s", load, SWAPS_PER_S)
                for load in SWAPPED_LOADS
            }
            # A pair at one load runs side by side.
            cases = [c for load in LOADS for c in (plain[load], swapped.get(load)) if c]
            take_turns(cases, size.rounds)
    report = Report(
        "latency",
        options.size,
        f"Poisson arrivals at shares of the capacity, {capacity:.2f} requests/s (32 in flight), "
        f"{size.new_tokens} greedy tokens each, 32 tasks with prefixes of {NUM_VIRTUAL_TOKENS}, "
        f"{size.seconds:.0f} s each, {size.rounds} rounds. "
        "Latencies count from the scheduled arrival.",
        machine,
        options.settings(),
        cases,
        COLUMNS,
    )
    for load, with_swaps in swapped.items():
        for figure, title in (("itl_p99_s", "between tokens"), ("ttft_p99_s", "first token")):
            name = f"p99 {title}: {load:.0%} with ÷ without swaps"
            report.compare(name, with_swaps, plain[load], figure)
    report.publish(save=options.save)


if __name__ == "__main__":
    main()
