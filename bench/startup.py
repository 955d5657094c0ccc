"""Start to first token, and memory: ``python bench/startup.py``.

Each round starts a server on the converted demo model, asks for one token, then runs 32 requests of
32 tasks and reads the process's resident memory. Size full begins with a start that is not counted,
so that the model's files are in the page cache.
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import uvloop
from harness.alternate import Case, Figures, take_turns
from harness.load import Ask, closed_loop
from harness.options import Options, begin
from harness.prefixes import fill_store, task_names
from harness.processes import serve
from harness.report import Column, Report
from peers.common.prompts import prompts

from prefixd import Client

TASKS = 32
NUM_VIRTUAL_TOKENS = 20
MIB = 1 / 2**20


class Size(NamedTuple):
    rounds: int
    new_tokens: int


SIZES = {"smoke": Size(1, 16), "full": Size(5, 64)}


def run(options: Options, store: Path, new_tokens: int) -> Figures:
    start = time.perf_counter()
    with serve(options.flags(store)) as served:
        (reply,) = uvloop.run(closed_loop(served.url, [Ask("task-0", "Hello", 1)], 1))
        first_token = reply.tokens_at[0] - start
        idle = served.rss_bytes
        asks = [Ask(f"task-{n}", text, new_tokens) for n, text in enumerate(prompts(TASKS))]
        uvloop.run(closed_loop(served.url, asks, TASKS))
        with Client(served.url) as client:
            cache = client.info().cache
            assert cache is not None
        return {
            "ready_s": served.ready_s,
            "first_token_s": first_token,
            "rss_first_bytes": idle,
            "rss_bytes": served.rss_bytes,
            "weights_bytes": sum(f.stat().st_size for f in options.model.glob("*.safetensors")),
            "kv_pool_bytes": cache.num_pages * cache.page_size * kv_bytes_per_token(options),
        }


def kv_bytes_per_token(options: Options) -> int:
    site = options.geometry.decoder
    return 2 * site.num_layers * site.num_kv_heads * site.head_dim * 4


def main() -> None:
    options, size, machine = begin(__doc__, SIZES)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        fill_store(store, task_names(TASKS), options.geometry, NUM_VIRTUAL_TOKENS)
        if options.size == "full":
            run(options, store, 2)
        case = Case("demo model, warm", partial(run, options, store, size.new_tokens))
        take_turns([case], size.rounds)
    if not case.failed:
        for figures in case.runs:
            expected = figures["weights_bytes"] + figures["kv_pool_bytes"]
            figures["rss_over_expected"] = figures["rss_bytes"] / expected
    report = Report(
        "startup",
        options.size,
        f"From the start of the process to the first token of one request, "
        f"{size.rounds} rounds; then resident memory after {TASKS} requests of {TASKS} tasks, "
        f"{size.new_tokens} tokens each.",
        machine,
        options.settings(),
        [case],
        (
            Column("ready_s", "ready, s", spread=True),
            Column("first_token_s", "first token, s", spread=True),
            Column("rss_first_bytes", "RSS then, MiB", MIB),
            Column("rss_bytes", "RSS after, MiB", MIB),
            Column("weights_bytes", "weights, MiB", MIB),
            Column("kv_pool_bytes", "KV pool, MiB", MIB),
            Column("rss_over_expected", "RSS ÷ (weights + pool)"),
        ),
    )
    report.publish(save=options.save)


if __name__ == "__main__":
    main()
