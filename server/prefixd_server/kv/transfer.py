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
    sources: Sequence[Tensor], targets: Sequence[Tensor], slots: Tensor, stream: torch.cuda.Stream
) -> None:
    """Write each source [H_kv, P, D], on the host, to ``slots`` [P] of its target [slots, H_kv, D].

    Runs on ``stream``, so the steps of the engine go on beside it, but after all that the engine
    has queued by now: a step that still runs may use pages that were given back to be used here.
    Complete on return; only the calling thread waits.
    """
    device = targets[0].device
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        index = to_device(slots, device)
        for source, target in zip(sources, targets, strict=True):
            rows = to_device(source.contiguous(), device).to(target.dtype).transpose(0, 1)
            target.index_copy_(0, index, rows)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(stream)
    done.synchronize()


def _as_array(values: Sequence[int] | npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    return values if isinstance(values, np.ndarray) else np.asarray(values, dtype=np.int64)
