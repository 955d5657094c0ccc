"""The tensors of the KV cache. Only this file and the attention backends touch them.

A layer's keys are one tensor [num_slots, H_kv, D], its values another; slot = page * page_size +
offset. Keys are stored as attention sees them, after RoPE, and never rotated again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prefixd_server.kv.transfer import copy_rows_aside

__all__ = ["TORCH_DTYPES", "KVPool", "slots_of"]

TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


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
        shape = (num_pages * page_size, num_kv_heads, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self._aside: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

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
        num_tokens = key.shape[2]
        slots = torch.from_numpy(slots_of(pages, num_tokens, self.page_size))
        for pool, array in ((self.keys, key), (self.values, value)):
            source = list(_as_tensor(array, dtype))
            targets = pool[: len(source)]
            if self._aside is not None:
                copy_rows_aside(source, targets, slots, self._aside)
                continue
            for layer, target in zip(source, targets, strict=True):
                target.index_copy_(0, slots, layer.to(self.dtype).transpose(0, 1))  # [P, H_kv, D]

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages in all layers, each (from, to); no page is in both places."""
        within = torch.arange(self.page_size)
        source, target = (
            (torch.tensor(pages)[:, None] * self.page_size + within).view(-1).to(self.device)
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


def _as_tensor(array: npt.NDArray[np.generic], dtype: str) -> Tensor:
    torch_dtype = TORCH_DTYPES[dtype]
    if torch_dtype is torch.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
