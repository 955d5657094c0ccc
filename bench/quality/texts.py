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
NUM_DEV = 47
"""of the 547 inputs of E2E, so that 500 are left to train on"""

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
    pairs = [_pair(row, held_out) for row in dev]
    return Texts(
        train=[_encode(pair, tokenizer) for pair in shown],
        shown=shown,
        dev=[_encode(pair, tokenizer) for pair in pairs],
        test=_test(folder / job.dataset / "test.jsonl", job.num_test),
    )


def _splits(dataset: str, folder: Path) -> tuple[list[Row], list[Row]]:
    rows = _read(folder / "train.jsonl")
    path = folder / "dev.jsonl"
    others = _read(path) if path.exists() else rows
    order = np.random.default_rng(0).permutation(len(others))
    dev = [others[i] for i in order[:NUM_DEV]]
    return rows if path.exists() else [rows[i] for i in order[NUM_DEV:]], dev


def _test(path: Path, count: int | None) -> list[Segment]:
    segments = read_segments(path, TEMPLATE)
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


def _encode(pair: tuple[str, str], tokenizer: Any) -> Example:
    prompt, target = pair
    ids = tokenizer(target, add_special_tokens=False).input_ids
    return Example(tokenizer(prompt).input_ids, [*ids, tokenizer.eos_token_id])
