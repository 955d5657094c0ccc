"""A forward pass as a list of operations that one call of C++ runs: see ``program.h``.

Python takes part once a step instead of a thousand times, and threads meet at a barrier instead of
being called anew for each operator.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, byref, c_double, c_int64, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefixd_server.native.binding import bind
from prefixd_server.native.kernels import AttentionParts, Kernels

__all__ = ["Buffer", "Columns", "Kind", "Operation", "Program", "Rotary"]


class Kind(IntEnum):
    EMBED = 0
    LINEAR = 1
    RMS_NORM = 2
    LAYER_NORM = 3
    ROTATE = 4
    ATTEND = 5
    ADD = 6
    MULTIPLY = 7
    SCALE = 8
    ACTIVATE = 9
    TANH = 10
    KEEP = 11


@dataclass(eq=False)
class Buffer:
    """Rows of ``width`` numbers: one a token, or one for each that is ``kept`` for its logits."""

    width: int
    kept: bool = False


@dataclass(frozen=True)
class Columns:
    """What an operation reads or writes of each row: ``count`` heads of ``size`` numbers."""

    buffer: Buffer
    offset: int
    count: int
    size: int

    @property
    def width(self) -> int:
        return self.count * self.size

    @property
    def is_whole(self) -> bool:
        return self.offset == 0 and self.width == self.buffer.width


@dataclass(eq=False)
class Rotary:
    """``make(positions [1, N])`` gives the cosines and sines, each [1, N, D]; kept in tables that
    grow with the longest position seen."""

    make: Callable[[Tensor], tuple[Tensor, Tensor]]
    tables: tuple[Tensor, Tensor] | None = None

    def covering(self, positions: int) -> tuple[Tensor, Tensor]:
        """Both tables, [at least ``positions``, D]."""
        if self.tables is None or len(self.tables[0]) < positions:
            length = 1 << max(8, math.ceil(math.log2(positions)))
            cosine, sine = self.make(torch.arange(length)[None])
            self.tables = (cosine[0].contiguous(), sine[0].contiguous())
        return self.tables


@dataclass(frozen=True, eq=False)
class Operation:
    kind: Kind
    inputs: tuple[Columns, ...]
    output: Columns
    weight: Tensor | None = None
    """EMBED: [V, C]; LINEAR: packed; norms: [size]"""
    int8: bool = False
    """LINEAR: the weight, else float32"""
    bias: Tensor | None = None
    rotary: Rotary | None = None
    numbers: tuple[float, float] = (0.0, 0.0)
    """RMS_NORM: what is added to the weight, epsilon; LAYER_NORM: -, epsilon; SCALE: the factor;
    ACTIVATE: slope and cubic term; ATTEND: scaling, softcap"""
    flag: bool = False
    """EMBED: of the position, not the token; LINEAR: added to what the output holds"""
    layer: int = 0
    window: int = 0

    @property
    def reads(self) -> tuple[Buffer, ...]:
        read = tuple(columns.buffer for columns in self.inputs)
        return (*read, self.output.buffer) if self.kind is Kind.LINEAR and self.flag else read


class _Operand(Structure):
    _fields_ = [("place", c_int64), ("offset", c_int64), ("stride", c_int64)]


_NOWHERE = _Operand(-1, 0, 0)
_LOGITS = -2


class _Op(Structure):
    _fields_ = [
        ("kind", c_int64), ("kept", c_int64),
        ("a", _Operand), ("b", _Operand), ("c", _Operand), ("to", _Operand),
        ("count", c_int64), ("size", c_int64), ("inner", c_int64),
        ("weight", c_void_p), ("bias", c_void_p), ("int8", c_int64), ("flag", c_int64),
        ("layer", c_int64), ("kv_heads", c_int64), ("window", c_int64),
        ("first", c_double), ("second", c_double),
    ]  # fmt: skip


class _Run(Structure):
    _fields_ = [
        ("arena", c_void_p), ("logits", c_void_p), ("tokens", c_int64), ("kept", c_int64),
        ("token_ids", c_void_p), ("positions", c_void_p), ("keep", c_void_p),
        ("slots", c_void_p), ("num_slots", c_int64),
        ("keys", c_void_p), ("values", c_void_p),
        ("parts", c_void_p), ("pages", c_void_p), ("rows", c_void_p), ("query_index", c_void_p),
        ("token_first", c_void_p), ("token_rows", c_void_p),
        ("num_parts", c_int64), ("page_size", c_int64), ("results", c_void_p),
    ]  # fmt: skip


class Program:
    """Runs on float32 pages; like the kernels, in torch's OpenMP threads without the GIL."""

    def __init__(self, kernels: Kernels, operations: Sequence[Operation]) -> None:
        """The last operation writes the logits [kept, V]."""
        self._execute = bind(kernels.function("run"), [POINTER(_Op), c_int64, POINTER(_Run)])
        self.operations = list(operations)
        self._logits = operations[-1].output.buffer
        self._places, self._row_size = _arrange(self.operations, self._logits)
        self._ops = (_Op * len(operations))(*map(self._op, operations))
        self._rotary = [(i, op.rotary) for i, op in enumerate(operations) if op.rotary is not None]
        attention = [op for op in operations if op.kind is Kind.ATTEND]
        self._heads = max((op.inputs[0].count for op in attention), default=1)
        self._dim = max((op.inputs[0].size for op in attention), default=1)
        self._arena = torch.empty(0)
        self._known_positions = 0
        self._pool: tuple[Sequence[Tensor], Sequence[Tensor], Any, Any] | None = None

    @property
    def vocab_size(self) -> int:
        return self._logits.width

    def run(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        keep: Sequence[int],
        *,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        slots: np.ndarray[Any, np.dtype[np.int64]],
        parts: AttentionParts,
    ) -> Tensor:
        """One packed step: token and position of each of T rows; logits [len(keep), V] of rows
        ``keep``. keys, values [num_slots, H_kv, D] of each layer; the new ones go to ``slots``."""
        ids, at, kept = (np.array(x, dtype=np.int64) for x in (token_ids, positions, keep))
        self._know_positions(int(at.max()) + 1)
        logits = torch.empty(len(kept), self.vocab_size)
        if self._arena.numel() < self._row_size * len(ids):
            self._arena = torch.empty(self._row_size * len(ids))
        key_addresses, value_addresses = self._addresses(keys, values)
        (
            part_data, num_parts, pages, rows, query_index, page_size, token_first, token_rows, _,
        ) = parts.addresses  # fmt: skip
        run = _Run(
            self._arena.data_ptr(), logits.data_ptr(), len(ids), len(kept),
            ids.ctypes.data, at.ctypes.data, kept.ctypes.data,
            slots.ctypes.data, len(slots), key_addresses, value_addresses,
            part_data, pages, rows, query_index, token_first, token_rows,
            num_parts, page_size, parts.workspace(self._heads, self._dim),
        )  # fmt: skip
        self._execute(self._ops, len(self._ops), byref(run))
        return logits

    def _know_positions(self, positions: int) -> None:
        if positions <= self._known_positions:
            return
        for index, rotary in self._rotary:
            cosine, sine = rotary.covering(positions)
            self._ops[index].weight, self._ops[index].bias = cosine.data_ptr(), sine.data_ptr()
        self._known_positions = positions

    def _addresses(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[Any, Any]:
        if self._pool is None or self._pool[0] is not keys or self._pool[1] is not values:
            table = c_void_p * len(keys)
            self._pool = (
                keys,
                values,
                table(*(layer.data_ptr() for layer in keys)),
                table(*(layer.data_ptr() for layer in values)),
            )
        return ctypes.addressof(self._pool[2]), ctypes.addressof(self._pool[3])

    def _operand(self, columns: Columns) -> _Operand:
        buffer = columns.buffer
        return _Operand(self._places[buffer], columns.offset, buffer.width)

    def _op(self, op: Operation) -> _Op:
        operands = [self._operand(columns) for columns in op.inputs]
        a, b, c = (*operands, *[_NOWHERE] * (3 - len(operands)))
        return _Op(
            kind=op.kind,
            kept=op.output.buffer.kept,
            a=a, b=b, c=c, to=self._operand(op.output),
            count=op.inputs[0].count if op.kind is Kind.ATTEND else op.output.count,
            size=op.output.size,
            inner=op.inputs[0].width if op.inputs else 0,
            weight=_address(op.weight),
            bias=_address(op.bias),
            int8=op.int8,
            flag=op.flag,
            layer=op.layer,
            kv_heads=op.inputs[1].count if op.kind is Kind.ATTEND else 0,
            window=op.window,
            first=op.numbers[0], second=op.numbers[1],
        )  # fmt: skip


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _arrange(operations: Sequence[Operation], elsewhere: Buffer) -> tuple[dict[Buffer, int], int]:
    """Each buffer's place in the arena, in numbers a row, and the arena's size: buffers that are
    not needed at the same time share a place, so that what is worked on stays in the cache."""
    last: dict[Buffer, int] = {}
    for index, op in enumerate(operations):
        for buffer in (*op.reads, op.output.buffer):
            last[buffer] = index
    places: dict[Buffer, int] = {elsewhere: _LOGITS}
    live: list[tuple[int, int, Buffer]] = []  # place, end
    size = 0
    for index, op in enumerate(operations):
        buffer = op.output.buffer
        if buffer not in places:
            # Multiples of 16 numbers: a row count apart, places stay on cache lines.
            needed = -(-buffer.width // 16) * 16
            place = 0
            for begin, end, _ in sorted(live, key=lambda item: item[0]):
                if begin - place >= needed:
                    break
                place = max(place, end)
            places[buffer] = place
            live.append((place, place + needed, buffer))
            size = max(size, place + needed)
        live = [item for item in live if last[item[2]] > index]
    return places, size
