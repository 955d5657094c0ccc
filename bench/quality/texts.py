"""Training examples, dev examples and test inputs of a job, as tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jobs import Job

from prefixd_train.data import Example
from prefixd_train.template import PromptTemplate
from prefixd_train.testset import Segment, read_segments

__all__ = ["TEMPLATE", "Texts", "load_texts"]

TEMPLATE = PromptTemplate("{source}\n")
NUM_DEV = 100
"""inputs of ``dev.jsonl``"""
NUM_HELD_OUT = 47
"""of the training inputs, where there is no such file: E2E has 547, so 500 are left to train on"""
DEV_REFERENCES = 4
"""at most, of each of these inputs; each counts as an example"""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Texts:
    train: Sequence[Example]
    shown: Sequence[tuple[str, str]]
    """the training examples as prompt and target"""
    dev: Sequence[Example]
    test: Sequence[Segment]


def load_texts(job: Job, folder: Path, tokenizer: Any) -> Texts:
    """The same job, the same texts. All jobs of a data set have the same dev and test inputs; the
    seed chooses the training inputs and the reference that each has."""
    rows, dev = _splits(job.dataset, folder / job.dataset)
    random = np.random.default_rng([job.seed, 1])
    if job.n is None:
        shown = [(_prompt(row), text) for row in rows for text in row["targets"]]
    else:
        if job.n > len(rows):
            raise SystemExit(f"{job.dataset} has {len(rows)} training inputs, not {job.n}")
        chosen = random.permutation(len(rows))[: job.n]
        shown = [_pair(rows[i], random) for i in chosen]
    held_out = np.random.default_rng(0)
    pairs = [pair for row in dev for pair in _pairs(row, held_out)]
    return Texts(
        train=[_encode(pair, tokenizer) for pair in shown],
        shown=shown,
        dev=[_encode(pair, tokenizer) for pair in pairs],
        test=_test(folder / job.dataset / "test.jsonl", job.num_test),
    )


def _splits(dataset: str, folder: Path) -> tuple[list[Row], list[Row]]:
    rows = _read(folder / "train.jsonl")
    path = folder / "dev.jsonl"
    random = np.random.default_rng(0)
    if path.exists():
        others = _read(path)
        return rows, [others[i] for i in random.permutation(len(others))[:NUM_DEV]]
    order = random.permutation(len(rows))
    held_out, left = order[:NUM_HELD_OUT], order[NUM_HELD_OUT:]
    return [rows[i] for i in left], [rows[i] for i in held_out]


def _test(path: Path, count: int | None) -> list[Segment]:
    segments = read_segments(path, TEMPLATE.render)
    if count is None:
        return segments
    chosen = np.random.default_rng(0).permutation(len(segments))[:count]
    return [segments[i] for i in sorted(chosen.tolist())]


def _read(path: Path) -> list[Row]:
    with path.open() as file:
        return [json.loads(line) for line in file if line.strip()]


def _prompt(row: Row) -> str:
    return TEMPLATE.render(row)


def _pair(row: Row, random: np.random.Generator) -> tuple[str, str]:
    return _prompt(row), row["targets"][random.integers(len(row["targets"]))]


def _pairs(row: Row, random: np.random.Generator) -> list[tuple[str, str]]:
    targets = row["targets"]
    chosen = random.permutation(len(targets))[:DEV_REFERENCES]
    return [(_prompt(row), targets[i]) for i in chosen]


def _encode(pair: tuple[str, str], tokenizer: Any) -> Example:
    prompt, target = pair
    ids = tokenizer(target, add_special_tokens=False).input_ids
    return Example(tokenizer(prompt).input_ids, [*ids, tokenizer.eos_token_id])
