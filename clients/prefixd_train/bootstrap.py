"""Confidence intervals of a corpus score, by resampling the test set's segments.

A corpus score is a function of sums over segments (BLEU: n-grams matched, n-grams made, lengths).
So a resample needs no text: its sums are a matrix product of how often each segment was drawn and
what each segment adds (Koehn 2004, "Statistical Significance Tests for Machine Translation
Evaluation").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "draw", "interval"]

Array = NDArray[Any]


class Interval(NamedTuple):
    low: float
    high: float


def draw(num_segments: int, num_resamples: int, seed: int) -> Array:
    """Segments drawn with replacement, ``[num_resamples, num_segments]`` of indices.

    The same numbers give the same draws, so the intervals of two systems are of the same samples.
    """
    generator = np.random.default_rng(seed)
    return generator.integers(0, num_segments, (num_resamples, num_segments), dtype=np.int32)


def interval(
    statistics: Array,
    score: Callable[[Array], float],
    draws: Array,
    *,
    level: float = 0.95,
) -> Interval:
    """The central ``level`` of the scores of all resamples.

    ``statistics`` is ``[N, S]``, what each segment adds; ``score`` takes sums ``[S]``; ``draws`` is
    what `draw` returns.
    """
    size = len(statistics)
    counts = np.stack([np.bincount(row, minlength=size) for row in draws])
    scores = [score(sums) for sums in counts.astype(np.float64) @ statistics]
    low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
