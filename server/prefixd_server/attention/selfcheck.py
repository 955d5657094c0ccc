"""Whether a backend computes on this machine what the reference does, before anything is served."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prefixd_server.attention.base import AttentionBackend, LayerOptions, SequenceSpan
from prefixd_server.attention.sdpa import SDPABackend
from prefixd_server.kv.allocator import pages_for
from prefixd_server.kv.pool import KVPool

__all__ = ["check_backend"]

_HEADS_PER_KV = 4
_TOLERANCE = 0.03
"""several times the error of bfloat16; one key too few, of a dozen, makes ten times as much"""


def check_backend(backend: Callable[[KVPool], AttentionBackend], like: KVPool) -> None:
    """Run a decode and a prompt behind one prefix, and the decode in a fixed plan, over a small
    pool of the same kind. Returns once the device has done so; raises RuntimeError for a wrong
    result, and what the backend does where it cannot run."""
    size, (num_kv_heads, head_dim) = like.page_size, like.keys[0].shape[1:]
    counts = [pages_for(tokens, size) for tokens in (7, 6, 3)]
    pool = KVPool(
        num_layers=1,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_pages=sum(counts),
        page_size=size,
        dtype=like.dtype,
        device=like.device,
    )
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(pool.device, pool.dtype)

    for tensor in (*pool.keys, *pool.values):
        tensor.copy_(noise(*tensor.shape))
    pages = iter(reversed(range(pool.num_pages)))
    prefix, first, second = ([next(pages) for _ in range(count)] for count in counts)
    spans = [SequenceSpan(1, 5, first, prefix, 7), SequenceSpan(3, 0, second, prefix, 7)]
    query, key, value = (noise(4, n * num_kv_heads, head_dim) for n in (_HEADS_PER_KV, 1, 1))
    options = LayerOptions(head_dim**-0.5)
    wanted = SDPABackend(pool).plan(spans).attend(0, query, key, value, options)
    checked = backend(pool)
    _compare(checked.plan(spans).attend(0, query, key, value, options), wanted)
    fixed = checked.decode_plan(2, grouped=True)
    if fixed is not None:
        fixed.fill(spans[:1])
        found = fixed.attend(0, query[:2], key[:2], value[:2], options)
        _compare(found[:1], wanted[:1])


def _compare(found: Tensor, wanted: Tensor) -> None:
    error = float((found - wanted).float().norm() / wanted.float().norm())
    # A NaN is wrong too.
    if not error < _TOLERANCE:
        raise RuntimeError(f"attention is wrong on this device: relative error {error:.2g}")
