"""The kernel's work, span by span: what ``make_work`` does for all of a step at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

from prefixd_server.attention.base import SequenceSpan, Span
from prefixd_server.attention.work import (
    _BLOCK_FIELDS,
    _NARROW,
    _WIDE,
    Int32,
    Launch,
    Shape,
    Work,
    _groups,
    _rows,
    _splits,
)
from prefixd_server.kv.allocator import pages_for

__all__ = ["make_work"]


def make_work(
    spans: Sequence[Span], shape: Shape, *, grouped: bool, rows: int | None = None
) -> Work:
    """``rows``: pad a step of single queries to so many, for a graph that was captured once.

    Then splits depend on ``rows`` alone, so that work of any step fits the same graph.
    """
    tables = _Tables(shape.page_size)
    groups = _groups(spans) if grouped else []
    apart = {i for members in groups for i in members}
    starts = np.cumsum([0, *(span.query_len for span in spans)])
    one, many = _Blocks(_rows(_NARROW, shape)), _Blocks(_rows(_WIDE, shape))
    for i, span in enumerate(spans):
        blocks = one if span.query_len == 1 else many
        first_key = span.prefix_len if i in apart else 0
        blocks.add(span, starts[i], tables.of(span), first_key, shape)
    for row in range(len(spans), rows or 0):
        one.add_nothing(row)
    prefixes = _Blocks(_rows(_WIDE, shape))
    for members in groups:
        prefixes.add_group([spans[i] for i in members], starts[members], tables, shape)

    own = max(one, many, key=len)
    splits = _splits(len(own), None if rows else max(one.longest, many.longest), shape)
    launches = [blocks.launch(splits, 0) for blocks in (one, many) if len(blocks)]
    num_parts = np.full(rows or starts[-1], splits, np.int32)
    if groups or (grouped and rows):
        # A graph is captured for the fewest blocks that its rows may come in: one group of all.
        fewest = -(-rows * shape.heads_per_kv // prefixes.block_m) if rows else len(prefixes)
        prefix_splits = _splits(fewest, None if rows else prefixes.longest, shape)
        launches.append(prefixes.launch(prefix_splits, splits))
        for i in apart:
            num_parts[starts[i] : starts[i + 1]] += prefix_splits
    if rows:
        launches = [launch.padded(rows, rows) for launch in launches]
    return Work(launches, tables.flat(), num_parts)


class _Tables:
    """All page lists of a step, flat; a prefix's once."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._lists: list[Sequence[int]] = []
        self._end = 0
        self._prefixes: dict[int, int] = {}

    def of(self, span: Span) -> tuple[int, int]:
        """Where the span's prefix pages and its own begin."""
        own = self._add(span.pages[: pages_for(span.num_keys, self._page_size)])
        return self.prefix(span), own

    def prefix(self, span: Span) -> int:
        if not span.prefix_len:
            return 0
        first = span.prefix_pages[0]
        if first not in self._prefixes:
            self._prefixes[first] = self._add(span.prefix_pages)
        return self._prefixes[first]

    def _add(self, pages: Sequence[int]) -> int:
        start, self._end = self._end, self._end + len(pages)
        self._lists.append(pages)
        return start

    def flat(self) -> Int32:
        return np.fromiter(chain.from_iterable(self._lists), np.int32, self._end)


class _Blocks:
    """Blocks of one launch as they are collected."""

    def __init__(self, block_m: int) -> None:
        self.block_m = block_m
        self.longest = 0
        self._blocks: list[tuple[int, ...]] = []
        self._queries: list[Int32] = []
        self._num_queries = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def add(
        self, span: Span, start: int, tables: tuple[int, int], first_key: int, shape: Shape
    ) -> None:
        """A sequence's queries, the packed tokens from ``start`` on."""
        end = span.prefix_len + span.num_keys
        last = np.full(span.query_len, end - 1, np.int32)
        if isinstance(span, SequenceSpan):
            last -= np.arange(span.query_len - 1, -1, -1, dtype=np.int32)
        tokens = np.arange(start, start + span.query_len, dtype=np.int32)
        self._add(tokens, last, shape, (*tables, span.prefix_len, first_key, end, 0))

    def add_group(
        self, spans: Sequence[Span], starts: Iterable[int], tables: _Tables, shape: Shape
    ) -> None:
        """The queries of all that share a prefix, over its keys; each sees all of them."""
        tokens = np.concatenate(
            [
                np.arange(start, start + span.query_len, dtype=np.int32)
                for span, start in zip(spans, starts, strict=True)
            ]
        )
        length = spans[0].prefix_len
        last = np.full(len(tokens), length - 1, np.int32)
        self._add(tokens, last, shape, (tables.prefix(spans[0]), 0, length, 0, length, 0))

    def add_nothing(self, token: int) -> None:
        """A packed token that sees nothing and whose output is zero."""
        self._blocks.append((self._num_queries, 1, 0, 0, 0, 0, 0, 0))
        self._queries.append(np.array([[token, -1]], np.int32))
        self._num_queries += 1

    def _add(self, tokens: Int32, last: Int32, shape: Shape, keys: tuple[int, ...]) -> None:
        self.longest = max(self.longest, keys[4] - keys[3])
        each = self.block_m // shape.heads_per_kv
        for begin in range(0, len(tokens), each):
            count = min(each, len(tokens) - begin)
            self._blocks.append((self._num_queries + begin, count, *keys))
        self._queries.append(np.stack([tokens, last], 1))
        self._num_queries += len(tokens)

    def launch(self, splits: int, first_part: int) -> Launch:
        blocks = np.array(self._blocks, np.int32).reshape(-1, _BLOCK_FIELDS)
        queries = np.concatenate([np.empty((0, 2), np.int32), *self._queries])
        return Launch(blocks, queries, self.block_m, splits, first_part)
