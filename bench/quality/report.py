"""The tables and the curves of what run.py found.

    python bench/quality/report.py --out results

Writes report.md and curves as SVG beside results.jsonl, or the curves to --images.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bleu import difference
from curves import draw_curves
from jobs import METHODS, Job

Result = dict[str, Any]
METRICS = ("BLEU", "ROUGE-L")
Rows = dict[str, list[Result]]
"""label → results of its seeds"""


class Setting(NamedTuple):
    """What the rows of one table have in common."""

    model: str
    dataset: str
    n: int | None
    steps: int
    batch_size: int
    num_test: int | None

    @property
    def title(self) -> str:
        shown = "all examples" if self.n is None else f"{self.n} examples"
        tested = "all" if self.num_test is None else self.num_test
        return (
            f"{self.dataset}, {shown}: {self.steps} steps of {self.batch_size},"
            f" {tested} test inputs, {self.model}"
        )


def setting(result: Result) -> Setting:
    return Setting(result["model"], *(result["job"][name] for name in Setting._fields[1:]))


def label(result: Result) -> str:
    """The method, with what its job says beside the setting."""
    job = result["job"]
    parts = [job["method"]]
    parts += [] if job["lr"] is None else [f"lr {job['lr']:g}"]
    parts += [] if job["length"] == Job.length else [f"{job['length']} virtual tokens"]
    return ", ".join(parts)


def by_setting(results: Iterable[Result]) -> dict[Setting, Rows]:
    """The untrained methods stand in every setting of their data set and test inputs, for how much
    the others are trained is nothing to them."""
    scored = sorted((r for r in results if "scores" in r), key=order)
    found: dict[Setting, Rows] = defaultdict(lambda: defaultdict(list))
    for result in scored:
        if "lr" in result:
            found[setting(result)][label(result)].append(result)
    for result in scored:
        if "lr" not in result:
            mine = setting(result)
            for other, rows in found.items():
                if (other.model, other.dataset, other.num_test) == (
                    mine.model,
                    mine.dataset,
                    mine.num_test,
                ):
                    rows[label(result)].append(result)
    return found


def order(result: Result) -> tuple[int, int, float, int]:
    job = result["job"]
    return METHODS.index(job["method"]), job["length"], job["lr"] or 0.0, job["seed"]


def mean(results: Sequence[Result], of: Callable[[Result], float]) -> float:
    return statistics.mean(of(result) for result in results)


def spread(results: Sequence[Result], of: Callable[[Result], float], digits: int) -> str:
    """The standard deviation over seeds, where there are several."""
    if len(results) == 1:
        return ""
    return f" ± {statistics.stdev(of(result) for result in results):.{digits}f}"


def score_cell(results: Sequence[Result], metric: str, group: str) -> str:
    def value(key: str) -> float:
        return mean(results, lambda result: result["scores"][group][metric][key])

    cell = f"{value('value'):.1f} ({value('low'):.1f} … {value('high'):.1f})"
    return cell + spread(results, lambda r: r["scores"][group][metric]["value"], 1)


def dev_cell(results: Sequence[Result]) -> str:
    return f"{mean(results, dev_loss):.3f}" + spread(results, dev_loss, 3)


def dev_loss(result: Result) -> float:
    return float(result["dev_loss"])


def row(name: str, results: Sequence[Result], groups: Sequence[str]) -> list[str]:
    first = results[0]
    cells = [name, str(len(results)), f"{first['trained_parameters']:,}"]
    cells.append(f"{first['bytes_per_task'] / 1024:,.0f}")
    if "lr" in first:
        cells.append(f"{first['lr']:g}")
        cells.append(f"{mean(results, lambda result: result['train_cpu_seconds']):.0f}")
        cells.append(dev_cell(results))
    else:
        cells += ["", "", ""]
    return cells + [score_cell(results, metric, group) for metric in METRICS for group in groups]


def table(rows: Rows) -> list[str]:
    groups = list(next(iter(rows.values()))[0]["scores"])
    columns = ["method", "seeds", "trained parameters", "KiB a task", "lr", "train CPU s"]
    columns += ["dev loss"]
    columns += [f"{m} {g}" if len(groups) > 1 else m for m in METRICS for g in groups]
    names = sorted(rows, key=lambda name: order(rows[name][0]))
    return lines_of(columns, [row(name, rows[name], groups) for name in names])


def lines_of(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    head = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return head + ["| " + " | ".join(cells) + " |" for cells in rows]


def best_prefix(rows: Rows) -> str | None:
    """Ours with the least loss on dev, of those with the most seeds: chosen without the test."""
    ours = [name for name in rows if name.startswith("prefix-")]
    most = max((len(rows[name]) for name in ours), default=0)
    of_most = [name for name in ours if len(rows[name]) == most]
    return min(of_most, key=lambda name: mean(rows[name], dev_loss), default=None)


def differences(rows: Rows) -> list[str]:
    """The best prefix against all others."""
    best = best_prefix(rows)
    if best is None:
        return []
    cells = []
    for name in sorted(rows, key=lambda name: order(rows[name][0])):
        if name != best:
            cells.append([name, *difference_cells(rows[best], rows[name])])
    columns = [f"BLEU of {best} less that of", "difference", "95 %, paired", "by seed"]
    return ["", *lines_of(columns, cells)] if cells else []


def difference_cells(mine: Sequence[Result], other: Sequence[Result]) -> list[str]:
    found = difference(seeds(mine), seeds(other))
    by_seed = ", ".join(f"{value:+.1f}" for value in found.by_seed)
    return [f"{found.value:+.1f}", f"{found.low:+.1f} … {found.high:+.1f}", by_seed]


def words_over_random(rows: Rows) -> list[str]:
    """What starting from words gives over starting at random: at the same rate, and each at the
    rate with the least loss on dev."""
    cells = []
    for kind in ("prefix-mlp", "prefix-direct"):
        by_rate = [
            {mine[0]["lr"]: mine for name, mine in rows.items() if name.startswith(f"{start}, lr")}
            for start in (f"{kind}-words", f"{kind}-random")
        ]
        words, random = by_rate
        for lr in sorted(words.keys() & random.keys()):
            cells.append([kind, f"{lr:g}", f"{lr:g}", *difference_cells(words[lr], random[lr])])
        if min(map(len, by_rate)) > 1:
            rates = [min(found, key=partial(_dev_loss_at, found)) for found in by_rate]
            best = difference_cells(words[rates[0]], random[rates[1]])
            cells.append([f"{kind}, each at its best on dev", *map("{:g}".format, rates), *best])
    columns = ["BLEU from words less from random", "lr", "lr of random", "difference"]
    columns += ["95 %, paired", "by seed"]
    return ["", *lines_of(columns, cells)] if cells else []


def _dev_loss_at(by_rate: dict[float, list[Result]], lr: float) -> float:
    return mean(by_rate[lr], dev_loss)


def seeds(results: Sequence[Result]) -> dict[int, Any]:
    return {result["job"]["seed"]: result["bleu_statistics"] for result in results}


def tuned(results: Iterable[Result]) -> list[str]:
    """The learning rates that were tried."""
    tried = sorted((r for r in results if r["job"]["num_test"] == 0), key=order)
    if not tried:
        return []
    cells = [[r["job"]["method"], f"{r['lr']:g}", f"{r['dev_loss']:.3f}"] for r in tried]
    return ["## Learning rates tried", "", *lines_of(["method", "lr", "dev loss"], cells), ""]


def markdown(results: Sequence[Result]) -> str:
    lines = [
        "# Methods side by side",
        "",
        "One frozen LM, the same examples in the same order, AdamW with a linear schedule, greedy"
        " decoding. Scores: the mean over seeds, in brackets the mean 95 % bootstrap interval over"
        " test inputs, after ± the standard deviation over seeds. Differences: paired, both methods"
        " on the same resampled inputs; the prefix is the one with the least loss on dev. KiB a"
        " task: what is kept for each task in float32 (a prefix is kept without the MLP that"
        " trained it). CPU s: of all threads together.",
        "",
    ]
    for found, rows in sorted(by_setting(results).items(), key=lambda item: str(item[0])):
        lines += [f"## {found.title}", "", *table(rows), *differences(rows)]
        lines += [*words_over_random(rows), ""]
    lines += tuned(results)
    versions = results[-1]["versions"]
    lines.append(", ".join(f"{name} {version}" for name, version in versions.items()) + ".")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of results.jsonl")
    parser.add_argument("--images", type=Path, help="folder of the curves; default: --out")
    arguments = parser.parse_args()
    folder = arguments.out
    with (folder / "results.jsonl").open() as file:
        results = [json.loads(line) for line in file]
    drawn = draw_curves(results, arguments.images or folder)
    text = markdown(results)
    for what, path in drawn:
        text += f"\n![{what}]({os.path.relpath(path, folder)})\n"
    (folder / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
