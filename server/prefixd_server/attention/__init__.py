"""Attention over paged KV behind one small interface; torch SDPA is the reference."""

from __future__ import annotations

from prefixd_server.attention.base import (
    AttentionBackend,
    CrossSpan,
    DecodePlan,
    LayerOptions,
    SequenceSpan,
    StepPlan,
)
from prefixd_server.kv.pool import KVPool

__all__ = [
    "AttentionBackend",
    "CrossSpan",
    "DecodePlan",
    "LayerOptions",
    "SequenceSpan",
    "StepPlan",
    "create_backend",
]


def create_backend(name: str, pool: KVPool) -> AttentionBackend:
    """Backends are imported when chosen, so that one's dependencies are nobody else's.

    Raises ValueError if there is none of the name, or it cannot serve the pool.
    """
    if name == "sdpa":
        from prefixd_server.attention.sdpa import SDPABackend

        return SDPABackend(pool)
    if name == "native":
        from prefixd_server.attention.native import NativeBackend

        return NativeBackend(pool)
    if name == "triton":
        from prefixd_server.attention.triton_paged import TritonBackend

        return TritonBackend(pool)
    raise ValueError(f"unknown attention backend {name!r}; known: native, sdpa, triton")
