"""The scores of a set of texts by group, with intervals, and how they are shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prefixd_train.bootstrap import Interval, draw, interval
from prefixd_train.metrics import Metric, References, make_metrics

__all__ = ["GroupScores", "Score", "Scores", "markdown", "score_groups"]


@dataclass(frozen=True)
class Score:
    value: float
    interval: Interval
    """of 95 %"""

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.interval.low:.2f} … {self.interval.high:.2f})"


@dataclass(frozen=True)
class GroupScores:
    num_segments: int
    scores: Mapping[str, Score]
    """by the metric's name"""


@dataclass(frozen=True)
class Scores:
    groups: Mapping[str, GroupScores]
    signatures: Mapping[str, str]
    """metric → how it was computed"""
    missing: Sequence[str]
    """a line for each metric that could not be computed here"""
    num_resamples: int
    seed: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "groups": {
                name: {
                    "num_segments": group.num_segments,
                    **{
                        metric: {
                            "value": score.value,
                            "low": score.interval.low,
                            "high": score.interval.high,
                        }
                        for metric, score in group.scores.items()
                    },
                }
                for name, group in self.groups.items()
            }
        }


def score_groups(
    hypotheses: Sequence[str],
    references: References,
    groups: Mapping[str, Sequence[int]],
    *,
    lowercase: bool = False,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Scores:
    """Score each group of segments by every metric that can be computed here.

    ``references`` are those of each segment, at least one; ``groups`` name indices of segments. The
    intervals are the bootstrap's (`bootstrap`), of the same resamples for every metric.
    """
    metrics, missing = make_metrics(lowercase=lowercase)
    statistics = {metric.name: metric.statistics(hypotheses, references) for metric in metrics}
    scored = {}
    for name, members in groups.items():
        draws = draw(len(members), num_resamples, seed)

        def score(metric: Metric, members: Sequence[int] = members, draws: Any = draws) -> Score:
            rows = statistics[metric.name][list(members)]
            return Score(metric.score(rows.sum(0)), interval(rows, metric.score, draws))

        scored[name] = GroupScores(len(members), {metric.name: score(metric) for metric in metrics})
    signatures = {metric.name: metric.signature for metric in metrics}
    return Scores(scored, signatures, missing, num_resamples, seed)


def _rows(scores: Scores) -> Iterator[list[str]]:
    for name, group in scores.groups.items():
        yield [name, str(group.num_segments), *map(str, group.scores.values())]


def _columns(scores: Scores) -> list[str]:
    return ["group", "inputs", *scores.signatures]


def markdown(scores: Scores) -> str:
    columns = _columns(scores)
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in _rows(scores)]
    lines += [
        "",
        f"In brackets the 95 % interval of {scores.num_resamples} bootstrap resamples of the"
        f" inputs, seed {scores.seed}.",
        "",
        *(f"- {metric}: {signature}" for metric, signature in scores.signatures.items()),
        *(f"- not computed: {line}" for line in scores.missing),
    ]
    return "\n".join(lines) + "\n"
