"""Host to device without waiting: pinned staging, and a side stream for prefixes.

A copy from pageable memory makes the host wait for all that the stream was given before. From
pinned memory it is queued like a kernel. torch's pinned allocator notes which copies read a block
and hands it out again only after them, so a staging tensor may be dropped at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["copy_rows_aside", "stage", "to_device"]

_COPIED_AT_ONCE = 64 << 20
"""bytes of a prefix in pinned memory and in passing on the device: most come in one copy"""


def stage(values: Sequence[int] | npt.NDArray[np.generic] | Tensor, device: torch.device) -> Tensor:
    """``values`` in host memory that ``device`` can read by itself; integers become int64."""
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(_as_array(values))
    return tensor.pin_memory() if device.type == "cuda" and tensor.numel() else tensor


def to_device(
    values: Sequence[int] | npt.NDArray[np.generic] | Tensor, device: torch.device
) -> Tensor:
    """``values`` on ``device``, queued on its current stream; integers become int64."""
    return stage(values, device).to(device, non_blocking=True)


def copy_rows_aside(
    source: Tensor, target: Tensor, slots: Tensor, stream: torch.cuda.Stream
) -> None:
    """Write source [L, H_kv, P, D], on the host, to ``slots`` [P] of target [L, slots, H_kv, D].

    Runs on ``stream``, so the steps of the engine go on beside it, but after all that the engine
    has queued by now: a step that still runs may use pages that were given back to be used here.
    Only the calling thread waits. Nothing is left on its way when the call ends, not even by an
    error: the slots may then be another's at once.
    """
    device = target.device
    layers = max(1, _COPIED_AT_ONCE // max(1, source[0].nbytes))
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        try:
            index = to_device(slots, device)
            for first in range(0, len(source), layers):
                part = source[first : first + layers].contiguous()
                rows = to_device(part, device).to(target.dtype).transpose(1, 2)
                target[first : first + layers].index_copy_(1, index, rows)
        finally:
            done.record(stream)
            done.synchronize()


def _as_array(values: Sequence[int] | npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    return values if isinstance(values, np.ndarray) else np.asarray(values, dtype=np.int64)
