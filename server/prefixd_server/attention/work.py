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
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from prefixd_server.attention.base import SequenceSpan, Span
from prefixd_server.kv.allocator import pages_for

__all__ = ["Int32", "Launch", "Shape", "Work", "grouping_pays", "make_work", "new_slots"]

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

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
    found: list[int] = []
    for span in spans:
        pages, first = span.pages, span.first_new
        if span.num_keys - first == 1:
            found.append(pages[first // page_size] * page_size + first % page_size)
            continue
        token = np.arange(first, span.num_keys)
        found += (np.asarray(pages)[token // page_size] * page_size + token % page_size).tolist()
    return np.array(found, np.int32)


def grouping_pays(spans: Sequence[Span]) -> bool:
    return bool(_groups(spans))


def make_work(
    spans: Sequence[Span], shape: Shape, *, grouped: bool, rows: int | None = None
) -> Work:
    """``rows``: pad a step of single queries to so many, for a graph that was captured once.

    Then splits depend on ``rows`` alone, so that work of any step fits the same graph.
    """
    groups = _groups(spans) if grouped else []
    columns = _Columns(spans, shape.page_size)
    apart = np.zeros(len(spans), bool)
    for members in groups:
        apart[members] = True

    count, last, keys = columns.count, columns.last, columns.keys(apart)
    token = np.arange(len(last))
    if rows:
        # Rows that nobody has: a packed token each, which sees nothing and comes out as zero.
        empty = rows - len(spans)
        token = np.arange(rows)
        last = np.concatenate([last, np.full(empty, -1)])
        count = np.concatenate([count, np.ones(empty, np.int64)])
        keys = np.concatenate([keys, np.zeros((empty, keys.shape[1]), np.int64)])
    one, many = _rows(_NARROW, shape), _rows(_WIDE, shape)
    if len(token) == len(count):
        found = [_Blocks.of(token, last, count, keys, one, shape)]
    else:
        single = count == 1
        of_single = np.repeat(single, count)
        found = [
            _Blocks.of(token[of_them], last[of_them], count[them], keys[them], block_m, shape)
            for block_m, them, of_them in ((one, single, of_single), (many, ~single, ~of_single))
            if them.any()
        ]
    longest = None if rows else max(blocks.longest for blocks in found)
    splits = _splits(max(map(len, found)), longest, shape)
    launches = [blocks.launch(splits, 0) for blocks in found]
    num_parts = np.full(len(token), splits, np.int32)
    if groups or (grouped and rows):
        prefixes = columns.prefixes(groups, many, shape)
        # A graph is captured for the fewest blocks that its rows may come in: one group of all.
        fewest = -(-rows * shape.heads_per_kv // prefixes.block_m) if rows else len(prefixes)
        prefix_splits = _splits(fewest, None if rows else prefixes.longest, shape)
        launches.append(prefixes.launch(prefix_splits, splits))
        num_parts[: len(columns.last)][np.repeat(apart, columns.count)] += prefix_splits
    if rows:
        launches = [launch.padded(rows, rows) for launch in launches]
    return Work(launches, columns.pages, num_parts)


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


class _Columns:
    """The spans of a step as arrays, and all their page lists, a prefix's once. A span costs the
    host a few lookups: what is left is numpy's, whose calls do not grow with the batch."""

    def __init__(self, spans: Sequence[Span], page_size: int) -> None:
        size = len(spans)
        self.count = np.fromiter((span.query_len for span in spans), np.int64, size)
        self.prefix_len = np.fromiter((span.prefix_len for span in spans), np.int64, size)
        num_keys = [span.num_keys for span in spans]
        self.end = self.prefix_len + np.array(num_keys, np.int64)
        self.start = np.cumsum(self.count) - self.count
        """the first packed token of each"""
        causal = np.fromiter((isinstance(span, SequenceSpan) for span in spans), bool, size)
        before_end = np.repeat(self.start + self.count, self.count) - 1
        before_end -= np.arange(len(before_end))
        self.last = np.repeat(self.end - 1, self.count) - before_end * np.repeat(causal, self.count)
        """the last key that each packed token sees"""

        flat: list[int] = []
        self._own, self._prefix = [], []
        prefixes: dict[int, int] = {}
        for span, keys in zip(spans, num_keys, strict=True):
            self._own.append(len(flat))
            flat += span.pages[: pages_for(keys, page_size)]
            if not span.prefix_len:
                self._prefix.append(0)
                continue
            first = span.prefix_pages[0]
            if first not in prefixes:
                prefixes[first] = len(flat)
                flat += span.prefix_pages
            self._prefix.append(prefixes[first])
        self.pages = np.array(flat, np.int32)

    def keys(self, apart: npt.NDArray[np.bool_]) -> Int64:
        """[S, 5]: the fields of a block that tell its keys. Those ``apart`` leave out their prefix,
        which their group reads."""
        first = self.prefix_len * apart
        return np.array([self._prefix, self._own, self.prefix_len, first, self.end], np.int64).T

    def prefixes(self, groups: list[list[int]], block_m: int, shape: Shape) -> _Blocks:
        """The queries of all that share a prefix, over its keys; each sees all of them."""
        members = np.array([i for group in groups for i in group], np.int64)
        each = self.count[members]
        token = np.repeat(self.start[members], each) + _steps(each)
        first = np.array([group[0] for group in groups], np.int64)
        count = np.array([self.count[group].sum() for group in groups], np.int64)
        length, nothing = self.prefix_len[first], np.zeros(len(groups), np.int64)
        table = np.array([self._prefix[i] for i in first], np.int64)
        keys = np.stack([table, nothing, length, nothing, length], 1)
        return _Blocks.of(token, np.repeat(length - 1, count), count, keys, block_m, shape)


@dataclass(frozen=True)
class _Blocks:
    """Blocks of one launch."""

    blocks: Int32
    queries: Int32
    block_m: int
    longest: int
    """the most keys that one has"""

    def __len__(self) -> int:
        return len(self.blocks)

    @classmethod
    def of(
        cls, token: Int64, last: Int64, count: Int64, keys: Int64, block_m: int, shape: Shape
    ) -> _Blocks:
        """Cut N runs of ``count`` queries each, ``token`` and ``last`` [sum(count)], into blocks;
        keys [N, 5] as :meth:`_Columns.keys` gives them."""
        most = block_m // shape.heads_per_kv
        pieces = -(-count // most)
        begin = _steps(pieces) * most
        blocks = np.zeros((len(begin), _BLOCK_FIELDS), np.int32)
        blocks[:, 0] = np.repeat(np.cumsum(count) - count, pieces) + begin
        blocks[:, 1] = np.minimum(np.repeat(count, pieces) - begin, most)
        blocks[:, 2:7] = np.repeat(keys, pieces, axis=0)
        longest = int((keys[:, 4] - keys[:, 3]).max(initial=0))
        return cls(blocks, np.stack([token, last], 1).astype(np.int32), block_m, longest)

    def launch(self, splits: int, first_part: int) -> Launch:
        return Launch(self.blocks, self.queries, self.block_m, splits, first_part)


def _steps(counts: Int64) -> Int64:
    """0 … n-1 for each n of ``counts``, joined."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


def _splits(num_blocks: int, longest: int | None, shape: Shape) -> int:
    """How many programs share a block's keys; a power of two, so that graphs and buffers are few.

    ``longest``: the most keys a block has; None: not known, for a graph.
    """
    wanted = -(-shape.min_programs // (max(1, num_blocks) * shape.num_kv_heads))
    if longest is not None:
        wanted = min(wanted, -(-longest // _KEYS_PER_SPLIT))
    return min(_MAX_SPLITS, 1 << max(0, wanted - 1).bit_length())
