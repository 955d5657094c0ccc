"""The compiled kernels as functions of float32 CPU tensors; :func:`load` is None without them."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prefixd_server.native.binding import bind
from prefixd_server.native.build import CannotBuild, default_folder, library
from prefixd_server.native.gemm import Gemm

__all__ = ["AttentionParts", "Kernels", "Peaks", "load"]

log = logging.getLogger(__name__)


class Peaks(NamedTuple):
    at: npt.NDArray[np.int64]
    """[B] the index of the first largest"""
    largest: npt.NDArray[np.float32]
    """[B]"""
    log_sums: npt.NDArray[np.float32]
    """[B] of the exponentials; NaN where one is NaN or +inf, or all are -inf"""


class AttentionParts:
    """What a step's queries attend to: ranges of page lists, each against some of the queries."""

    def __init__(
        self,
        parts: Sequence[int],
        pages: Sequence[int],
        rows: Sequence[int],
        query_index: Sequence[int],
        page_size: int,
    ) -> None:
        """``parts``, seven numbers each: first and end row (in ``rows``); where the prefix's page
        list begins (in ``pages``) and its tokens; where the own page list begins; first and end key
        by their index in the joint sequence. ``rows``: the packed token of each row.
        ``query_index`` [T]: each token's index in the joint sequence; it sees the keys up to there.
        """
        tokens = len(query_index)
        token_first, token_rows = _rows_of_tokens(rows, tokens)
        lists = (parts, pages, rows, query_index, token_first, token_rows)
        # One array, as each costs more to make than what is in it.
        self._numbers = np.array([number for each in lists for number in each], dtype=np.int32)
        self._num_rows = len(rows)
        self._workspace: Tensor | None = None
        address = self._numbers.ctypes.data
        at = [address + 4 * end for end in accumulate(map(len, lists), initial=0)]
        self.addresses = (
            at[0], len(parts) // 7, at[1], at[2], at[3], page_size, at[4], at[5], tokens,
        )  # fmt: skip

    def workspace(self, heads: int, dim: int) -> int:
        """The address of room for each row's maximum, sum and value."""
        if self._workspace is None or self._workspace.shape[1:] != (heads, dim + 2):
            self._workspace = torch.empty(self._num_rows, heads, dim + 2)
        return self._workspace.data_ptr()


def _rows_of_tokens(rows: Sequence[int], tokens: int) -> tuple[Sequence[int], Sequence[int]]:
    """The rows of packed token t: ``second[first[t] : first[t + 1]]``."""
    if len(rows) == tokens:  # each token has one, in order
        return range(tokens + 1), rows
    first = np.zeros(tokens + 1, dtype=np.int32)
    np.cumsum(np.bincount(rows, minlength=tokens), out=first[1:])
    return first.tolist(), np.argsort(rows, kind="stable").tolist()


@cache
def load() -> Kernels | None:
    """The kernels, compiled if need be; None, with a warning, where that cannot be done."""
    try:
        path = library(default_folder())
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError as error:
            # Cut short by a full disk, say. Whoever has it loaded keeps the file that it had.
            log.warning("compiling a library again that does not load: %s", error)
            path.unlink()
            library.cache_clear()
            loaded = ctypes.CDLL(str(library(default_folder())))
        return Kernels(loaded)
    except (CannotBuild, OSError, AttributeError) as error:
        log.warning("no CPU kernels, serving with torch's own operators: %s", error)
        return None


class Kernels:
    """Calls release the GIL and run in torch's own OpenMP threads, as many as torch is set to."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        # torch has loaded its libgomp before us, under the same name, so there is one thread pool.
        self.gemm = Gemm(library)
        tensor = c_void_p
        self._store = bind(
            self.function("store"),
            [
                tensor, c_int64, c_int64, tensor, c_int64, c_int64, tensor, c_int64,
                c_int32, c_int32, tensor, tensor,
            ],
        )  # fmt: skip
        self._attend = bind(
            self.function("attend"),
            [
                tensor, c_int64, c_int64, tensor, tensor, c_int32, c_int32, c_int32,
                c_float, c_float, c_int32, tensor, c_int32, tensor, tensor, tensor, c_int32,
                tensor, tensor, c_int64, tensor, tensor,
            ],
        )  # fmt: skip
        self._rms_norm = bind(
            self.function("rms_norm"),
            [tensor, tensor, c_float, c_float, c_int64, c_int64, tensor],
        )

        self._rotate = bind(
            self.function("rotate"),
            [tensor, c_int64, c_int64, tensor, tensor, c_int64, c_int64, c_int64, tensor],
        )
        self._activate = bind(
            self.function("activate"),
            [tensor, c_int64, c_float, c_float, c_int64, c_int64, tensor],
        )
        self._peaks = bind(self.function("peaks"), [tensor, c_int64, c_int64, *[tensor] * 3])

    def function(self, name: str) -> Any:
        """For the instruction set that the products use."""
        return getattr(self.library, f"prefixd_{name}_{self.gemm.isa}")

    def store(self, key: Tensor, value: Tensor, slots: int, keys: Tensor, values: Tensor) -> None:
        """Write key and value [T, H_kv, D] to their slots of [num_slots, H_kv, D]; ``slots`` is the
        address of T int64."""
        tokens, heads, dim = key.shape
        self._store(
            key.data_ptr(), key.stride(0), key.stride(1),
            value.data_ptr(), value.stride(0), value.stride(1),
            slots, tokens, heads, dim, keys.data_ptr(), values.data_ptr(),
        )  # fmt: skip

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        parts: AttentionParts,
        *,
        scaling: float,
        softcap: float | None,
        window: int | None,
    ) -> Tensor:
        """query [T, H, D], the last dimension contiguous; keys, values [num_slots, H_kv, D] ->
        [T, H, D]"""
        tokens, heads, dim = query.shape
        output = torch.empty(tokens, heads, dim)
        self._attend(
            query.data_ptr(), query.stride(0), query.stride(1), keys.data_ptr(), values.data_ptr(),
            heads, keys.shape[1], dim, scaling, softcap or 0.0, window or 0,
            *parts.addresses, parts.workspace(heads, dim), output.data_ptr(),
        )  # fmt: skip
        return output

    def rotate(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """x [1, H, T, D] turned by cosine and sine [1, T, D], contiguous: x * cosine +
        rotate_half(x) * sine, as Llama's ``apply_rotary_pos_emb`` computes it."""
        _, heads, tokens, dim = x.shape
        output = torch.empty(1, tokens, heads, dim)
        self._rotate(
            x.data_ptr(), x.stride(2), x.stride(1), cosine.data_ptr(), sine.data_ptr(),
            tokens, heads, dim, output.data_ptr(),
        )  # fmt: skip
        return output.transpose(1, 2)

    def activate(self, x: Tensor, slope: float, cubic: float) -> Tensor:
        """x * sigmoid(slope * (x + cubic * x**3)) of x [..., C], whose rows are evenly apart."""
        size = x.shape[-1]
        rows = x.numel() // size
        stride = x.stride(-2) if x.dim() > 1 else size
        output = torch.empty(x.shape)
        self._activate(x.data_ptr(), stride, slope, cubic, rows, size, output.data_ptr())
        return output

    def peaks(self, logits: Tensor) -> Peaks:
        """Of each row of logits [B, V], contiguous."""
        rows, size = logits.shape
        at, numbers = np.empty(rows, np.int64), np.empty((2, rows), np.float32)
        largest = numbers.ctypes.data
        log_sums = largest + numbers.strides[0]
        self._peaks(logits.data_ptr(), rows, size, at.ctypes.data, largest, log_sums)
        return Peaks(at, *numbers)

    def rms_norm(self, x: Tensor, weight: Tensor, plus: float, epsilon: float) -> Tensor:
        """x [..., C], contiguous; weight [C]."""
        output = torch.empty_like(x)
        size = weight.shape[0]
        self._rms_norm(
            x.data_ptr(), weight.data_ptr(), plus, epsilon, x.numel() // size, size,
            output.data_ptr(),
        )  # fmt: skip
        return output
