"""Charts of the newest results: ``python bench/charts.py`` writes docs/images/bench-*.svg.

Reads bench/results/*.jsonl and takes, for each benchmark, the newest run of the wanted size.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

BENCH = Path(__file__).parent
IMAGES = BENCH.parent / "docs" / "images"
WORKLOADS = ("W", "W1", "W128")
AT_HAND = ("engine", "HTTP", "transformers", "peft")
"""how the names of cases begin that run in the main environment"""
OURS, THEIRS = "#2f6db5", "#b0b7bf"

Record = dict[str, Any]


def newest(benchmark: str, size: str) -> Record | None:
    """The newest run. Of throughput, whose workloads may be run apart, the newest run of each
    workload beside peers from elsewhere, with what is said of the machine in the last of them."""
    path = BENCH / "results" / f"{benchmark}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [record for line in lines if (record := json.loads(line))["size"] == size]
    if not records or benchmark != "throughput":
        return records[-1] if records else None
    cases: dict[str, list[Any]] = {}
    for record in records:
        for workload in WORKLOADS:
            mine = [case for case in record["cases"] if f", {workload}, " in case["name"]]
            if not all(case["name"].startswith(AT_HAND) for case in mine):
                cases[workload] = mine
    return records[-1] | {"cases": [case for mine in cases.values() for case in mine]}


def medians(record: Record, figure: str) -> dict[str, float]:
    """By case; cases that failed or lack the figure are left out."""
    return {
        case["name"]: statistics.median(run[figure] for run in case["runs"])
        for case in record["cases"]
        if case["runs"] and all(figure in run for run in case["runs"])
    }


def throughput(record: Record) -> Any:
    """One row of bars a workload: prefixd's cases and the peers', with the least and the most."""
    rates = medians(record, "tokens_per_s")
    workloads = [w for w in WORKLOADS if any(f", {w}, " in name for name in rates)]
    rows = {w: [name for name in rates if f", {w}, " in name] for w in workloads}
    heights = [len(rows[w]) + 1 for w in workloads]
    figure, axes = plt.subplots(
        len(workloads),
        1,
        figsize=(8, 0.3 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
    )
    runs = {case["name"]: case["runs"] for case in record["cases"]}
    for axis, workload in zip(axes[:, 0], workloads, strict=True):
        names = rows[workload][::-1]
        values = [[run["tokens_per_s"] for run in runs[name]] for name in names]
        middle = [statistics.median(v) for v in values]
        error = [
            [m - min(v) for m, v in zip(middle, values, strict=True)],
            [max(v) - m for m, v in zip(middle, values, strict=True)],
        ]
        ours = [name.startswith(("engine", "HTTP")) for name in names]
        labels = [name.replace(f", {workload},", ",") for name in names]
        colours = [OURS if mine else THEIRS for mine in ours]
        axis.barh(labels, middle, color=colours, xerr=error, ecolor="#444444", capsize=2)
        axis.set_title(f"{workload}: output tokens/s", loc="left", fontsize=10)
        axis.tick_params(labelsize=8)
    return figure


def cartridge(record: Record) -> Any:
    rates, memory = medians(record, "tokens_per_s"), medians(record, "kv_first_peak_bytes")
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.6))
    left.barh(list(rates)[::-1], list(rates.values())[::-1], color=OURS)
    left.set_title("output tokens/s", loc="left", fontsize=10)
    right.barh(list(memory)[::-1], [v / 2**20 for v in memory.values()][::-1], color=OURS)
    right.set_title("KV memory, MiB", loc="left", fontsize=10)
    for axis in (left, right):
        axis.tick_params(labelsize=8)
    return figure


def latency(record: Record) -> Any:
    """p50 and p99 of the three latencies, a group of bars a load."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.8))
    titles = {"ttft": "first token, ms", "itl": "between tokens, ms", "e2e": "whole answer, ms"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        middle, high = (medians(record, f"{name}_p{percent}_s") for percent in (50, 99))
        places = range(len(middle))
        axis.bar([p - 0.2 for p in places], [v * 1e3 for v in middle.values()], 0.4, color=THEIRS)
        axis.bar([p + 0.2 for p in places], [v * 1e3 for v in high.values()], 0.4, color=OURS)
        axis.set_xticks(list(places), [label.replace(", ", ",\n") for label in middle])
        axis.set_title(title, loc="left", fontsize=10)
        axis.tick_params(labelsize=7)
    axes[0].legend(["p50", "p99"], fontsize=7)
    return figure


CHARTS: dict[str, Callable[[Record], Any]] = {
    "throughput": throughput,
    "cartridge": cartridge,
    "latency": latency,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("smoke", "full"), default="full")
    parser.add_argument("--out", type=Path, default=IMAGES)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    # The same results give the same bytes.
    plt.rcParams["svg.hashsalt"] = "prefixd"
    for name, draw in CHARTS.items():
        record = newest(name, arguments.size)
        if record is None:
            print(f"no results of {name}, {arguments.size}")
            continue
        figure = draw(record)
        figure.suptitle(
            f"{record['machine']['cpu']}, {record['machine']['threads']} threads, "
            f"commit {record['machine']['commit']}, {record['date']}",
            fontsize=8,
        )
        figure.tight_layout()
        path = arguments.out / f"bench-{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        print(path)


if __name__ == "__main__":
    main()
