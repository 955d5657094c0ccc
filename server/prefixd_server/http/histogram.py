"""A histogram that takes many equal observations in one call, which prometheus_client's cannot.

All sequences of a step wait equally long for their next token: one call a step, not one a token.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

__all__ = ["BatchHistogram"]


class BatchHistogram(Collector):
    def __init__(
        self, name: str, help: str, buckets: Sequence[float], labels: Mapping[str, str]
    ) -> None:
        """``buckets``: their upper bounds, rising; +Inf is added."""
        self._name = name
        self._help = help
        self._bounds = [*buckets, float("inf")]
        self._labels = labels
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, amount: float, count: int) -> None:
        """``count`` observations of ``amount``."""
        with self._lock:
            self._counts[bisect_left(self._bounds, amount)] += count
            self._sum += amount * count

    def collect(self) -> Iterable[Metric]:
        with self._lock:
            counts, total = list(self._counts), self._sum
        family = HistogramMetricFamily(self._name, self._help, labels=list(self._labels))
        names = map(floatToGoString, self._bounds)
        buckets = list(zip(names, map(float, accumulate(counts)), strict=True))
        family.add_metric(list(self._labels.values()), buckets, total)
        yield family
