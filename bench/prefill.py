"""How long a long prompt holds up the others, by its pieces: ``python bench/prefill.py``.

Short requests are always in flight, and one client sends prompts of a thousand tokens one after
another, which are read in pieces of ``--max-prefill-tokens`` beside the decodes.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import uvloop
from harness.alternate import Case, Figures, take_turns
from harness.load import Ask, Reply, closed_loop, latencies
from harness.options import begin
from harness.prefixes import fill_store, task_names
from harness.processes import Served, serve
from harness.report import TOKENS_PER_S, Column, Report
from peers.common.prompts import prompts

STREAMS = 16
NUM_VIRTUAL_TOKENS = 20
LONG = "number 1 2 3 " * 145
"""about a thousand tokens (SmolLM2)"""


class Size(NamedTuple):
    rounds: int
    new_tokens: int
    requests: int
    long_prompts: int
    pieces: tuple[int, ...]


SIZES = {
    "smoke": Size(1, 16, 16, 1, (128, 512)),
    "full": Size(2, 64, 64, 4, (64, 128, 256, 512, 1024)),
}


async def both(url: str, size: Size) -> tuple[list[Reply], list[Reply]]:
    short = [
        Ask(f"task-{n % STREAMS}", text, size.new_tokens)
        for n, text in enumerate(prompts(size.requests))
    ]
    # Each begins in its own way, so that none is found in a cache.
    long = [Ask("base", f"{n} {LONG}", 1) for n in range(size.long_prompts)]
    return await asyncio.gather(closed_loop(url, short, STREAMS), closed_loop(url, long, 1))


def run(served: Served, size: Size) -> Figures:
    with served.turn():
        start = time.perf_counter()
        short, long = uvloop.run(both(served.url, size))
    seconds = max(reply.tokens_at[-1] for reply in short) - start
    figures = {"tokens": size.requests * size.new_tokens, "seconds": seconds, **latencies(short)}
    return figures | {"long_first_p50_s": statistics.median(reply.first_s for reply in long)}


def main() -> None:
    options, size, machine = begin(__doc__, SIZES)
    with ExitStack() as stack:
        store = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "store"
        fill_store(store, task_names(STREAMS), options.geometry, NUM_VIRTUAL_TOKENS)
        cases = []
        for piece in size.pieces:
            limits = (f"--max-num-batched-tokens={piece + 128}", f"--max-prefill-tokens={piece}")
            flags = options.flags(store, *limits)
            served = stack.enter_context(serve(flags))
            run(served, size._replace(new_tokens=4, requests=STREAMS, long_prompts=1))
            cases.append(Case(f"pieces of {piece}", partial(run, served, size)))
        take_turns(cases, size.rounds)
    report = Report(
        "prefill",
        options.size,
        f"{STREAMS} short requests in flight ({size.requests} of {size.new_tokens} tokens), beside "
        f"them {size.long_prompts} prompts of a thousand tokens, one at a time, "
        f"{size.rounds} rounds.",
        machine,
        options.settings(),
        cases,
        (
            TOKENS_PER_S,
            Column("itl_p50_s", "between p50, ms", 1e3),
            Column("itl_p99_s", "between p99, ms", 1e3),
            Column("long_first_p50_s", "long prompt: first token p50, ms", 1e3),
        ),
    )
    report.publish(save=options.save)


if __name__ == "__main__":
    main()
