"""Long prefixes: 32 requests over 1, 4 and 32 prefixes of 2,048 virtual tokens each.

``python bench/cartridge.py``. The engine without HTTP, which also tells the most KV memory that a
run held: one copy a prefix, however many requests use it, and each request's own pages.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from harness.alternate import Case, Figures, take_turns
from harness.machine import describe
from harness.options import Options, parser
from harness.prefixes import fill_store, task_names
from harness.processes import Peer
from harness.report import TOKENS_PER_S, Column, Report

REQUESTS = 32
NUM_VIRTUAL_TOKENS = 2048
MIB = 1 / 2**20


class Size(NamedTuple):
    rounds: int
    new_tokens: int
    prefixes: tuple[int, ...]
    kv_cache_bytes: int


SIZES = {
    "smoke": Size(1, 8, (1, 4), 1 << 30),
    "full": Size(3, 32, (1, 4, 32), 7 << 29),
}


def run(engine: Peer, new_tokens: int, prefixes: int) -> Figures:
    figures = dict(engine.run(REQUESTS, new_tokens, prefixes))
    del figures["first"]
    page_bytes = figures["kv_peak_bytes"] - figures["kv_prefix_bytes"]
    return figures | {"kv_requests_bytes": page_bytes}


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--rounds", type=int)
    arguments = options_parser.parse_args()
    options, size = Options.of(arguments), SIZES[arguments.size]
    rounds = arguments.rounds or size.rounds
    machine = describe(options.threads)
    flags = (f"--kv-cache-bytes={size.kv_cache_bytes}",)
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        names = task_names(max(size.prefixes))
        fill_store(store, names, options.geometry, NUM_VIRTUAL_TOKENS, dtype=np.float16)
        engine = Peer.engine(options.flags(store, *flags))
        try:
            engine.wait_until_ready()
            # From few prefixes to many, once: from here on all of them are resident.
            alone = [Case(f"{n} prefixes", partial(run, engine, 2, n)) for n in size.prefixes]
            take_turns(alone, 1)
            cases = [
                Case(f"{n} prefixes", partial(run, engine, size.new_tokens, n))
                for n in size.prefixes
            ]
            base = Case("base model", partial(run, engine, size.new_tokens, 0))
            take_turns([*cases, base], rounds)
        finally:
            engine.close()
    for case, first in zip(cases, alone, strict=True):
        for figures in case.runs:
            figures["kv_first_peak_bytes"] = first.runs[0]["kv_peak_bytes"]
    report = Report(
        "cartridge",
        arguments.size,
        f"{REQUESTS} requests at once, {size.new_tokens} greedy tokens each, over prefixes of "
        f"{NUM_VIRTUAL_TOKENS} virtual tokens; float32, {rounds} rounds. KV memory: the most held "
        "while only these prefixes were resident.",
        machine,
        options.settings(*flags) | {"engine": engine.settings},
        [*cases, base],
        (TOKENS_PER_S, Column("kv_first_peak_bytes", "KV memory, MiB", MIB)),
    )
    for case in cases:
        report.compare(f"{case.name} ÷ base model", case, base)
    report.publish(save=not arguments.no_save)


if __name__ == "__main__":
    main()
