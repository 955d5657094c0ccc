"""The paged backend for CUDA: one Triton kernel that reads pages where they lie.

Why a kernel of our own. What a token sees is "a prefix of any length, then own pages", with windows
counted in the joint sequence. FlashAttention's block tables cannot say that: they are one list, of
pages of 256 tokens in the version that torch brings. FlashInfer can, given every token's slot as a
page of one; but then all slots are listed each step, and it is a large tree of packages whose
kernels are compiled at first use. Here a block of queries has two page lists (``work.py``), Triton
comes with torch, and a step's metadata has a fixed place, so that it can be replayed from a graph.

What the kernel cannot do goes to the reference backend: a relative bias (T5), heads beyond 256.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from prefixd_server.attention.base import (
    AttentionBackend,
    DecodePlan,
    LayerOptions,
    Span,
    StepPlan,
)
from prefixd_server.attention.sdpa import SDPABackend
from prefixd_server.attention.selfcheck import check_backend
from prefixd_server.attention.triton_kernels import attend_kernel, merge_kernel, store_kernel
from prefixd_server.attention.work import Int32, Shape, Work, grouping_pays, make_work, new_slots
from prefixd_server.kv.allocator import pages_for
from prefixd_server.kv.pool import KVPool
from prefixd_server.kv.transfer import stage, to_device

__all__ = ["TritonBackend"]

log = logging.getLogger(__name__)

_LARGEST_HEAD = 256
_PROGRAMS_PER_PROCESSOR = 2
_ALIGNMENT = 4
"""int32s: kernels are compiled once more for pointers that are not aligned to 16 bytes"""


class TritonBackend(AttentionBackend):
    def __init__(self, pool: KVPool) -> None:
        super().__init__(pool)
        self.reference = SDPABackend(pool)
        self.num_kv_heads, self.head_dim = pool.keys[0].shape[1:]
        self.usable = self.head_dim <= _LARGEST_HEAD
        if not self.usable:
            log.info(
                "attention: heads of %d are too large for the paged kernel; using sdpa",
                self.head_dim,
            )
        self._told_of_bias = False
        if pool.device.type == "cuda":
            processors = torch.cuda.get_device_properties(pool.device).multi_processor_count
        else:
            processors = 8  # the interpreter's; any number is right
        self._min_programs = processors * _PROGRAMS_PER_PROCESSOR

    def check(self) -> None:
        """Run a few tokens through the kernels. Raises what Triton does where it cannot compile (it
        needs a C compiler, Python's headers and a device that it knows), and RuntimeError where
        they do not give what the reference gives."""
        if self.usable:
            check_backend(TritonBackend, self.pool)

    def plan(self, spans: Sequence[Span]) -> StepPlan:
        return _Plan(self, spans) if self.usable else self.reference.plan(spans)

    def decode_plan(self, rows: int, *, grouped: bool) -> DecodePlan | None:
        return _DecodePlan(self, rows, grouped=grouped) if self.usable else None

    def shape(self, num_heads: int) -> Shape:
        return Shape(
            self.pool.page_size,
            self.num_kv_heads,
            num_heads // self.num_kv_heads,
            self._min_programs,
        )

    def note_bias(self) -> None:
        if not self._told_of_bias:
            self._told_of_bias = True
            log.info("attention: a relative bias is not for the paged kernel; using sdpa there")


class _Key(NamedTuple):
    """Layers that share their work."""

    num_heads: int
    grouped: bool


class _Plan(StepPlan):
    def __init__(self, backend: TritonBackend, spans: Sequence[Span]) -> None:
        self._backend = backend
        self._spans = spans
        self._grouped = grouping_pays(spans)
        slots = new_slots(spans, backend.pool.page_size)
        self._has_new = len(slots) > 0
        self._slots = to_device(slots, backend.pool.device)
        self._works: dict[_Key, _DeviceWork] = {}
        self._reference: StepPlan | None = None

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: LayerOptions
    ) -> Tensor:
        backend = self._backend
        if options.relative_bias is not None:
            backend.note_bias()
            if self._reference is None:
                self._reference = backend.reference.plan(self._spans)
            return self._reference.attend(layer, query, key, value, options)
        if self._has_new:
            _store(backend.pool, layer, self._slots, key, value)
        # A window cuts the prefix, and then there is little to share.
        grouped = self._grouped and options.sliding_window is None
        work = self._work(_Key(query.shape[1], grouped))
        return _attend(work, backend.pool, layer, query, options)

    def _work(self, key: _Key) -> _DeviceWork:
        if key not in self._works:
            work = make_work(self._spans, self._backend.shape(key.num_heads), grouped=key.grouped)
            buffer = to_device(_flat(work), self._backend.pool.device)
            self._works[key] = _DeviceWork(work, buffer)
        return self._works[key]


class _DecodePlan(DecodePlan):
    def __init__(self, backend: TritonBackend, rows: int, *, grouped: bool) -> None:
        self._backend = backend
        self._rows = rows
        # Beams, and requests that share a prompt's pages, list each of them for themselves.
        self._max_pages = 2 * backend.pool.num_pages
        self._grouped = grouped
        self._slots = torch.full((rows,), -1, dtype=torch.int32, device=backend.pool.device)
        self._works: dict[_Key, _DeviceWork] = {}
        self._spans: Sequence[Span] = ()

    def fits(self, spans: Sequence[Span]) -> bool:
        size = self._backend.pool.page_size
        prefixes = {span.prefix_pages[0]: span.prefix_pages for span in spans if span.prefix_len}
        pages = sum(pages_for(span.num_keys, size) for span in spans)
        pages += sum(len(prefix) for prefix in prefixes.values())
        return len(spans) <= self._rows and pages <= self._max_pages

    def fill(self, spans: Sequence[Span]) -> None:
        self._spans = spans
        slots = np.full(self._rows, -1, np.int32)
        slots[: len(spans)] = new_slots(spans, self._backend.pool.page_size)
        _overwrite(self._slots, slots)
        for key, work in self._works.items():
            _overwrite(work.buffer, _flat(self._make(key)))

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: LayerOptions
    ) -> Tensor:
        assert options.relative_bias is None
        pool = self._backend.pool
        _store(pool, layer, self._slots, key, value)
        grouped = self._grouped and options.sliding_window is None
        work = self._work(_Key(query.shape[1], grouped))
        return _attend(work, pool, layer, query, options)

    def _make(self, key: _Key) -> Work:
        shape = self._backend.shape(key.num_heads)
        return make_work(self._spans, shape, grouped=key.grouped, rows=self._rows)

    def _work(self, key: _Key) -> _DeviceWork:
        """Made by the run that precedes the capture; only looked up by the capture itself."""
        if key not in self._works:
            work, device = self._make(key), self._backend.pool.device
            flat = _flat(work)
            size = len(flat) - len(work.pages) + self._max_pages
            buffer = torch.zeros(size, dtype=torch.int32, device=device)
            _overwrite(buffer, flat)
            self._works[key] = _DeviceWork(work, buffer)
        return self._works[key]


class _DeviceLaunch(NamedTuple):
    blocks: Tensor
    queries: Tensor
    num_blocks: int
    block_m: int
    splits: int
    first_part: int


class _DeviceWork:
    """Work as views of one device tensor, which one copy fills."""

    def __init__(self, work: Work, buffer: Tensor) -> None:
        self.buffer = buffer
        self.parts = work.parts
        self.launches: list[_DeviceLaunch] = []
        start = 0

        def take(size: int) -> Tensor:
            nonlocal start
            view, start = buffer[start:], start + _aligned(size)
            return view

        for launch in work.launches:
            self.launches.append(
                _DeviceLaunch(
                    take(launch.blocks.size),
                    take(launch.queries.size),
                    len(launch.blocks),
                    launch.block_m,
                    launch.splits,
                    launch.first_part,
                )
            )
        self.num_parts = take(work.num_parts.size)
        self.pages = take(work.pages.size)


def _flat(work: Work) -> Int32:
    """All arrays of the work in one, in the order in which :class:`_DeviceWork` takes them; the
    pages last, for only their number differs from step to step of a :class:`DecodePlan`."""
    arrays = [
        array.ravel() for launch in work.launches for array in (launch.blocks, launch.queries)
    ]
    arrays.append(work.num_parts)
    gaps = [np.zeros(_aligned(array.size) - array.size, np.int32) for array in arrays]
    both = (array for pair in zip(arrays, gaps, strict=True) for array in pair)
    return np.concatenate([*both, work.pages])


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _overwrite(target: Tensor, values: Int32) -> None:
    staged = stage(values, target.device)
    target[: len(staged)].copy_(staged, non_blocking=True)


# --- launches -------------------------------------------------------------------------------------


def _store(pool: KVPool, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
    num_tokens, num_kv_heads, head_dim = key.shape
    key, value = _dense_rows(key), _dense_rows(value)
    store_kernel[(num_tokens, num_kv_heads)](
        key,
        value,
        pool.keys[layer],
        pool.values[layer],
        slots,
        *key.stride()[:2],
        *value.stride()[:2],
        *pool.keys[layer].stride()[:2],
        HEAD_DIM=head_dim,
        BLOCK_D=_block_d(head_dim),
        num_warps=1,
    )


def _attend(
    work: _DeviceWork, pool: KVPool, layer: int, query: Tensor, options: LayerOptions
) -> Tensor:
    """[T, H, D] -> [T, H, D]"""
    query = _dense_rows(query)
    num_tokens, num_heads, head_dim = query.shape
    keys, values = pool.keys[layer], pool.values[layer]
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    parts, lse = output, output
    if work.parts > 1:
        parts = torch.empty(work.parts, *query.shape, dtype=torch.float32, device=query.device)
        lse = torch.empty(
            work.parts, num_tokens, num_heads, dtype=torch.float32, device=query.device
        )
    for launch in work.launches:
        attend_kernel[(launch.num_blocks, keys.shape[1], launch.splits)](
            query,
            keys,
            values,
            parts,
            lse,
            launch.blocks,
            launch.queries,
            work.pages,
            options.scaling,
            options.softcap or 0.0,
            options.sliding_window or 0,
            *query.stride()[:2],
            *keys.stride()[:2],
            launch.first_part,
            num_tokens,
            PAGE_SIZE=pool.page_size,
            HEADS_PER_KV=num_heads // keys.shape[1],
            HEAD_DIM=head_dim,
            BLOCK_D=_block_d(head_dim),
            BLOCK_M=launch.block_m,
            BLOCK_N=_block_n(head_dim, query.dtype),
            HAS_SOFTCAP=options.softcap is not None,
            HAS_WINDOW=options.sliding_window is not None,
            HAS_PARTS=work.parts > 1,
            # float32 is asked for where results must agree with another machine's.
            PRECISION="ieee",
            num_warps=4,
            num_stages=2,
        )
    if work.parts > 1:
        merge_kernel[(num_tokens, num_heads)](
            parts,
            lse,
            work.num_parts,
            output,
            num_tokens,
            HEAD_DIM=head_dim,
            BLOCK_D=_block_d(head_dim),
            num_warps=1,
        )
    return output


def _dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _block_d(head_dim: int) -> int:
    return max(16, int(triton.next_power_of_2(head_dim)))


def _block_n(head_dim: int, dtype: torch.dtype) -> int:
    """Keys of a tile: 16 KiB of them, which two stages of keys and values fit four times in the
    shared memory of any device since Ampere."""
    return max(16, min(64, 16384 // (_block_d(head_dim) * dtype.itemsize)))
