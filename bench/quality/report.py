"""The table and the charts of what run.py found.

    python bench/quality/report.py --out results

Writes report.md and charts as SVG and PNG beside results.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jobs import METHODS

Result = dict[str, Any]
METRICS = ("BLEU", "ROUGE-L")


class Setting(NamedTuple):
    """What the rows of one table have in common."""

    model: str
    dataset: str
    n: int | None
    steps: int
    batch_size: int
    length: int
    num_test: int | None

    @property
    def title(self) -> str:
        shown = "all examples" if self.n is None else f"{self.n} examples"
        tested = "all" if self.num_test is None else self.num_test
        return (
            f"{self.dataset}, {shown}: {self.steps} steps of {self.batch_size}, "
            f"{self.length} virtual tokens, {tested} test inputs, {self.model}"
        )


def setting(result: Result) -> Setting:
    job = result["job"]
    fields = ("dataset", "n", "steps", "batch_size", "length", "num_test")
    return Setting(result["model"], *(job[name] for name in fields))


def by_setting(results: Iterable[Result]) -> dict[Setting, dict[str, list[Result]]]:
    """Setting → method → results of its seeds. The untrained methods stand in every setting of
    their data set and test inputs, for how much the others are trained is nothing to them."""
    scored = [result for result in results if "scores" in result]
    found: dict[Setting, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in scored:
        if "lr" in result:
            found[setting(result)][result["job"]["method"]].append(result)
    for result in scored:
        if "lr" not in result:
            mine = setting(result)
            for other in found:
                if (other.model, other.dataset, other.num_test) == (
                    mine.model,
                    mine.dataset,
                    mine.num_test,
                ):
                    found[other][result["job"]["method"]].append(result)
    return found


def mean(results: Sequence[Result], of: Callable[[Result], float]) -> float:
    return statistics.mean(of(result) for result in results)


def score_cell(results: Sequence[Result], metric: str, group: str) -> str:
    def value(key: str) -> float:
        return mean(results, lambda result: result["scores"][group][metric][key])

    cell = f"{value('value'):.1f} ({value('low'):.1f} … {value('high'):.1f})"
    if len(results) > 1:
        spread = statistics.stdev(r["scores"][group][metric]["value"] for r in results)
        cell += f" ± {spread:.1f}"
    return cell


def row(method: str, results: Sequence[Result], groups: Sequence[str]) -> list[str]:
    first = results[0]
    cells = [method, str(len(results)), f"{first['trained_parameters']:,}"]
    cells.append(f"{first['bytes_per_task'] / 1024:,.0f}")
    if "lr" in first:
        cells.append(f"{first['lr']:g}")
        cells.append(f"{mean(results, lambda result: result['train_cpu_seconds']):.0f}")
        cells.append(f"{mean(results, lambda result: result['dev_loss']):.3f}")
    else:
        cells += ["", "", ""]
    return cells + [score_cell(results, metric, group) for metric in METRICS for group in groups]


def table(methods: dict[str, list[Result]]) -> list[str]:
    groups = list(next(iter(methods.values()))[0]["scores"])
    scores = [f"{m} {g}" if len(groups) > 1 else m for m in METRICS for g in groups]
    columns = [
        "method",
        "seeds",
        "trained parameters",
        "KiB a task",
        "lr",
        "train CPU s",
        "dev loss",
    ]
    columns += scores
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    known = [method for method in METHODS if method in methods]
    lines += ["| " + " | ".join(row(m, methods[m], groups)) + " |" for m in known]
    return lines


def tuned(results: Iterable[Result]) -> list[str]:
    """The learning rates that were tried."""
    tried = [result for result in results if result["job"]["lr"] is not None]
    if not tried:
        return []
    lines = ["## Learning rates tried", "", "| method | lr | dev loss |", "|---|---:|---:|"]
    for result in sorted(tried, key=lambda r: (METHODS.index(r["job"]["method"]), r["lr"])):
        lines.append(f"| {result['job']['method']} | {result['lr']:g} | {result['dev_loss']:.3f} |")
    return [*lines, ""]


def markdown(results: Sequence[Result]) -> str:
    lines = [
        "# Methods side by side",
        "",
        "One frozen LM, the same examples in the same order, AdamW with a linear schedule, greedy"
        " decoding. Scores: the mean over seeds, in brackets the mean 95 % bootstrap interval over"
        " test inputs, after ± the standard deviation over seeds. KiB a task: what is kept for each"
        " task in float32 (a prefix is kept without the MLP that trained it). CPU s: of all"
        " threads together.",
        "",
    ]
    for found, methods in sorted(by_setting(results).items(), key=lambda item: str(item[0])):
        lines += [f"## {found.title}", "", *table(methods), ""]
    lines += tuned(results)
    versions = results[-1]["versions"]
    lines.append(", ".join(f"{name} {version}" for name, version in versions.items()) + ".")
    return "\n".join(lines) + "\n"


def chart(
    results: Iterable[Result], axis: str, lines: Callable[[Result], bool], path: Path
) -> bool:
    """BLEU over a field of the job, a line a method; False where no line has two points."""
    from matplotlib.figure import Figure

    points: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        if "lr" in result and "scores" in result and lines(result):
            value = result["scores"]["all"]["BLEU"]["value"]
            points[result["job"]["method"]][result["job"][axis]].append(value)
    drawn = {method: curve for method, curve in points.items() if len(curve) > 1}
    if not drawn:
        return False
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, curve in drawn.items():
        at = sorted(curve)
        middle = [statistics.mean(curve[x]) for x in at]
        axes.plot(at, middle, marker="o", label=method)
        low, high = [min(curve[x]) for x in at], [max(curve[x]) for x in at]
        axes.fill_between(at, low, high, alpha=0.15)
    axes.set_xscale("log")
    axes.set_xticks(sorted({x for curve in drawn.values() for x in curve}))
    axes.get_xaxis().set_major_formatter(lambda x, _: f"{x:g}")
    axes.minorticks_off()
    axes.set_xlabel({"n": "training examples", "length": "virtual tokens"}[axis])
    axes.set_ylabel("BLEU, mean and range of seeds")
    axes.legend()
    save(figure, path)
    return True


def bars(title: str, methods: dict[str, list[Result]], path: Path) -> None:
    """BLEU of each method with its interval."""
    from matplotlib.figure import Figure

    known = [method for method in METHODS if method in methods]
    cells = {method: [r["scores"]["all"]["BLEU"] for r in methods[method]] for method in known}
    figure = Figure(figsize=(8, 0.4 * len(known) + 1.2), layout="constrained")
    axes = figure.subplots()
    middle, low, high = (
        [statistics.mean(cell[key] for cell in cells[method]) for method in known]
        for key in ("value", "low", "high")
    )
    # A corpus score of resamples need not lie around that of the whole.
    errors = [
        [max(0.0, v - x) for v, x in zip(middle, low, strict=True)],
        [max(0.0, x - v) for v, x in zip(middle, high, strict=True)],
    ]
    ours = ("prefix-", "embedding-", "infix-")
    colours = ["tab:blue" if method.startswith(ours) else "tab:gray" for method in known]
    axes.barh(known, middle, xerr=errors, color=colours)
    axes.invert_yaxis()
    axes.set_xlabel("BLEU, 95 % interval over test inputs")
    axes.set_title(title, fontsize=8)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path.with_suffix(".svg"))
    figure.savefig(path.with_suffix(".png"), dpi=150)


def charts(results: Sequence[Result], folder: Path) -> list[str]:
    """Markdown of the charts that could be drawn."""
    drawn = []
    for dataset in sorted({result["job"]["dataset"] for result in results}):
        mine = [result for result in results if result["job"]["dataset"] == dataset]
        mine = [result for result in mine if result["job"]["n"] is not None] or mine
        length = statistics.mode(result["job"]["length"] for result in mine)
        name = f"{dataset}-examples"
        if chart(mine, "n", lambda r, p=length: r["job"]["length"] == p, folder / name):
            drawn.append(f"![{dataset}: BLEU over training examples]({name}.svg)")
        most = statistics.mode(result["job"]["n"] for result in mine)
        name = f"{dataset}-length"
        if chart(mine, "length", lambda r, n=most: r["job"]["n"] == n, folder / name):
            drawn.append(f"![{dataset}: BLEU over the prefix's length]({name}.svg)")
    for number, (found, methods) in enumerate(by_setting(results).items()):
        name = f"methods-{number}"
        bars(found.title, methods, folder / name)
        drawn.append(f"![{found.title}]({name}.svg)")
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of results.jsonl")
    folder = parser.parse_args().out
    with (folder / "results.jsonl").open() as file:
        results = [json.loads(line) for line in file]
    drawn = charts(results, folder)
    text = markdown(results) + "".join(f"\n{line}\n" for line in drawn)
    (folder / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
