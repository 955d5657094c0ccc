"""The A-B-A-B runner: every round runs each case once, so that all see the same machine.

Two cases are compared by the ratio of each round, and the median of those ratios is reported with
the least and the most: a machine that slows down halfway changes both halves of a ratio.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rich.console import Console

__all__ = ["Case", "Spread", "ratio", "take_turns"]

Figures = dict[str, Any]
"""of one run: ``tokens`` and ``seconds``, and whatever else a workload measures"""


class Spread(NamedTuple):
    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass
class Case:
    name: str
    run: Callable[[], Figures]
    runs: list[Figures] = field(default_factory=list)
    """one a round"""
    failed: str = ""
    """why this case has no figures; it is reported, never left out"""

    def measure(self) -> None:
        figures = self.run()
        if "tokens" in figures:
            figures["tokens_per_s"] = figures["tokens"] / figures["seconds"]
        self.runs.append(figures)

    def values(self, figure: str) -> list[float]:
        return [run[figure] for run in self.runs]

    def spread(self, figure: str = "tokens_per_s") -> Spread:
        return Spread.of(self.values(figure))


def ratio(case: Case, other: Case, figure: str = "tokens_per_s") -> Spread | None:
    """``case`` over ``other``, paired by round; None where one of them failed."""
    if case.failed or other.failed:
        return None
    pairs = zip(case.values(figure), other.values(figure), strict=True)
    return Spread.of([mine / others for mine, others in pairs])


def take_turns(cases: Sequence[Case], rounds: int) -> None:
    """Run each case once a round. A case that fails is out, with its reason."""
    console = Console(stderr=True)
    for number in range(rounds):
        for case in cases:
            if case.failed:
                continue
            console.print(f"round {number + 1}/{rounds}: {case.name}", style="dim")
            try:
                case.measure()
            except Exception as error:
                case.failed = f"{type(error).__name__}: {error}"
                console.print(f"{case.name}: {case.failed}", style="red")
