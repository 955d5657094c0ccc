"""Long prefixes: 32 requests over 1, 4 and 32 prefixes of 2,048 virtual tokens each (smoke: 512).

``python bench/cartridge.py``: the engine without HTTP, and over HTTP. The engine also tells the
most KV memory that a run held: one copy a prefix, however many requests use it, and the requests'
own pages.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from harness.alternate import Case, Figures, take_turns
from harness.load import batch
from harness.options import begin
from harness.prefixes import fill_store, task_names
from harness.processes import Peer, serve
from harness.report import TOKENS_PER_S, Column, Report

REQUESTS = 32
MIB = 1 / 2**20


class Size(NamedTuple):
    rounds: int
    num_virtual_tokens: int
    new_tokens: int
    prefixes: tuple[int, ...]
    kv_cache_bytes: int


SIZES = {
    "smoke": Size(1, 512, 8, (1, 4), 1 << 30),
    "full": Size(3, 2048, 32, (1, 4, 32), 7 << 29),
}


def run(engine: Peer, new_tokens: int, prefixes: int) -> Figures:
    figures = dict(engine.run(REQUESTS, new_tokens, prefixes))
    del figures["first"]
    return figures


def cases_of(size: Size, engine: Peer, url: str) -> dict[str, list[Case]]:
    """Of the engine and over HTTP: one case for each number of prefixes, then the base model."""
    runs = {
        "engine": partial(run, engine, size.new_tokens),
        "HTTP": partial(batch, url, REQUESTS, size.new_tokens),
    }
    return {
        kind: [
            *(Case(f"{kind}, {_count(n)}", partial(one, n)) for n in size.prefixes),
            Case(f"{kind}, base model", partial(one, 0)),
        ]
        for kind, one in runs.items()
    }


def _count(prefixes: int) -> str:
    return f"{prefixes} prefix" if prefixes == 1 else f"{prefixes} prefixes"


def main() -> None:
    options, size, machine = begin(__doc__, SIZES)
    flags = (f"--kv-cache-bytes={size.kv_cache_bytes}",)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        names = task_names(max(size.prefixes))
        fill_store(store, names, options.geometry, size.num_virtual_tokens, dtype=np.float16)
        engine = Peer.engine(options.flags(store, *flags))
        try:
            engine.wait_until_ready()
            # From few prefixes to many: each peak is taken before more of them are resident.
            peaks = [run(engine, 2, n)["kv_peak_bytes"] for n in size.prefixes]
            with serve(options.flags(store, *flags)) as served:
                batch(served.url, REQUESTS, 2, max(size.prefixes))
                cases = cases_of(size, engine, served.url)
                take_turns([case for some in cases.values() for case in some], size.rounds)
        finally:
            engine.close()
    for case, peak in zip(cases["engine"], peaks, strict=False):
        for figures in case.runs:
            figures["kv_first_peak_bytes"] = peak
    report = Report(
        "cartridge",
        options.size,
        f"{REQUESTS} requests at once, {size.new_tokens} greedy tokens each, over prefixes of "
        f"{size.num_virtual_tokens} virtual tokens; float32, {size.rounds} rounds. KV memory: "
        "the most held while no other prefixes were resident.",
        machine,
        options.settings(*flags) | {"engine": engine.settings},
        [case for some in cases.values() for case in some],
        (TOKENS_PER_S, Column("kv_first_peak_bytes", "KV memory, MiB", MIB)),
    )
    for some in cases.values():
        for case in some[:-1]:
            report.compare(f"{case.name} ÷ base model", case, some[-1])
    report.publish(save=options.save)


if __name__ == "__main__":
    main()
