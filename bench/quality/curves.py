"""Curves and bars of the comparison, as SVG."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from jobs import METHODS, Job

__all__ = ["draw_curves"]

Result = dict[str, Any]
OURS, THEIRS = "#2f6db5", "#b0b7bf"
COLOURS = ("#2f6db5", "#d1772f", "#4f9d5b", "#8a5fb0", "#777777")
SMOOTH = 10
"""steps whose losses are averaged"""


def draw_curves(results: Sequence[Result], folder: Path) -> list[tuple[str, Path]]:
    """What each shows, and its file; those for which there are too few results are left out."""
    # The same results give the same bytes.
    plt.rcParams["svg.hashsalt"] = "prefixd"
    scored = [result for result in results if "scores" in result]
    drawn = []
    for dataset in sorted({result["job"]["dataset"] for result in scored}):
        mine = [result for result in scored if result["job"]["dataset"] == dataset]
        most = max((r["job"]["n"] or 0 for r in mine if "lr" in r), default=0)
        charts: dict[str, tuple[str, Any]] = {
            "methods": (f"{dataset}: BLEU of the methods", methods(mine, most)),
            "length": (f"{dataset}: loss and BLEU over the prefix's length", lengths(mine, most)),
            "start": (f"{dataset}: what a prefix starts from", starts(mine)),
        }
        for name, (title, figure) in charts.items():
            if figure is not None:
                path = folder / f"quality-{dataset}-{name}.svg"
                figure.savefig(path, metadata={"Date": None})
                plt.close(figure)
                drawn.append((title, path))
    return drawn


def bleu(result: Result) -> float:
    return float(result["scores"]["all"]["BLEU"]["value"])


def dev_loss(result: Result) -> float:
    return float(result["dev_loss"])


def grouped(results: Iterable[Result], key: Callable[[Result], Any]) -> dict[Any, list[Result]]:
    found: dict[Hashable, list[Result]] = defaultdict(list)
    for result in results:
        found[key(result)].append(result)
    return dict(sorted(found.items(), key=lambda item: item[0]))


def methods(results: Sequence[Result], n: int) -> Any:
    """A bar a method: the mean of its seeds, with the mean interval and a dot a seed."""
    rows = [r for r in results if "lr" not in r or (r["job"]["n"] == n and standard(r))]
    found = grouped(rows, lambda r: METHODS.index(r["job"]["method"]))
    names = [METHODS[index] for index in found]
    figure, axis = plt.subplots(figsize=(8, 0.32 * len(names) + 0.9), layout="constrained")
    for place, (name, mine) in enumerate(zip(names, found.values(), strict=True)):
        cells = [result["scores"]["all"]["BLEU"] for result in mine]
        middle, low, high = (statistics.mean(c[key] for c in cells) for key in _INTERVAL)
        colour = OURS if name.startswith(("prefix-", "embedding-", "infix-")) else THEIRS
        # The score of all inputs need not lie between those of resamples.
        error = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
        axis.barh(place, middle, color=colour, xerr=error, ecolor="#444444", capsize=2)
        axis.plot([c["value"] for c in cells], [place] * len(cells), "k.", markersize=4)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_title(f"BLEU, {n} examples; 95 % over test inputs, dots: seeds", loc="left", size=9)
    axis.tick_params(labelsize=8)
    return figure


_INTERVAL = ("value", "low", "high")


def standard(result: Result) -> bool:
    """With the length and the learning rate of the comparison."""
    return result["job"]["length"] == Job.length and result["job"]["lr"] is None


def lengths(results: Sequence[Result], n: int) -> Any:
    """Of our prefix; seed 0 as a line, all seeds as dots."""
    rows = [r for r in results if r["job"]["method"] == "prefix-mlp-words"]
    rows = [r for r in rows if r["job"]["n"] == n and r["job"]["lr"] is None]
    found = grouped(rows, lambda r: r["job"]["length"])
    if len(found) < 2:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    for axis, (title, of) in zip(axes, _FIGURES.items(), strict=True):
        first = [of(min(mine, key=lambda r: r["job"]["seed"])) for mine in found.values()]
        axis.plot(list(found), first, color=OURS)
        for length, mine in found.items():
            axis.plot([length] * len(mine), [of(r) for r in mine], "o", color=OURS, markersize=4)
        axis.set_xscale("log")
        axis.set_xticks(list(found), [str(length) for length in found])
        axis.minorticks_off()
        axis.set_title(f"{title}, {n} examples", loc="left", size=9)
        axis.set_xlabel("virtual tokens", size=8)
        axis.tick_params(labelsize=8)
    return figure


_FIGURES = {"loss on dev, nats a token": dev_loss, "BLEU": bleu}


def starts(results: Sequence[Result]) -> Any:
    """MLP prefixes with few examples: the training loss over steps (mean of seeds), and the seeds'
    loss on dev and BLEU."""
    rows = [r for r in results if r["job"]["method"].startswith("prefix-mlp-")]
    usual = {"n": Job.n, "length": Job.length, "steps": Job.steps}
    rows = [r for r in rows if all(r["job"][name] == value for name, value in usual.items())]
    found = grouped(rows, lambda r: (r["job"]["method"].removeprefix("prefix-mlp-"), r["lr"]))
    if len({start for start, _ in found}) < 2:
        return None
    figure, (steps, *axes) = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
    names = sorted({start for start, _ in found})
    for (start, lr), mine in found.items():
        losses = np.mean([result["losses"] for result in mine], axis=0)
        smooth = np.convolve(losses, np.full(SMOOTH, 1 / SMOOTH), "valid")
        fastest = max(rate for name, rate in found if name == start)
        steps.plot(
            np.arange(SMOOTH, len(losses) + 1),
            smooth,
            "-" if lr == fastest else "--",
            color=COLOURS[names.index(start)],
            label=f"{start}, {lr:g}",
        )
    steps.legend(fontsize=7)
    steps.set_xlabel("step", size=8)
    steps.set_title(f"training loss, mean of {SMOOTH} steps", loc="left", size=9)
    steps.tick_params(labelsize=8)
    for axis, (title, of) in zip(axes, _FIGURES.items(), strict=True):
        for place, ((start, _), mine) in enumerate(found.items()):
            colour = COLOURS[names.index(start)]
            values = [of(result) for result in mine]
            axis.plot([place] * len(values), values, "o", color=colour, markersize=4)
            axis.plot(place, statistics.mean(values), "_", color=colour, markersize=18)
        axis.set_xticks(range(len(found)), [f"{start}\n{lr:g}" for start, lr in found])
        axis.set_title(title, loc="left", size=9)
        axis.tick_params(labelsize=7)
    return figure
