"""What was measured: a table on the terminal, Markdown in RESULTS.md and a JSON line in results/.

The JSON line holds every run of every case, so that charts and later questions need no new run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from harness.alternate import Case, Spread, ratio
from harness.machine import headline

__all__ = ["TOKENS_PER_S", "Column", "Report"]

BENCH = Path(__file__).parents[1]
RESULTS = BENCH / "RESULTS.md"
RAW = BENCH / "results"


class Column(NamedTuple):
    figure: str
    title: str
    scale: float = 1.0
    spread: bool = False
    """show the least and the most beside the median"""

    def cell(self, case: Case) -> str:
        if not all(self.figure in run for run in case.runs):
            return ""
        values = case.spread(self.figure)
        shown = [_digits(value * self.scale) for value in values]
        return f"{shown[0]} ({shown[1]} … {shown[2]})" if self.spread else shown[0]


TOKENS_PER_S = Column("tokens_per_s", "tokens/s (least … most)", spread=True)


@dataclass
class Report:
    benchmark: str
    size: str
    what: str
    """the workload, in a sentence"""
    machine: dict[str, Any]
    settings: dict[str, Any]
    cases: Sequence[Case]
    columns: Sequence[Column] = (TOKENS_PER_S,)
    ratios: dict[str, Spread | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))

    def compare(
        self, name: str, case: Case | None, other: Case | None, figure: str = "tokens_per_s"
    ) -> None:
        """Add the ratio of two cases, paired by round; None: a case that was not asked for."""
        if case is not None and other is not None:
            self.ratios[name] = ratio(case, other, figure)

    def publish(self, *, save: bool) -> None:
        """Print and, with ``save``, append to both files."""
        self._print()
        if not save:
            return
        RAW.mkdir(exist_ok=True)
        with (RAW / f"{self.benchmark}.jsonl").open("a") as file:
            file.write(json.dumps(self._record(), ensure_ascii=False) + "\n")
        with RESULTS.open("a") as file:
            file.write(self._markdown())

    def _rows(self) -> list[list[str]]:
        rows = []
        for case in self.cases:
            if case.failed:
                rows.append([case.name, f"failed: {case.failed}", *[""] * (len(self.columns) - 1)])
            else:
                rows.append([case.name, *(column.cell(case) for column in self.columns)])
        return rows

    def _ratio_rows(self) -> list[list[str]]:
        return [
            [name, f"{r.median:.2f}", f"{r.least:.2f} … {r.most:.2f}"] if r else [name, "–", "–"]
            for name, r in self.ratios.items()
        ]

    def _print(self) -> None:
        console = Console()
        table = Table(
            "case",
            *(column.title for column in self.columns),
            title=f"{self.benchmark}: {self.what}",
        )
        for row in self._rows():
            table.add_row(*row)
        console.print(table)
        if self.ratios:
            ratios = Table("ratio, round by round", "median", "least … most")
            for row in self._ratio_rows():
                ratios.add_row(*row)
            console.print(ratios)
        for note in self.notes:
            console.print(note)

    def _markdown(self) -> str:
        lines = [f"\n## {self.date}, {self.benchmark}, {self.size}\n", f"{self.what}\n"]
        lines += [headline(self.machine), f"{_settings(self.settings)}\n"]
        lines += _table(["case", *(column.title for column in self.columns)], self._rows())
        if self.ratios:
            header = ["ratio, round by round", "median", "least … most"]
            lines += ["", *_table(header, self._ratio_rows())]
        lines += [f"\n{note}" for note in self.notes]
        return "\n".join([*lines, ""])

    def _record(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "size": self.size,
            "date": self.date,
            "what": self.what,
            "machine": self.machine,
            "settings": self.settings,
            "cases": [
                {"name": case.name, "failed": case.failed, "runs": case.runs} for case in self.cases
            ],
            "ratios": {name: r._asdict() if r else None for name, r in self.ratios.items()},
            "notes": self.notes,
        }


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _settings(settings: dict[str, Any]) -> str:
    """``flags …; engine: prefixd 0.1.0, torch 2.13.0; …``."""
    parts = []
    for key, value in settings.items():
        if isinstance(value, dict):
            parts.append(f"{key}: " + ", ".join(f"{name} {item}" for name, item in value.items()))
        else:
            parts.append(f"{key} {value}")
    return f"Settings: {'; '.join(parts)}."


def _digits(value: float) -> str:
    """Three significant digits, whole numbers from a hundred on."""
    if not value or math.isnan(value):
        return f"{value:g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
