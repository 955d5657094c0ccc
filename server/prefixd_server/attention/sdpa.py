"""The reference backend: torch's scaled_dot_product_attention over gathered pages.

Every faster backend is tested against this one. Decodes of similar length share one padded call;
each prefill chunk is a call of its own. Query heads that share a KV head (grouped-query attention)
are laid out as extra queries of that head, so keys are never repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prefixd_server.attention.base import (
    AttentionBackend,
    LayerOptions,
    RelativeBias,
    SequenceSpan,
    Span,
    StepPlan,
)
from prefixd_server.kv.pool import KVPool, slots_of

__all__ = ["SDPABackend"]


class SDPABackend(AttentionBackend):
    def plan(self, spans: Sequence[Span]) -> StepPlan:
        return _SDPAPlan(self.pool, spans)


class _Group:
    """Sequences that are attended together: N sequences of Q new tokens each, keys padded to S."""

    def __init__(self, pool: KVPool, spans: Sequence[Span], rows: Tensor) -> None:
        self.rows = rows  # [N, Q] which packed tokens these are
        self.num_queries = spans[0].query_len
        lengths = [span.prefix_len + span.num_keys for span in spans]
        slots = np.zeros((len(spans), max(lengths)), dtype=np.int64)
        for row, span in enumerate(spans):
            own = span.num_keys
            slots[row, : span.prefix_len] = slots_of(
                span.prefix_pages, span.prefix_len, pool.page_size
            )
            slots[row, span.prefix_len : span.prefix_len + own] = slots_of(
                span.pages, own, pool.page_size
            )
            # Padding is masked, but 0 * NaN is NaN: pad with the sequence's own newest token, or a
            # broken sequence's KV would spoil the others.
            slots[row, span.prefix_len + own :] = slots[row, span.prefix_len + own - 1]
        self.slots = torch.from_numpy(slots).to(pool.device)  # [N, S]
        # The last query sees all of its sequence; query j of Q stands Q-1-j before it. In
        # cross-attention all queries see all of it.
        last = torch.tensor(lengths).view(-1, 1) - 1
        before = torch.arange(self.num_queries - 1, -1, -1)
        self.query_index = (  # [N, Q] index in the joint sequence
            last - (before if isinstance(spans[0], SequenceSpan) else torch.zeros_like(before))
        ).to(pool.device)
        self.key_index = torch.arange(slots.shape[1], device=pool.device)  # [S]
        self._shifts = [  # from a query's index to its position
            span.position_offset - span.prefix_len if isinstance(span, SequenceSpan) else 0
            for span in spans
        ]
        self._masks: dict[int | None, Tensor | None] = {}
        self._biases: dict[RelativeBias, Tensor] = {}

    def mask(self, window: int | None, heads_per_kv: int) -> Tensor | None:
        """Additive-free boolean mask [N, 1, heads_per_kv * Q, S]; None if all may be seen."""
        if window not in self._masks:
            query, key = self.query_index[:, :, None], self.key_index
            seen = key <= query
            if window is not None:
                seen &= key > query - window
            repeated = seen[:, None].repeat(1, 1, heads_per_kv, 1)
            self._masks[window] = None if bool(seen.all()) else repeated
        return self._masks[window]

    def bias(self, relative: RelativeBias, heads_per_kv: int) -> Tensor:
        """The mask and the relative bias as one additive mask [N, H_kv, heads_per_kv * Q, S]."""
        if relative not in self._biases:
            shift = torch.tensor(self._shifts, device=self.key_index.device).view(-1, 1)
            position = (self.query_index + shift)[:, :, None]  # [N, Q, 1]
            values = relative(self.key_index - position).permute(0, 3, 1, 2)  # [N, H, Q, S]
            num_seqs, _, num_queries, num_keys = values.shape
            values = values.reshape(num_seqs, -1, heads_per_kv * num_queries, num_keys)
            mask = self.mask(None, heads_per_kv)
            if mask is not None:
                values = values.masked_fill(~mask, float("-inf"))
            self._biases[relative] = values
        return self._biases[relative]


class _SDPAPlan(StepPlan):
    def __init__(self, pool: KVPool, spans: Sequence[Span]) -> None:
        self._pool = pool
        new_slots = [
            slots_of(span.pages, span.num_keys, pool.page_size)[span.first_new :] for span in spans
        ]
        self._new_slots = torch.from_numpy(np.concatenate(new_slots)).to(pool.device)  # [T]
        starts = np.cumsum([0, *(span.query_len for span in spans)])
        self._groups = [
            _Group(
                pool,
                [spans[i] for i in members],
                torch.from_numpy(
                    starts[members][:, None] + np.arange(spans[members[0]].query_len)
                ).to(pool.device),
            )
            for members in _similar(spans)
        ]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: LayerOptions
    ) -> Tensor:
        pool = self._pool
        if len(self._new_slots):  # cross-attention mostly has nothing new
            pool.write(layer, self._new_slots, key, value)
        if len(self._groups) == 1:
            # One group holds all tokens, in order.
            return _attend(self._groups[0], pool, layer, query, options).flatten(0, 1)
        head_dim = pool.values[layer].shape[2]
        output = torch.empty(*query.shape[:2], head_dim, dtype=query.dtype, device=query.device)
        for group in self._groups:
            output[group.rows] = _attend(group, pool, layer, query[group.rows], options)
        return output


def _attend(
    group: _Group, pool: KVPool, layer: int, query: Tensor, options: LayerOptions
) -> Tensor:
    """[N, Q, H, D] (or [T, H, D] with T = N * Q) -> [N, Q, H, D]"""
    num_seqs, num_keys = group.slots.shape
    num_heads, head_dim = query.shape[-2:]
    flat = group.slots.view(-1)
    keys = pool.keys[layer].index_select(0, flat).view(num_seqs, num_keys, -1, head_dim)
    values = pool.values[layer].index_select(0, flat).view(num_seqs, num_keys, -1, head_dim)
    num_kv_heads = keys.shape[2]
    heads_per_kv = num_heads // num_kv_heads
    # [N, Q, H_kv, G, D] -> [N, H_kv, G * Q, D]
    grouped = query.reshape(num_seqs, -1, num_kv_heads, heads_per_kv, head_dim)
    grouped = grouped.permute(0, 2, 3, 1, 4).flatten(2, 3)
    if options.relative_bias is not None:
        mask: Tensor | None = group.bias(options.relative_bias, heads_per_kv)
    else:
        mask = group.mask(options.sliding_window, heads_per_kv)
    attended = _sdpa(grouped, keys.transpose(1, 2), values.transpose(1, 2), mask, options)
    # [N, H_kv, G * Q, D] -> [N, Q, H, D]
    split = attended.view(num_seqs, num_kv_heads, heads_per_kv, group.num_queries, head_dim)
    return split.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: LayerOptions
) -> Tensor:
    if options.softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=options.scaling
        )
    # torch's function has no soft cap (Gemma 2): spell it out, softmax in float32 as eager does.
    scores = query @ key.transpose(2, 3) * options.scaling
    scores = torch.tanh(scores / options.softcap) * options.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value


def _similar(spans: Sequence[Span]) -> list[list[int]]:
    """Split a step into groups: each prefill chunk alone, decodes by powers of two of their length,
    so that padding at most doubles the keys that a group reads."""

    def bucket(index: int) -> int:
        span = spans[index]
        return (span.prefix_len + span.num_keys).bit_length()

    groups = [[i] for i, span in enumerate(spans) if span.query_len > 1]
    decodes = sorted((i for i, span in enumerate(spans) if span.query_len == 1), key=bucket)
    groups += [list(members) for _, members in groupby(decodes, key=bucket)]
    return groups
