"""The tensors of the KV cache. Only this file and the attention backends touch them.

A layer's keys are one tensor [num_slots, H_kv, D], its values another; slot = page * page_size +
offset. Keys are stored as attention sees them, after RoPE, and never rotated again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prefixd_server.kv.transfer import copy_rows_aside, to_device

__all__ = ["TORCH_DTYPES", "KVPool", "slots_of"]

TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_CLEARED_AT_ONCE = 16 << 20
"""bytes"""


def slots_of(pages: Sequence[int], num_tokens: int, page_size: int) -> npt.NDArray[np.int64]:
    """The slots of tokens 0 … num_tokens-1 of a page list; int64 [num_tokens]."""
    first = np.asarray(pages, dtype=np.int64) * page_size
    return (first[:, None] + np.arange(page_size)).reshape(-1)[:num_tokens]


class KVPool:
    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.dtype = dtype
        self.device = device
        # All layers in one tensor, so that a page of a prefix is one strided copy.
        shape = (num_layers, num_pages * page_size, num_kv_heads, head_dim)
        self._keys, self._values = _zeros(shape, dtype, device), _zeros(shape, dtype, device)
        self.keys = list(self._keys)
        self.values = list(self._values)
        self._aside: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def num_bytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    @staticmethod
    def bytes_per_page(
        num_layers: int, num_kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype
    ) -> int:
        return 2 * num_layers * num_kv_heads * head_dim * page_size * dtype.itemsize

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store one layer of new tokens; slots [T] int64, key and value [T, H_kv, D]."""
        self.keys[layer].index_copy_(0, slots, key)
        self.values[layer].index_copy_(0, slots, value)

    def write_prefix(
        self,
        pages: Sequence[int],
        key: npt.NDArray[np.generic],
        value: npt.NDArray[np.generic],
        dtype: str,
    ) -> None:
        """Copy a prefix, key and value [L, H_kv, P, D], into pages that nobody reads yet.

        Where the pool has more than L layers (an encoder of fewer layers than the decoder), the
        others are left alone.

        ``dtype`` names the arrays' type (bfloat16 comes as uint16 bit patterns). Safe on any
        thread: the pages were reserved for this copy, and it is complete when the call returns.
        """
        slots = torch.from_numpy(slots_of(pages, key.shape[2], self.page_size))
        for pool, array in ((self._keys, key), (self._values, value)):
            if self._aside is None:
                self._write_pages(pool, pages, _converted(array, dtype, self.dtype))
            else:
                source = _as_tensor(array, dtype)
                copy_rows_aside(source, pool[: len(source)], slots, self._aside)

    def _write_pages(self, pool: Tensor, pages: Sequence[int], source: Tensor) -> None:
        """In numpy, which lets go of the interpreter's lock as torch does and, unlike torch, starts
        no threads that take the cores from the engine's."""
        rows = _bits(source).swapaxes(1, 2)  # [L, P, H_kv, D]
        target = _bits(pool)
        for page, start in zip(pages, range(0, rows.shape[1], self.page_size), strict=True):
            part = rows[:, start : start + self.page_size]
            slot = page * self.page_size
            target[: len(rows), slot : slot + part.shape[1]] = part

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages in all layers, each (from, to); no page is in both places."""
        within = torch.arange(self.page_size)
        source, target = (
            to_device(
                (torch.tensor(pages)[:, None] * self.page_size + within).view(-1), self.device
            )
            for pages in zip(*copies, strict=True)
        )
        for layer in (*self.keys, *self.values):
            layer.index_copy_(0, target, layer.index_select(0, source))

    def read(self, pages: Sequence[int], num_tokens: int) -> tuple[Tensor, Tensor]:
        """The stored keys and values of a page list on the host, each [L, H_kv, num_tokens, D]."""
        slots = torch.from_numpy(slots_of(pages, num_tokens, self.page_size)).to(self.device)
        key, value = (
            torch.stack([layer.index_select(0, slots).transpose(0, 1) for layer in pool]).cpu()
            for pool in (self.keys, self.values)
        )
        return key.contiguous(), value.contiguous()


def _bits(tensor: Tensor) -> npt.NDArray[np.generic]:
    """The tensor's memory as integers: numpy has no bfloat16."""
    integer = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    array: npt.NDArray[np.generic] = tensor.view(integer).numpy()
    return array


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Memory that the system finds only when a step first writes to it stops that step, for longer
    # than it computes, or is not there at all. torch would start a team of threads for this.
    array = np.empty(math.prod(shape) * dtype.itemsize, dtype=np.uint8)

    def clear(start: int) -> None:
        array[start : start + _CLEARED_AT_ONCE] = 0

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(clear, range(0, array.size, _CLEARED_AT_ONCE)))
    return torch.from_numpy(array).view(dtype).view(shape)


def _converted(array: npt.NDArray[np.generic], dtype: str, to: torch.dtype) -> Tensor:
    """On this thread alone: torch converts large tensors with a team of threads."""
    if to is torch.float32 and dtype == "float16":
        return torch.from_numpy(array.astype(np.float32))
    if to is torch.float32 and dtype == "bfloat16":
        return torch.from_numpy((array.astype(np.uint32) << 16).view(np.float32))
    return _as_tensor(array, dtype).to(to)


def _as_tensor(array: npt.NDArray[np.generic], dtype: str) -> Tensor:
    torch_dtype = TORCH_DTYPES[dtype]
    if torch_dtype is torch.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
