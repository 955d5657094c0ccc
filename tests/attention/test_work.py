"""The kernel's work, done by hand in float64: the same attention, however it is cut up."""

from __future__ import annotations

from collections.abc import Sequence
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixd_server.attention import CrossSpan, LayerOptions, SequenceSpan, work
from prefixd_server.attention.base import Span
from prefixd_server.attention.work import Shape, Work, grouping_pays, make_work, new_slots
from prefixd_server.kv.allocator import pages_for
from prefixd_server.kv.pool import slots_of
from tests.attention import work_oracle
from tests.attention.test_sdpa import LAYER, Case, Heads, Spec, Step, cases, dense, heads

Array = npt.NDArray[np.float64]


def shape_of(step: Step, min_programs: int) -> Shape:
    num_kv_heads = step.key.shape[1]
    group = step.query.shape[1] // num_kv_heads
    return Shape(step.pool.page_size, num_kv_heads, group, min_programs)


def block_slots(work: Work, block: npt.NDArray[np.int32], page_size: int) -> npt.NDArray[np.int64]:
    """The slot of each key that the block reads, as the kernel finds it."""
    _, _, prefix_table, own_table, prefix_len, begin, end, _ = block.tolist()
    key = np.arange(begin, end)
    inside = key < prefix_len
    index = np.where(inside, key, key - prefix_len)
    page = work.pages[np.where(inside, prefix_table, own_table) + index // page_size]
    return page.astype(np.int64) * page_size + index % page_size


def attend_by_hand(step: Step, work: Work, scaling: float) -> Array:
    """Every split of every block on its own, then merged by log-sum-exp; [T, H, D]."""
    query = step.query.double().numpy()
    keys, values = (pool[LAYER].double().numpy() for pool in (step.pool.keys, step.pool.values))
    num_tokens, num_heads, _ = query.shape
    group = num_heads // keys.shape[1]
    parts = np.full((work.parts, *query.shape), np.nan)
    lse = np.full((work.parts, num_tokens, num_heads), np.nan)
    for launch in work.launches:
        for block in launch.blocks:
            slots = block_slots(work, block, step.pool.page_size)
            first, count = block[:2].tolist()
            assert count * group <= launch.block_m
            for token, last in launch.queries[first : first + count].tolist():
                seen = slots[: last + 1 - block[5]]
                for split, mine in enumerate(np.array_split(seen, launch.splits)):
                    part = launch.first_part + split
                    assert np.isnan(parts[part, token]).all(), "written twice"
                    for h in range(num_heads):
                        scores = keys[mine, h // group] @ query[token, h] * scaling
                        weights = np.exp(scores)
                        with np.errstate(divide="ignore"):
                            lse[part, token, h] = np.log(weights.sum())
                        total = weights.sum() or 1.0
                        parts[part, token, h] = weights @ values[mine, h // group] / total
    merged = np.empty(query.shape)
    for token, count in enumerate(work.num_parts[:num_tokens].tolist()):
        weights = np.exp(lse[:count, token])[..., None]
        merged[token] = (parts[:count, token] * weights).sum(0) / weights.sum(0)
    return merged


def store(step: Step) -> None:
    slots = torch.from_numpy(new_slots(step.spans, step.pool.page_size)).long()
    step.pool.write(LAYER, slots, step.key, step.value)


@settings(max_examples=80, deadline=None)
@given(
    case=cases(), heads=heads, saved=st.sampled_from([1, 30, 10**9]), programs=st.integers(1, 64)
)
def test_work_is_dense_attention_cut_up(
    case: Case, heads: Heads, saved: int, programs: int
) -> None:
    step = Step(case, heads)
    store(step)
    with patch.multiple(work, _KEYS_SAVED=saved, _KEYS_PER_SPLIT=8):
        grouped = grouping_pays(step.spans)
        made = make_work(step.spans, shape_of(step, programs), grouped=grouped)
    options = LayerOptions(0.3)
    wanted = dense(step, step.pool.keys[LAYER], step.pool.values[LAYER], options)
    found = attend_by_hand(step, made, options.scaling)
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-9)


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[Span], Shape, int | None]:
    """Spans of a few prefixes, all decoders' or all cross-attention's; ``rows`` for decodes."""
    rows = draw(st.sampled_from([None, None, 32]))
    lengths = st.integers(1, 1) if rows else st.sampled_from([1, 1, 1, 2, 17, 40])
    prefixes = [(0, 0), *((100 * i, draw(st.integers(1, 30))) for i in range(1, 4))]
    cross, spans = draw(st.booleans()), list[Span]()
    for i in range(draw(st.integers(1, 24))):
        first, length = draw(st.sampled_from(prefixes))
        count, context = draw(lengths), draw(st.integers(0, 30))
        own = range(1000 * (i + 1), 1000 * (i + 1) + 80)
        prefix = range(first, first + pages_for(length, 4)) if length else ()
        if cross:
            spans.append(CrossSpan(count, context + 1, own, False, prefix, length))
        else:
            spans.append(SequenceSpan(count, context, own, prefix, length))
    heads_per_kv, programs = draw(st.sampled_from([1, 3, 4, 20])), draw(st.integers(1, 64))
    return spans, Shape(4, draw(st.sampled_from([1, 2])), heads_per_kv, programs), rows


@settings(max_examples=150, deadline=None)
@given(step=steps(), grouped=st.booleans(), saved=st.sampled_from([1, 30, 10**9]))
def test_the_work_of_a_step_is_that_of_its_spans_one_by_one(
    step: tuple[list[Span], Shape, int | None], grouped: bool, saved: int
) -> None:
    spans, shape, rows = step
    with patch.multiple(work, _KEYS_SAVED=saved, _KEYS_PER_SPLIT=8):
        found = make_work(spans, shape, grouped=grouped, rows=rows)
        wanted = work_oracle.make_work(spans, shape, grouped=grouped, rows=rows)
    assert len(found.launches) == len(wanted.launches)
    for mine, theirs in zip(found.launches, wanted.launches, strict=True):
        assert mine[2:] == theirs[2:]
        for field in ("blocks", "queries"):
            assert getattr(mine, field).dtype == np.int32
            np.testing.assert_array_equal(getattr(mine, field), getattr(theirs, field))
    for field in ("pages", "num_parts"):
        assert getattr(found, field).dtype == np.int32
        np.testing.assert_array_equal(getattr(found, field), getattr(wanted, field))


@settings(max_examples=60, deadline=None)
@given(case=cases(), data=st.data())
def test_new_tokens_go_to_the_slots_after_those_there_are(case: Case, data: st.DataObject) -> None:
    step = Step(case, Heads(1, 1, 8))
    found = new_slots(step.spans, case.page_size)
    wanted = [
        slots_of(span.pages, span.num_keys, case.page_size)[span.context_len :]
        for span in step.spans
    ]
    assert found.tolist() == np.concatenate(wanted).tolist()


def test_a_group_pays_by_the_keys_that_are_not_read_again() -> None:
    def spans(count: int, length: int) -> list[SequenceSpan]:
        prefix = range(100, 100 + -(-length // 16))
        return [SequenceSpan(1, 4, [i], prefix, length) for i in range(count)]

    assert not grouping_pays(spans(1, 100_000))
    assert not grouping_pays(spans(32, 100))
    assert grouping_pays(spans(33, 128))
    assert grouping_pays(spans(2, 4096))
    assert not grouping_pays([SequenceSpan(1, 4, [i]) for i in range(200)])


def test_prefix_keys_are_read_once_by_their_group() -> None:
    """33 decodes of one prefix, 2 of another, one of none."""
    specs = [Spec(0, 3, 1)] * 33 + [Spec(1, 3, 1)] * 2 + [Spec(None, 9, 1)]
    step = Step(Case(16, [128, 100], specs, seed=0), Heads(2, 4, 8))
    made = make_work(step.spans, shape_of(step, 1), grouped=True)
    own, prefix = made.launches
    assert own.blocks[:, 5].tolist() == [128] * 33 + [0, 0, 0]
    assert prefix.blocks[:, 1].tolist() == [16, 16, 1], "64 rows are 16 queries of 4 heads"
    assert prefix.blocks[:, 5:7].tolist() == [[0, 128]] * 3
    assert len(set(prefix.blocks[:, 2].tolist())) == 1
    assert made.num_parts.tolist() == [2] * 33 + [1, 1, 1]
    assert len(made.pages) == 8 + 7 + 36, "each prefix's pages are listed once"


@pytest.mark.parametrize("grouped", [False, True])
def test_padded_work_has_one_shape_for_all_steps(grouped: bool) -> None:
    def make(specs: Sequence[Spec]) -> Work:
        step = Step(Case(4, [300], list(specs), seed=0), Heads(2, 2, 8))
        return make_work(step.spans, shape_of(step, 64), grouped=grouped, rows=8)

    with patch.object(work, "_KEYS_SAVED", 600):
        made = [make([Spec(0, n, 1)] * n) for n in (1, 3, 8)] + [make([Spec(None, 900, 1)] * 2)]
    fixed = [
        [(x.blocks.shape, x.queries.shape, x.block_m, x.splits, x.first_part) for x in m.launches]
        for m in made
    ]
    assert all(other == fixed[0] for other in fixed)
    assert len(fixed[0]) == 1 + grouped
    # Rows that nobody has see nothing, and are written all the same.
    own = made[1].launches[0]
    assert own.queries.tolist()[3:] == [[row, -1] for row in range(3, 8)]
    assert own.blocks[3:, 1:7].tolist() == [[1, 0, 0, 0, 0, 0]] * 5


def test_cross_attention_sees_all_keys_from_every_query() -> None:
    span = CrossSpan(3, 10, [5, 6, 7], False, [1, 2], 6)
    made = make_work([span], Shape(4, 1, 1, 1), grouped=False)
    (launch,) = made.launches
    assert launch.queries.tolist() == [[0, 15], [1, 15], [2, 15]]
    slots = block_slots(made, launch.blocks[0], 4)
    assert slots.tolist() == [4, 5, 6, 7, 8, 9, *range(20, 30)]
    assert new_slots([span], 4).tolist() == []
