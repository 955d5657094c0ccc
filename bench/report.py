"""What was measured, as a table on the terminal and as Markdown appended to RESULTS.md."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

__all__ = ["Case", "machine", "report"]

RESULTS = Path(__file__).with_name("RESULTS.md")


@dataclass
class Case:
    name: str
    run: Callable[[], int]
    """one run; returns the number of tokens it made"""
    rates: list[float] = field(default_factory=list)

    def measure(self) -> None:
        start = time.perf_counter()
        tokens = self.run()
        self.rates.append(tokens / (time.perf_counter() - start))

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


def machine(threads: int) -> str:
    """What the figures were taken on, and how busy it was before."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        model = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), model)
    libraries = ("prefixd", "torch", "transformers", "peft")
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    return (
        f"{model}, {os.cpu_count()} cores, {threads} threads; Python {platform.python_version()}, "
        f"{versions}; load average before: {os.getloadavg()[0]:.1f}"
    )


def rows(cases: Sequence[Case]) -> list[tuple[str, str, str, str]]:
    reference = cases[0].median
    return [
        (
            case.name,
            f"{case.median:.1f}",
            f"{min(case.rates):.1f} … {max(case.rates):.1f}",
            f"{case.median / reference:.2f}",
        )
        for case in cases
    ]


COLUMNS = ("case", "tokens/s, median", "least … most", "of the first")


def report(cases: Sequence[Case], title: str, machine: str) -> None:
    table = Table(*COLUMNS, title=title, caption=machine)
    for row in rows(cases):
        table.add_row(*row)
    Console().print(table)
    lines = [f"\n## {title}\n", f"{machine}.\n", "| " + " | ".join(COLUMNS) + " |"]
    lines += ["|---|---:|---:|---:|", *("| " + " | ".join(row) + " |" for row in rows(cases)), ""]
    if not RESULTS.exists():
        RESULTS.write_text("# Results of bench/serve.py, newest last\n")
    with RESULTS.open("a") as file:
        file.write("\n".join(lines))
