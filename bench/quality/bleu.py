"""The difference in BLEU between two methods, by paired bootstrap over test inputs.

Both methods are scored on the same inputs, drawn anew with replacement (Koehn 2004), so that what
is hard in an input is hard for both and leaves the difference.
"""

from __future__ import annotations

import statistics as averages
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefixd_train.bootstrap import draw
from prefixd_train.metrics import Metric, make_metrics

__all__ = ["Difference", "difference", "statistics"]

NUM_RESAMPLES = 2000
BOTH_TAILS = (0.025, 0.975)

Array = NDArray[np.float64]


def statistics(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[list[int]]:
    """``[N, 10]``: what each input adds to BLEU's sums. As sacrebleu has them: length of the text,
    of the reference, matched n-grams of orders 1 to 4, n-grams made."""
    return [[int(value) for value in row] for row in _metric().statistics(hypotheses, references)]


class Difference(NamedTuple):
    """In BLEU, a positive one in favour of the first method."""

    value: float
    low: float
    high: float
    """of 95 % of the resamples"""
    by_seed: Sequence[float]
    """of the seeds that both have"""


def difference(first: dict[int, Any], second: dict[int, Any]) -> Difference:
    """``first``, ``second``: seed → `statistics`. Where both have a seed only common ones count;
    the figure of a method is its mean over seeds."""
    common = sorted(first.keys() & second.keys())
    mine, other = (
        [np.asarray(rows[seed], dtype=np.float64) for seed in common or sorted(rows)]
        for rows in (first, second)
    )
    size = len(mine[0])
    values = [_mean(mine, None) - _mean(other, None)]
    for drawn in draw(size, NUM_RESAMPLES, seed=0):
        counts = np.bincount(drawn, minlength=size).astype(np.float64)
        values.append(_mean(mine, counts) - _mean(other, counts))
    low, high = np.quantile(values[1:], BOTH_TAILS)
    seeds = range(len(common))
    return Difference(
        values[0],
        float(low),
        float(high),
        [_mean(mine[i : i + 1], None) - _mean(other[i : i + 1], None) for i in seeds],
    )


def _mean(seeds: Sequence[Array], counts: Array | None) -> float:
    return averages.mean(_bleu(rows.sum(0) if counts is None else counts @ rows) for rows in seeds)


def _bleu(sums: Array) -> float:
    return _metric().score(sums)


@cache
def _metric() -> Metric:
    return next(metric for metric in make_metrics()[0] if metric.name == "BLEU")
