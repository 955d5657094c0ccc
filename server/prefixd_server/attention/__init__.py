"""Attention over paged KV behind one small interface; torch SDPA is the reference."""

from __future__ import annotations

import torch

from prefixd_server.attention.base import (
    AttentionBackend,
    CrossSpan,
    LayerOptions,
    SequenceSpan,
    StepPlan,
)
from prefixd_server.kv.pool import KVPool
from prefixd_server.native import kernels

__all__ = [
    "AttentionBackend",
    "CrossSpan",
    "LayerOptions",
    "SequenceSpan",
    "StepPlan",
    "create_backend",
]


def create_backend(name: str, pool: KVPool) -> AttentionBackend:
    """``name``: paged, sdpa, or auto for the fastest that serves the pool. Raises ValueError.

    Backends are imported when chosen, so that one's dependencies are nobody else's.
    """
    if name == "auto":
        name = _fastest(pool)
    if name == "sdpa":
        from prefixd_server.attention.sdpa import SDPABackend

        return SDPABackend(pool)
    if name == "paged":
        from prefixd_server.attention.paged import PagedBackend

        return PagedBackend(pool)
    raise ValueError(f"unknown attention backend {name!r}; known: auto, paged, sdpa")


def _fastest(pool: KVPool) -> str:
    kernels_serve = pool.device.type == "cpu" and pool.dtype == torch.float32
    return "paged" if kernels_serve and kernels.load() is not None else "sdpa"
