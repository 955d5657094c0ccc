"""A test set: prompts, all their references, and the groups that are scored apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from prefixd_train.data import Row, read_rows
from prefixd_train.errors import DataError, TrainError
from prefixd_train.template import shown, target_texts

__all__ = ["Segment", "groups", "read_segments"]


Inputs = Callable[[Mapping[str, Any]], str]
"""a row's fields -> the prompt; ValueError: there is none"""


class Segment(NamedTuple):
    """One input of a test set."""

    place: str
    """file:line"""
    prompt: str
    """as it is sent"""
    references: Sequence[str]
    category: str | None = None
    seen: bool | None = None
    """Whether training had its category (WebNLG); None where the data does not say."""
    messages: bool | None = None
    """True: the row was messages, and the chat template writes what the LM reads"""


def read_segments(path: Path, inputs: Inputs, limit: int | None = None) -> list[Segment]:
    """The first ``limit`` rows of a JSONL file, or all. Raises DataError, which names the line, and
    the TrainErrors of ``inputs``."""
    segments = []
    for row in islice(read_rows(path), limit):
        try:
            segments.append(_segment(row, inputs))
        except TrainError:
            raise
        except ValueError as error:
            raise DataError(f"{row.place}: {error}") from error
    if not segments:
        raise DataError(f"{path}: no rows")
    return segments


def _segment(row: Row, inputs: Inputs) -> Segment:
    fields = row.fields
    if sum(name in fields for name in ("target", "targets", "messages")) != 1:
        raise ValueError(
            f"needs either target or targets, or messages, has {shown(', '.join(fields))}"
        )
    prompt = inputs(fields)
    messages = fields.get("messages")
    return Segment(
        place=row.place,
        prompt=prompt,
        references=[messages[-1]["content"]] if messages else target_texts(fields),
        messages=True if messages else None,
        category=_optional(fields, "category", str),
        seen=_optional(fields, "seen", bool),
    )


def _optional(fields: Mapping[str, Any], name: str, kind: type) -> Any:
    value = fields.get(name)
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{name} must be a {kind.__name__}, not {shown(value)}")
    return value


def groups(segments: Sequence[Segment], *, by_category: bool = False) -> dict[str, list[int]]:
    """Name → indices of segments: all, then seen and unseen where the data says, then categories.

    A group without segments is left out.
    """
    found = {
        "all": list(range(len(segments))),
        "seen": [i for i, segment in enumerate(segments) if segment.seen is True],
        "unseen": [i for i, segment in enumerate(segments) if segment.seen is False],
    }
    if by_category:
        names = sorted({segment.category for segment in segments if segment.category is not None})
        found |= {
            f"category {name}": [i for i, s in enumerate(segments) if s.category == name]
            for name in names
        }
    return {name: members for name, members in found.items() if members}
