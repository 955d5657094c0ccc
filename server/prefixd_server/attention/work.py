"""What the paged kernel is given for a step: blocks of queries, and where their keys are.

Numpy only, so that it is the same, and tested, on any machine. A *block* is up to ``block_m`` rows
(queries times the query heads of a KV head) that share one table of keys. Keys stand at their index
in the joint sequence, prefix then own tokens. A prefix ends inside a page that is its alone, so a
block has a page list for each: key ``j`` is looked up in the prefix's while ``j < prefix_len``,
else, as ``j - prefix_len``, in the own one. So one kernel sees any prefix length, window or mask
exactly, and no page list is repeated token by token.

Two ways to do a step:

- *joint*: each sequence reads its prefix and its own tokens in one go.
- *grouped*: sequences of one prefix are packed as one block list over the prefix's keys, which are
  then read once for all of them, and each reads its own tokens apart. The parts are merged by their
  log-sum-exps (Hydragen, arXiv 2402.05099; cascade attention). It pays where enough keys are not
  read again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from prefixd_server.attention.base import SequenceSpan, Span
from prefixd_server.kv.allocator import pages_for

__all__ = ["Int32", "Launch", "Shape", "Work", "grouping_pays", "make_work", "new_slots"]

Int32 = npt.NDArray[np.int32]

_BLOCK_FIELDS = 8
"""first query, queries, prefix table, own table, prefix_len, first key, end of keys, unused"""
_NARROW, _WIDE = 16, 64
"""rows of a block: the least a tensor core takes, for one query; and for many"""
_KEYS_PER_SPLIT = 256
_MAX_SPLITS = 32
_KEYS_SAVED = 4096
"""reads of prefix keys that a group must save: less than what a second launch and a merge cost,
counted as bytes at the memory's speed for 8 KV heads of 128"""


class Shape(NamedTuple):
    """What the work depends on besides the spans."""

    page_size: int
    num_kv_heads: int
    heads_per_kv: int
    min_programs: int
    """enough to fill the device: keys are split until a launch has so many"""


class Launch(NamedTuple):
    """One launch of the kernel, writing parts ``first_part`` … ``first_part + splits - 1``."""

    blocks: Int32
    """[N, 8]"""
    queries: Int32
    """[R, 2]: packed token, and the last key it sees"""
    block_m: int
    splits: int
    first_part: int

    def padded(self, num_blocks: int, num_queries: int) -> Launch:
        """The same with blocks and queries of nothing at the end."""
        blocks = np.zeros((num_blocks, _BLOCK_FIELDS), np.int32)
        blocks[: len(self.blocks)] = self.blocks
        queries = np.zeros((num_queries, 2), np.int32)
        queries[: len(self.queries)] = self.queries
        return self._replace(blocks=blocks, queries=queries)


@dataclass(frozen=True)
class Work:
    launches: list[Launch]
    pages: Int32
    num_parts: Int32
    """[T] how many parts each packed token's attention comes in"""

    @property
    def parts(self) -> int:
        return max(launch.first_part + launch.splits for launch in self.launches)


def new_slots(spans: Iterable[Span], page_size: int) -> Int32:
    """The slots of the tokens whose KV comes with this step, [T]."""
    found = []
    for span in spans:
        if span.num_keys - span.first_new == 1:
            page = span.pages[span.first_new // page_size]
            found.append(np.array([page * page_size + span.first_new % page_size], np.int32))
            continue
        token = np.arange(span.first_new, span.num_keys, dtype=np.int32)
        pages = np.asarray(span.pages, np.int32)
        found.append(pages[token // page_size] * page_size + token % page_size)
    return np.concatenate(found) if found else np.empty(0, np.int32)


def grouping_pays(spans: Sequence[Span]) -> bool:
    return bool(_groups(spans))


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


def _groups(spans: Sequence[Span]) -> list[list[int]]:
    """Which spans read one prefix together. Its first page tells which prefix it is."""
    found: dict[int, list[int]] = defaultdict(list)
    for i, span in enumerate(spans):
        if span.prefix_len:
            found[span.prefix_pages[0]].append(i)
    return [
        members
        for members in found.values()
        if (len(members) - 1) * spans[members[0]].prefix_len >= _KEYS_SAVED
    ]


def _rows(least: int, shape: Shape) -> int:
    return max(least, 1 << (shape.heads_per_kv - 1).bit_length())


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


def _splits(num_blocks: int, longest: int | None, shape: Shape) -> int:
    """How many programs share a block's keys; a power of two, so that graphs and buffers are few.

    ``longest``: the most keys a block has; None: not known, for a graph.
    """
    wanted = -(-shape.min_programs // (max(1, num_blocks) * shape.num_kv_heads))
    if longest is not None:
        wanted = min(wanted, -(-longest // _KEYS_PER_SPLIT))
    return min(_MAX_SPLITS, 1 << max(0, wanted - 1).bit_length())
