"""Attention on the CPU that reads the pages where they are, through the C++ kernels.

A step becomes parts: a prefix that several sequences use, once, against the queries of all of them;
and what each sequence sees alone. The kernel joins a query's parts by log-sum-exp, so a prefix of
thousands of tokens is read once a step, however many requests use it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from prefixd_server.attention.base import (
    AttentionBackend,
    LayerOptions,
    SequenceSpan,
    Span,
    StepPlan,
)
from prefixd_server.attention.sdpa import SDPABackend
from prefixd_server.kv.pool import KVPool, slots_of
from prefixd_server.native import kernels
from prefixd_server.native.kernels import AttentionParts, Kernels

__all__ = ["NativeBackend", "NativePlan"]

_LONGEST_PART = 512
"""keys of one query; a longer list becomes several parts, so that all threads have work"""
_LONGEST_PART_OF_MANY = 1024
"""keys of several queries, whose parts are of one length and even in number; and not by how many
threads there are, on which no result may depend"""
_SHORTEST_PART_OF_MANY = 128


class NativeBackend(AttentionBackend):
    """Raises ValueError where the kernels cannot be had, or the pool is not float32 on the CPU."""

    def __init__(self, pool: KVPool) -> None:
        super().__init__(pool)
        loaded = kernels.load()
        if loaded is None:
            raise ValueError("the CPU kernels could not be compiled")
        if pool.device.type != "cpu" or pool.dtype != torch.float32:
            raise ValueError(f"the CPU kernels are for float32, not {pool.dtype} on {pool.device}")
        self.grouped = True
        """A prefix of several sequences is read once for all; not so only to measure it."""
        self._kernels = loaded
        self._reference = SDPABackend(pool)

    def plan(self, spans: Sequence[Span]) -> NativePlan:
        return NativePlan(self.pool, self._kernels, self._reference, spans, grouped=self.grouped)


class NativePlan(StepPlan):
    def __init__(
        self,
        pool: KVPool,
        kernels: Kernels,
        reference: SDPABackend,
        spans: Sequence[Span],
        *,
        grouped: bool = True,
    ) -> None:
        self._pool = pool
        self._kernels = kernels
        self._reference = reference
        self._spans = spans
        self._reference_plan: StepPlan | None = None
        self.slots = _new_slots(spans, pool.page_size)
        self.parts = _parts(spans, pool.page_size, grouped=grouped)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: LayerOptions
    ) -> Tensor:
        if options.relative_bias is not None:
            # T5 alone; its bias is a table of the model's, not a number.
            if self._reference_plan is None:
                self._reference_plan = self._reference.plan(self._spans)
            return self._reference_plan.attend(layer, query, key, value, options)
        keys, values = self._pool.keys[layer], self._pool.values[layer]
        if len(self.slots):  # cross-attention mostly has nothing new
            self._kernels.store(_rows(key), _rows(value), self.slots.ctypes.data, keys, values)
        return self._kernels.attend(
            _rows(query),
            keys,
            values,
            self.parts,
            scaling=options.scaling,
            softcap=options.softcap,
            window=options.sliding_window,
        )


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _new_slots(spans: Sequence[Span], page_size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    slots: list[int] = []
    for span in spans:
        first, end = span.first_new, span.num_keys
        if end - first == 1:
            slots.append(span.pages[first // page_size] * page_size + first % page_size)
        elif first < end:
            slots.extend(slots_of(span.pages, end, page_size)[first:].tolist())
    return np.array(slots, dtype=np.int64)


def _parts(spans: Sequence[Span], page_size: int, *, grouped: bool) -> AttentionParts:
    parts: list[int] = []
    pages: list[int] = []
    rows: list[int] = []
    query_index: list[int] = []
    # A prefix's first page is its alone.
    users = Counter(span.prefix_pages[0] for span in spans if grouped and span.prefix_len)
    shared: dict[int, tuple[Span, list[int]]] = {}  # a prefix -> one of its users, all its queries

    def add(into: list[int], span: Span, queries: Sequence[int], first: int, end: int) -> None:
        """Keys ``first`` … ``end - 1`` of the span's joint sequence, against ``queries``."""
        prefix_page = len(pages)
        if first < span.prefix_len:
            pages.extend(span.prefix_pages)
        own_page = len(pages)
        if end > span.prefix_len:
            pages.extend(span.pages)
        longest = _longest_part(end - first, len(queries))
        for first_key in range(first, end, longest):
            first_row = len(rows)
            rows.extend(queries)
            end_key = min(end, first_key + longest)
            into.extend(
                (first_row, len(rows), prefix_page, span.prefix_len, own_page, first_key, end_key)
            )

    for span in spans:
        first = len(query_index)
        num_keys = span.prefix_len + span.num_keys
        if isinstance(span, SequenceSpan):
            query_index.extend(range(num_keys - span.query_len, num_keys))
        else:  # in cross-attention every query sees all of it
            query_index.extend([num_keys - 1] * span.query_len)
        queries = range(first, len(query_index))
        if span.prefix_len and users[span.prefix_pages[0]] > 1:
            shared.setdefault(span.prefix_pages[0], (span, []))[1].extend(queries)
            add(parts, span, queries, span.prefix_len, num_keys)
        else:
            add(parts, span, queries, 0, num_keys)
    most: list[int] = []
    for span, all_queries in shared.values():
        add(most, span, all_queries, 0, span.prefix_len)
    # What takes longest is begun first, and head by head, so that threads end together.
    return AttentionParts(most + parts, pages, rows, query_index, page_size)


def _longest_part(keys: int, queries: int) -> int:
    if queries == 1:
        return _LONGEST_PART
    wanted = -(-keys // (2 * _LONGEST_PART_OF_MANY)) * 2
    parts = max(1, min(wanted, keys // _SHORTEST_PART_OF_MANY))
    return -(-keys // parts)
