"""The C++ kernels' backend against dense attention in float64 and against the reference backend,
with each instruction set's kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prefixd_server.attention import CrossSpan, LayerOptions, SequenceSpan, create_backend, native
from prefixd_server.kv.pool import KVPool
from prefixd_server.native import kernels
from tests.attention.test_sdpa import (
    LAYER,
    Case,
    Heads,
    Spec,
    Step,
    assert_matches_dense,
    cases,
    dense,
    options,
    slot,
)
from tests.support.isa import ISAS, kernels_of
from tests.support.threads import one_thread

__all__ = ["one_thread"]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(kernels.load() is None, reason="there is no C++ compiler"),
]

TOLERANCE = 2e-5

heads = st.builds(
    Heads,
    kv=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 3, 8]),
    # Shorter than a vector, a vector and a rest, several of them, the two that are compiled apart.
    dim=st.sampled_from([1, 8, 20, 48, 64, 80, 128]),
)
pages_of_any_size = st.sampled_from([1, 3, 5, 16])


@pytest.fixture(autouse=True, scope="module", params=ISAS)
def isa(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    loaded = kernels_of(request.param, tmp_path_factory.mktemp(request.param))
    with patch.object(kernels, "load", lambda: loaded):
        yield


def make_step(case: Case, heads: Heads) -> Step:
    return Step(case, heads, backend="native")


def reference(step: Step, options: LayerOptions) -> Tensor:
    plan = create_backend("sdpa", step.pool).plan(step.spans)
    return plan.attend(LAYER, step.query, step.key, step.value, options)


@settings(max_examples=150, deadline=None)
@given(
    case=cases(),
    page_size=pages_of_any_size,
    heads=heads,
    options=options,
    longest_part=st.sampled_from([7, 16, 1024]),
)
def test_ragged_steps_match_dense_attention(
    case: Case, page_size: int, heads: Heads, options: LayerOptions, longest_part: int
) -> None:
    with patch.multiple(
        native,
        _LONGEST_PART=longest_part,
        _LONGEST_PART_OF_MANY=longest_part,
        _SHORTEST_PART_OF_MANY=min(longest_part, 128),
    ):
        step = make_step(case._replace(page_size=page_size), heads)
        assert_matches_dense(step, options, TOLERANCE)


@settings(max_examples=30, deadline=None)
@given(
    prefix_lens=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    num_seqs=st.integers(9, 40),
    seed=st.integers(0, 999),
    heads=heads,
    options=options,
)
def test_queries_of_one_prefix_that_lie_apart_get_their_own_rows(
    prefix_lens: list[int], num_seqs: int, seed: int, heads: Heads, options: LayerOptions
) -> None:
    """Decodes of a few prefixes in any order: a prefix's rows are gathered and scattered."""
    draw = torch.Generator().manual_seed(seed)
    which = torch.randint(0, len(prefix_lens), (num_seqs,), generator=draw).tolist()
    lengths = torch.randint(0, 12, (num_seqs,), generator=draw).tolist()
    specs = [Spec(prefix, length, 1) for prefix, length in zip(which, lengths, strict=True)]
    step = make_step(Case(5, prefix_lens, specs, seed), heads)
    wanted = reference(step, options)
    torch.testing.assert_close(step.attend(options), wanted, atol=TOLERANCE, rtol=TOLERANCE)


LONG = Case(
    16,
    [513, 1500],
    [Spec(0, 3, 1), Spec(1, 1100, 1), Spec(0, 0, 30), Spec(1, 0, 1), Spec(None, 2100, 2)],
    seed=3,
)


@pytest.mark.parametrize("window", [None, 1, 40, 600, 1200])
def test_lists_longer_than_a_part(window: int | None) -> None:
    """Also where the window has left some parts of a list, a whole prefix, or all but one key."""
    step = make_step(LONG, Heads(kv=2, group=2, dim=16))
    assert_matches_dense(step, LayerOptions(0.25, window), TOLERANCE)


@pytest.mark.parametrize("window", [None, 1, 150])
@pytest.mark.parametrize("dim", [20, 64])
def test_more_rows_than_take_turns_over_a_block(dim: int, window: int | None) -> None:
    """Several sets of full tiles, a rest of less than one, over blocks that only some rows see."""
    prompts = [Spec(None, 0, 301), Spec(0, 0, 130), Spec(0, 7, 47)]
    step = make_step(Case(16, [290], prompts, seed=4), Heads(kv=1, group=3, dim=dim))
    assert_matches_dense(step, LayerOptions(0.25, window), TOLERANCE)


@pytest.mark.parametrize(
    ("keys", "queries", "lengths"),
    [
        (2048, 1, [512] * 4),
        (2048, 2, [1024, 1024]),
        (2049, 32, [513, 513, 513, 510]),
        (300, 32, [150, 150]),
        (255, 32, [255]),
        (1, 2, [1]),
    ],
)
def test_keys_of_many_queries_come_in_an_even_number_of_like_parts(
    keys: int, queries: int, lengths: list[int]
) -> None:
    longest = native._longest_part(keys, queries)
    assert [min(longest, keys - first) for first in range(0, keys, longest)] == lengths


@pytest.mark.parametrize("scaling", [1.0, 30.0])
@pytest.mark.parametrize("softcap", [None, 50.0])
def test_scores_far_apart(scaling: float, softcap: float | None) -> None:
    """One key takes it all, and it may stand in any part: nothing may overflow on the way."""
    step = make_step(LONG, Heads(kv=1, group=3, dim=64))
    assert_matches_dense(step, LayerOptions(scaling, softcap=softcap), 1e-4)


@pytest.mark.parametrize("num_queries", [1, 20])
@pytest.mark.parametrize("dim", [20, 64])
def test_tensors_are_read_as_transformers_lays_them_out(num_queries: int, dim: int) -> None:
    """Views of [1, H, T, D], of one product for all three, and with the last dimension apart."""
    step = make_step(Case(5, [9], [Spec(0, 6, num_queries)] * 3, seed=1), Heads(2, 3, dim))
    wanted = reference(step, LayerOptions(0.3))

    def transposed(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)

    def sideways(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)

    def joined(tensor: Tensor) -> Tensor:
        rows = torch.cat([torch.full((len(tensor), 7), math.nan), tensor.flatten(1)], 1)
        return rows[:, 7:].unflatten(1, tensor.shape[1:])

    layouts: list[Callable[[Tensor], Tensor]] = [transposed, sideways, joined]
    for layout in layouts:
        views = [layout(tensor) for tensor in (step.query, step.key, step.value)]
        assert not any(view.is_contiguous() for view in views) or num_queries == 1
        step.pool.keys[LAYER][_new_slots(step)] = 7.0
        plan = create_backend("native", step.pool).plan(step.spans)
        found = plan.attend(LAYER, *views, LayerOptions(0.3))
        torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=TOLERANCE)


def _new_slots(step: Step) -> list[int]:
    return [
        slot(span.pages, token, step.pool.page_size)
        for span in step.spans
        for token in range(span.context_len, span.num_keys)
    ]


# --- cross-attention ------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    page_size=pages_of_any_size,
    prefix_len=st.integers(0, 30),
    lengths=st.lists(
        st.tuples(st.integers(1, 20), st.integers(1, 40), st.booleans(), st.booleans()),
        min_size=1,
        max_size=5,
    ),
    heads=heads,
    seed=st.integers(0, 999),
)
def test_cross_attention_sees_all_of_the_encoder(
    page_size: int,
    prefix_len: int,
    lengths: list[tuple[int, int, bool, bool]],
    heads: Heads,
    seed: int,
) -> None:
    """``lengths``: a span's queries and keys, whether the keys are new, whether it has a prefix."""
    specs = [
        Spec(0 if prefix_len and behind else None, num_keys, num_queries)
        for num_queries, num_keys, _, behind in lengths
    ]
    step = make_step(Case(page_size, [prefix_len] if prefix_len else [], specs, seed), heads)
    spans = [
        CrossSpan(own.query_len, num_keys, own.pages, is_new, own.prefix_pages, own.prefix_len)
        for own, (_, num_keys, is_new, _) in zip(step.spans, lengths, strict=True)
    ]
    count = sum(num_keys for _, num_keys, is_new, _ in lengths if is_new)
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, count, heads.kv, heads.dim, generator=generator)
    plan = create_backend("native", step.pool).plan(spans)
    found = plan.attend(LAYER, step.query, key, value, LayerOptions(0.4))
    wanted = dense_cross(step, spans, key, value, 0.4)
    torch.testing.assert_close(found.double(), wanted, atol=TOLERANCE, rtol=TOLERANCE)


def dense_cross(
    step: Step, spans: list[CrossSpan], key: Tensor, value: Tensor, scaling: float
) -> Tensor:
    """[T, H, D] in float64; the new keys are taken as they were given, not from the pool."""
    rows, query, first_new = [], step.query.double(), 0
    for span in spans:
        size = step.pool.page_size
        prefix = [slot(span.prefix_pages, i, size) for i in range(span.prefix_len)]
        new = slice(first_new, first_new := first_new + span.num_keys * span.is_new)
        own = [slot(span.pages, i, size) for i in range(span.num_keys)]
        seen = [
            torch.cat([pool[LAYER][prefix], given[new] if span.is_new else pool[LAYER][own]])
            for pool, given in ((step.pool.keys, key), (step.pool.values, value))
        ]
        group = step.query.shape[1] // seen[0].shape[1]
        keys, values = (tensor.double().repeat_interleave(group, 1) for tensor in seen)
        mine, query = query[: span.query_len], query[span.query_len :]
        scores = torch.einsum("qhd,khd->hqk", mine, keys) * scaling
        rows.append(torch.einsum("hqk,khd->qhd", torch.softmax(scores, -1), values))
    return torch.cat(rows)


def test_a_relative_bias_goes_to_the_reference() -> None:
    step = make_step(LONG._replace(specs=LONG.specs[2:4]), Heads(kv=2, group=1, dim=8))

    def bias(distance: Tensor) -> Tensor:
        return torch.stack([distance * 0.01, distance.abs() * -0.02], -1)

    layer = LayerOptions(1.0, relative_bias=bias)
    wanted = reference(step, layer)
    assert torch.equal(step.attend(layer), wanted)
    assert not torch.allclose(wanted, reference(step, LayerOptions(1.0)), atol=1e-2)


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("dim", [8, 64])
@pytest.mark.parametrize("num_queries", [1, 12])
def test_one_sequence_with_nan_spoils_no_other(
    softcap: float | None, window: int | None, dim: int, num_queries: int
) -> None:
    """Neither does memory of nobody's, nor the rest of a page that is not full."""
    broken = 2
    specs = [Spec(0, 10, num_queries), Spec(0, 17, 1), Spec(0, 30, num_queries), Spec(None, 20, 1)]
    step = make_step(Case(4, [7], specs, seed=8), Heads(kv=2, group=2, dim=dim))
    healthy = {
        slot(pages, token, 4)
        for i, span in enumerate(step.spans)
        for pages, length in (
            (span.pages, span.num_keys if i != broken else 0),
            (span.prefix_pages, span.prefix_len),
        )
        for token in range(length)
    }
    others = [s for s in range(step.pool.num_pages * 4) if s not in healthy]
    for tensor in (step.pool.keys[LAYER], step.pool.values[LAYER]):
        tensor[others] = math.nan
    layer = LayerOptions(dim**-0.5, window, softcap)
    output = step.attend(layer)
    wanted = dense(step, step.pool.keys[LAYER], step.pool.values[LAYER], layer)
    sizes = [span.query_len for span in step.spans]
    for i, (found, right) in enumerate(zip(output.split(sizes), wanted.split(sizes), strict=True)):
        if i != broken:
            torch.testing.assert_close(found.double(), right, atol=TOLERANCE, rtol=TOLERANCE)
        else:  # with a window, the last queries see the new tokens alone
            assert bool(found[0].isnan().all())


@pytest.mark.parametrize("num_seqs", [3, 20])
def test_a_query_of_nan_spoils_no_other_of_its_prefix(num_seqs: int) -> None:
    specs = [Spec(0, i, 1) for i in range(num_seqs)]
    step = make_step(Case(4, [30], specs, seed=2), Heads(kv=1, group=2, dim=64))
    step.query[1] = math.nan
    output = step.attend(LayerOptions(0.125))
    wanted = dense(step, step.pool.keys[LAYER], step.pool.values[LAYER], LayerOptions(0.125))
    rest = [i for i in range(num_seqs) if i != 1]
    torch.testing.assert_close(output[rest].double(), wanted[rest], atol=TOLERANCE, rtol=TOLERANCE)
    assert bool(output[1].isnan().all())


def test_beams_that_share_full_pages() -> None:
    """Each has the first pages in common with the others and writes to a last one of its own."""
    step = make_step(Case(4, [6], [Spec(0, 13, 1)] * 5, seed=4), Heads(kv=2, group=2, dim=20))
    common = list(step.spans[0].pages)[:3]
    step.spans = [
        SequenceSpan(1, 13, [*common, span.pages[3]], span.prefix_pages, span.prefix_len)
        for span in step.spans
    ]
    assert_matches_dense(step, LayerOptions(20**-0.5), TOLERANCE)


def test_threads_change_nothing() -> None:
    """Parts are cut by length alone, so the sums are the same to the last bit."""
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found.append(make_step(LONG, Heads(kv=2, group=2, dim=64)).attend(LayerOptions(0.125)))
        finally:
            torch.set_num_threads(1)
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_pool_that_is_not_float32_is_refused(dtype: torch.dtype) -> None:
    pool = KVPool(
        num_layers=1,
        num_kv_heads=1,
        head_dim=8,
        num_pages=1,
        page_size=4,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    with pytest.raises(ValueError, match=f"float32, not {dtype}"):
        create_backend("native", pool)
