"""Attention of encoder-decoders against dense attention in float64, one query at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prefixd_server.attention import CrossSpan, LayerOptions, SequenceSpan, create_backend
from prefixd_server.attention.seq2seq import EncoderPlan, EncoderRow
from prefixd_server.kv.allocator import pages_for
from prefixd_server.kv.pool import KVPool, slots_of
from tests.support.threads import one_thread

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

HEADS, DIM, LAYER = 3, 4, 1
SCALING = 0.7


class Bias:
    """Another number for each distance and head; not symmetric, as T5's is not."""

    def __call__(self, relative: Tensor) -> Tensor:
        return torch.stack([torch.sin(relative * (h + 1.0) + h) for h in range(HEADS)], -1)


BIAS = Bias()
biases = st.sampled_from([None, BIAS])
lengths = st.lists(
    st.tuples(st.sampled_from([0, 1, 5, 11]), st.integers(1, 9)), min_size=1, max_size=4
)
"""of each sequence: virtual tokens, own tokens"""
NUM_PAGES = 4 * (11 + 9 + 3)
"""room for the longest of them and their queries, a token a page"""


class Memory:
    """A pool in which all is NaN but what a test writes, and pages in random order."""

    def __init__(self, page_size: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.pool = KVPool(
            num_layers=2,
            num_kv_heads=HEADS,
            head_dim=DIM,
            num_pages=NUM_PAGES,
            page_size=page_size,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        for tensor in self.pool.keys + self.pool.values:
            tensor.fill_(math.nan)
        self._free = torch.randperm(NUM_PAGES, generator=self.generator).tolist()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def pages(self, num_tokens: int) -> list[int]:
        return [self._free.pop() for _ in range(pages_for(num_tokens, self.pool.page_size))]

    def stored(self, num_tokens: int) -> tuple[list[int], Tensor, Tensor]:
        """Pages with noise in them, and the noise: keys and values [num_tokens, H, D]."""
        pages = self.pages(num_tokens)
        key, value = self.normal(2, num_tokens, HEADS, DIM)
        slots = torch.from_numpy(slots_of(pages, num_tokens, self.pool.page_size))
        self.pool.write(LAYER, slots, key, value)
        return pages, key, value


def dense(
    query: Tensor, key: Tensor, value: Tensor, relative: Tensor | None, bias: Bias | None
) -> Tensor:
    """query [H, D], key and value [K, H, D], relative [K] -> [H, D]"""
    scores = torch.einsum("hd,khd->hk", query.double(), key.double()) * SCALING
    if bias is not None and relative is not None:
        scores += bias(relative).T
    return torch.einsum("hk,khd->hd", scores.softmax(-1), value.double()).float()


def options(bias: Bias | None) -> LayerOptions:
    return LayerOptions(scaling=SCALING, relative_bias=bias)


@settings(max_examples=40, deadline=None)
@given(
    rows=lengths, offset=st.booleans(), bias=biases, seed=st.integers(0, 99), size=st.integers(1, 6)
)
def test_encoder_rows_see_their_prefix_and_their_text(
    rows: list[tuple[int, int]], offset: bool, bias: Bias | None, seed: int, size: int
) -> None:
    memory = Memory(size, seed)
    prefixes = [memory.stored(prefix) for prefix, _ in rows]
    longest = max(tokens for _, tokens in rows)
    query, key, value = memory.normal(3, len(rows), HEADS, longest, DIM)
    plan = EncoderPlan(
        memory.pool,
        [
            EncoderRow(tokens, pages, prefix, position_offset=prefix if offset else 0)
            for (prefix, tokens), (pages, *_) in zip(rows, prefixes, strict=True)
        ],
    )
    output = plan.attend(LAYER, query, key, value, options(bias))
    assert output.shape == (len(rows), longest, HEADS, DIM)
    for b, (prefix, tokens) in enumerate(rows):
        _, prefix_key, prefix_value = prefixes[b]
        keys = torch.cat([prefix_key, key[b, :, :tokens].transpose(0, 1)])
        values = torch.cat([prefix_value, value[b, :, :tokens].transpose(0, 1)])
        for i in range(tokens):
            position = i + (prefix if offset else 0)
            expected = dense(query[b, :, i], keys, values, torch.arange(len(keys)) - position, bias)
            torch.testing.assert_close(output[b, i], expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    rows=lengths,
    queries=st.lists(st.sampled_from([1, 1, 1, 3]), min_size=4, max_size=4),
    new=st.lists(st.booleans(), min_size=4, max_size=4),
    seed=st.integers(0, 99),
    size=st.integers(1, 6),
)
def test_cross_attention_sees_the_whole_text_stored_now_or_before(
    rows: list[tuple[int, int]], queries: list[int], new: list[bool], seed: int, size: int
) -> None:
    memory = Memory(size, seed)
    prefixes = [memory.stored(prefix) for prefix, _ in rows]
    texts, arriving = [], []
    for (_, tokens), is_new in zip(rows, new, strict=False):
        if is_new:
            texts.append((memory.pages(tokens), *memory.normal(2, tokens, HEADS, DIM)))
            arriving.append(texts[-1][1:])
        else:
            texts.append(memory.stored(tokens))
    spans = [
        CrossSpan(queries[i], tokens, texts[i][0], new[i], prefixes[i][0], prefix)
        for i, (prefix, tokens) in enumerate(rows)
    ]
    query = memory.normal(sum(span.query_len for span in spans), HEADS, DIM)
    nothing = torch.empty(0, HEADS, DIM)
    key = torch.cat([nothing, *(text_key for text_key, _ in arriving)])
    value = torch.cat([nothing, *(text_value for _, text_value in arriving)])
    plan = create_backend("sdpa", memory.pool).plan(spans)
    output = plan.attend(LAYER, query, key, value, options(None))
    row = 0
    for span, prefix, text in zip(spans, prefixes, texts, strict=True):
        keys, values = torch.cat([prefix[1], text[1]]), torch.cat([prefix[2], text[2]])
        for _ in range(span.query_len):
            torch.testing.assert_close(
                output[row], dense(query[row], keys, values, None, None), atol=1e-5, rtol=1e-5
            )
            row += 1
    assert row == len(output)


@settings(max_examples=40, deadline=None)
@given(
    rows=lengths,
    queries=st.lists(st.sampled_from([1, 1, 1, 3]), min_size=4, max_size=4),
    offset=st.booleans(),
    seed=st.integers(0, 99),
    size=st.integers(1, 6),
)
def test_decoders_with_a_relative_bias(
    rows: list[tuple[int, int]], queries: list[int], offset: bool, seed: int, size: int
) -> None:
    """``rows`` have so many tokens cached, and get ``queries`` new ones."""
    memory = Memory(size, seed)
    spans: list[SequenceSpan] = []
    joint: list[tuple[Tensor, Tensor]] = []
    fresh: list[tuple[Tensor, Tensor]] = []
    for (prefix, cached), count in zip(rows, queries, strict=False):
        prefix_pages, prefix_key, prefix_value = memory.stored(prefix)
        pages = memory.pages(cached + count)
        key, value = memory.normal(2, cached + count, HEADS, DIM)
        slots = slots_of(pages, cached, size)
        memory.pool.write(LAYER, torch.from_numpy(slots), key[:cached], value[:cached])
        fresh.append((key[cached:], value[cached:]))
        joint.append((torch.cat([prefix_key, key]), torch.cat([prefix_value, value])))
        spans.append(
            SequenceSpan(
                count, cached, pages, prefix_pages, prefix, position_offset=prefix * offset
            )
        )
    query = memory.normal(sum(span.query_len for span in spans), HEADS, DIM)
    plan = create_backend("sdpa", memory.pool).plan(spans)
    key, value = (torch.cat(parts) for parts in zip(*fresh, strict=True))
    output = plan.attend(LAYER, query, key, value, options(BIAS))
    row = 0
    for span, (keys, values) in zip(spans, joint, strict=True):
        for i in range(span.query_len):
            seen = span.prefix_len + span.context_len + i + 1
            relative = torch.arange(seen) - (span.position_offset + span.context_len + i)
            torch.testing.assert_close(
                output[row],
                dense(query[row], keys[:seen], values[:seen], relative, BIAS),
                atol=1e-5,
                rtol=1e-5,
            )
            row += 1


def test_a_row_with_nan_spoils_no_other() -> None:
    memory = Memory(4, seed=0)
    pages, *_ = memory.stored(5)
    rows: Sequence[EncoderRow] = [
        EncoderRow(3, pages, 5),
        EncoderRow(6),
        EncoderRow(2, [NUM_PAGES - 1], 2),
    ]
    query, key, value = memory.normal(3, 3, HEADS, 6, DIM)
    memory.pool.keys[LAYER][-4:] = math.nan
    output = EncoderPlan(memory.pool, rows).attend(LAYER, query, key, value, options(BIAS))
    assert output[2, :2].isnan().all()
    assert not output[0, :3].isnan().any()
    assert not output[1].isnan().any()
