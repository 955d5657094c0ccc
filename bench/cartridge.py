"""Long prefixes: 32 requests over 1, 4 and 32 prefixes of 2,048 virtual tokens each (smoke: 512).

``python bench/cartridge.py``: the engine without HTTP, and over HTTP. The engine also tells the
most KV memory that a run held: one copy a prefix, however many requests use it, and the requests'
own pages. *Ungrouped* is the engine as it would be if each request read its prefix for itself.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from harness.alternate import Case, Figures, take_turns
from harness.engine_flags import UNGROUPED
from harness.load import batch
from harness.options import begin
from harness.prefixes import fill_store, task_names
from harness.processes import Peer, Served, serve
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
    "full": Size(3, 2048, 64, (1, 4, 32), 7 << 29),
}


def run(engine: Peer, new_tokens: int, prefixes: int) -> Figures:
    figures = dict(engine.run(REQUESTS, new_tokens, prefixes))
    del figures["first"]
    return figures


def over_http(served: Served, new_tokens: int, prefixes: int) -> Figures:
    with served.turn():
        return batch(served.url, REQUESTS, new_tokens, prefixes)


def cases_of(size: Size, engine: Peer, served: Served) -> dict[str, list[Case]]:
    """Of the engine and over HTTP: one case for each number of prefixes, then the base model."""
    runs = {
        "engine": partial(run, engine, size.new_tokens),
        "HTTP": partial(over_http, served, size.new_tokens),
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
        ungrouped = Peer.engine([*options.flags(store, *flags), UNGROUPED])
        try:
            for each in (engine, ungrouped):
                each.wait_until_ready()
            # From few prefixes to many: each is taken before more of them are resident.
            held = [run(engine, size.new_tokens, n) for n in size.prefixes]
            run(ungrouped, 2, 1)
            with serve(options.flags(store, *flags)) as served:
                over_http(served, 2, max(size.prefixes))
                cases = cases_of(size, engine, served)
                alone = Case(
                    "engine, 1 prefix, ungrouped", partial(run, ungrouped, size.new_tokens, 1)
                )
                listed = [*cases["engine"], alone, *cases["HTTP"]]
                take_turns(listed, size.rounds)
        finally:
            engine.close()
            ungrouped.close()
    for case, first in zip(cases["engine"], held, strict=False):
        for figures in case.runs:
            figures["kv_first_peak_bytes"] = first["kv_peak_bytes"]
            figures["kv_first_prefix_bytes"] = first["kv_prefix_bytes"]
    report = Report(
        "cartridge",
        options.size,
        f"{REQUESTS} requests at once, {size.new_tokens} greedy tokens each, over prefixes of "
        f"{size.num_virtual_tokens} virtual tokens; float32, {size.rounds} rounds. KV memory: "
        "the most held while no other prefixes were resident.",
        machine,
        options.settings(*flags) | {"engine": engine.settings},
        listed,
        (
            TOKENS_PER_S,
            Column("kv_first_peak_bytes", "KV memory, MiB", MIB),
            Column("kv_first_prefix_bytes", "of it prefixes, MiB", MIB),
        ),
    )
    report.compare("engine, 1 prefix: grouped ÷ ungrouped", cases["engine"][0], alone)
    for some in cases.values():
        for case in some[:-1]:
            report.compare(f"{case.name} ÷ base model", case, some[-1])
    report.publish(save=options.save)


if __name__ == "__main__":
    main()
