"""Products with frozen weights, in float32 or int8, which are packed once for this CPU."""

from __future__ import annotations

import ctypes
import mmap
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from prefixd_server.native.binding import bind

__all__ = ["GROUP", "Gemm", "PackedWeight"]

GROUP = 64
"""weights in int8 of an output, one after another, that share a scale; as in gemm_tile.h"""

_LINE = 16
"""words of a cache line, which begins each packed weight"""
_CHUNK = 16 * 2**20
"""words that are asked of the system at once"""


class PackedWeight(NamedTuple):
    data: Tensor
    """[N] words of 4 bytes; the layout is the CPU's own"""
    out_features: int
    in_features: int
    int8: bool = False
    """else float32"""


class Gemm:
    """Each output is the same to the bit whatever the number of rows and of threads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        tensor = c_void_p
        self._packed_size = bind(library.prefixd_packed_size, [c_int64, c_int64, c_int32], c_int64)
        self._pack = bind(library.prefixd_pack, [tensor, c_int64, c_int64, c_int64, tensor])
        self._pack_int8 = bind(
            library.prefixd_pack_int8, [tensor, c_int64, tensor, c_int64, c_int64, tensor]
        )
        self._gemm = bind(
            library.prefixd_gemm,
            [
                tensor, c_int64, tensor, c_int32, tensor, c_int64, c_int64, c_int64, tensor,
                c_int64, c_int32,
            ],
        )  # fmt: skip
        self.isa: str = bind(library.prefixd_gemm_isa, [], c_char_p)().decode()
        """avx512, avx2 or generic, which is correct and slow; PREFIXD_NATIVE_ISA sets a limit"""
        self._room = torch.empty(0)

    def pack(self, weight: Tensor) -> PackedWeight:
        """weight [out, in], its rows contiguous."""
        out_features, in_features = weight.shape
        data = self._take(self._packed_size(out_features, in_features, 0))
        self._pack(weight.data_ptr(), weight.stride(0), out_features, in_features, data.data_ptr())
        return PackedWeight(data, out_features, in_features)

    def pack_int8(self, weight: Tensor, scales: Tensor) -> PackedWeight:
        """weight [out, in] in int8, its rows contiguous; scales [out, ceil(in / GROUP)], which
        its numbers are multiplied by, contiguous. The product is that with these in float32."""
        out_features, in_features = weight.shape
        assert scales.is_contiguous()
        assert scales.shape == (out_features, -(-in_features // GROUP))
        data = self._take(self._packed_size(out_features, in_features, 1))
        self._pack_int8(
            weight.data_ptr(), weight.stride(0), scales.data_ptr(), out_features, in_features,
            data.data_ptr(),
        )  # fmt: skip
        return PackedWeight(data, out_features, in_features, int8=True)

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """x [..., in], bias [out] -> [..., out]"""
        rows = x.reshape(-1, weight.in_features)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        output = torch.empty(*x.shape[:-1], weight.out_features)
        self._call(rows, weight, bias, output, weight.out_features, 0)
        return output

    def add_linear(
        self, x: Tensor, weight: PackedWeight, bias: Tensor | None, output: Tensor
    ) -> None:
        """Add the product of x [M, in] to output [M, out]; their rows are contiguous."""
        self._call(x, weight, bias, output, output.stride(0), 1)

    def _call(
        self,
        x: Tensor,
        weight: PackedWeight,
        bias: Tensor | None,
        output: Tensor,
        stride: int,
        add: int,
    ) -> None:
        data, out_features, in_features, int8 = weight
        self._gemm(
            x.data_ptr(), x.stride(0), data.data_ptr(), int8,
            None if bias is None else bias.data_ptr(), x.shape[0], out_features, in_features,
            output.data_ptr(), stride, add,
        )  # fmt: skip

    def _take(self, size: int) -> Tensor:
        """[size] words, zeros, in huge pages, which spares a tenth of the time of a pass."""
        size = -(-size // _LINE) * _LINE
        if size > len(self._room):
            pages = mmap.mmap(
                -1, 4 * max(size, _CHUNK), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )
            if hasattr(mmap, "MADV_HUGEPAGE"):
                pages.madvise(mmap.MADV_HUGEPAGE)
            self._room = torch.frombuffer(pages, dtype=torch.float32)
        taken, self._room = self._room[:size], self._room[size:]
        return taken
