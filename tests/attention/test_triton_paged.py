"""The Triton backend against dense attention in float64: on a CUDA device where there is one, and
else with the same kernels run by Triton's interpreter on the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")

from prefixd_server.attention import (  # noqa: E402
    CrossSpan,
    DecodePlan,
    LayerOptions,
    create_backend,
    triton_paged,
    work,
)
from prefixd_server.attention.sdpa import SDPABackend  # noqa: E402
from tests.attention.test_sdpa import (  # noqa: E402
    LAYER,
    Case,
    Heads,
    Spec,
    Step,
    assert_matches_dense,
    cases,
    dense,
    options,
)
from tests.support.threads import one_thread  # noqa: E402

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

heads = st.builds(
    Heads,
    kv=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3, 4]),
    dim=st.sampled_from([8, 24]),
)


def make_step(case: Case, heads: Heads, dtype: torch.dtype = torch.float32) -> Step:
    return Step(case, heads, dtype, backend="triton", device=DEVICE)


@pytest.fixture
def small_parts() -> Iterator[None]:
    """Groups and splits for steps as small as those of a test."""
    with patch.multiple(work, _KEYS_SAVED=1, _KEYS_PER_SPLIT=16):
        yield


@settings(max_examples=15, deadline=None)
@given(case=cases(), heads=heads, options=options, small=st.booleans())
def test_ragged_steps_match_dense_attention(
    case: Case, heads: Heads, options: LayerOptions, small: bool
) -> None:
    limits = (1, 16) if small else (work._KEYS_SAVED, work._KEYS_PER_SPLIT)
    with patch.multiple(work, _KEYS_SAVED=limits[0], _KEYS_PER_SPLIT=limits[1]):
        assert_matches_dense(make_step(case, heads), options, tolerance=2e-5)


MIXED = Case(
    16, [33, 70], [Spec(0, 50, 1), Spec(1, 3, 20), Spec(None, 0, 12), Spec(0, 0, 1)], seed=3
)


# The interpreter computes bfloat16 as the integers that it is stored as.
@pytest.mark.parametrize(
    "dtype", [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])], ids=str
)
@pytest.mark.parametrize("dim", [16, 128])
def test_half_precision_matches_within_its_own(dtype: torch.dtype, dim: int) -> None:
    step = make_step(MIXED, Heads(2, 4, dim), dtype)
    tolerance = 4e-3 if dtype is torch.float16 else 3e-2
    assert_matches_dense(step, LayerOptions(dim**-0.5), tolerance)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 7])
def test_one_sequence_with_nan_spoils_no_other(softcap: float | None, window: int | None) -> None:
    specs = [Spec(0, 10, 1), Spec(0, 17, 5), Spec(None, 30, 1), Spec(None, 20, 1)]
    step = make_step(Case(4, [7], specs, seed=8), Heads(1, 2, 8))
    owned = [span.pages for span in step.spans[:3]] + [step.spans[0].prefix_pages]
    healthy = {page * 4 + i for pages in owned for page in pages for i in range(4)}
    others = [s for s in range(step.pool.num_pages * 4) if s not in healthy]
    for tensor in (step.pool.keys[LAYER], step.pool.values[LAYER]):
        tensor[others] = math.nan
    layer = LayerOptions(8**-0.5, window, softcap)
    output = step.attend(layer).cpu()
    wanted = dense_of(step, layer)
    torch.testing.assert_close(output[:-1].double(), wanted[:-1], atol=2e-5, rtol=2e-5)
    assert bool(output[-1].isnan().all())


def dense_of(step: Step, options: LayerOptions) -> Tensor:
    return dense(step, step.pool.keys[LAYER], step.pool.values[LAYER], options).cpu()


@pytest.mark.parametrize("is_new", [False, True])
@pytest.mark.usefixtures("small_parts")
def test_cross_attention_is_the_references(is_new: bool) -> None:
    step = make_step(
        Case(4, [19], [Spec(0, 9, 3), Spec(0, 3, 1), Spec(None, 6, 2)], 5), Heads(2, 1, 8)
    )
    spans = [
        CrossSpan(s.query_len, s.num_keys - 1, s.pages, is_new, s.prefix_pages, s.prefix_len)
        for s in step.spans
    ]
    count = sum(span.num_keys for span in spans) if is_new else 0
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, count, 2, 8, generator=generator).to(DEVICE)
    layer = LayerOptions(0.4)
    # Each writes the same keys before it reads.
    found = (
        create_backend("triton", step.pool).plan(spans).attend(LAYER, step.query, key, value, layer)
    )
    wanted = SDPABackend(step.pool).plan(spans).attend(LAYER, step.query, key, value, layer)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)


def attend_fixed(plan: DecodePlan, step: Step, rows: int, layer: LayerOptions) -> Tensor:
    """As a graph's replay would: always ``rows`` rows, here with noise in those of nobody."""
    plan.fill(step.spans)

    def padded(tensor: Tensor) -> Tensor:
        rest = torch.full((rows - len(tensor), *tensor.shape[1:]), 7.0, device=DEVICE)
        return torch.cat([tensor, rest])

    return plan.attend(LAYER, padded(step.query), padded(step.key), padded(step.value), layer)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("window", [None, 9])
def test_a_decode_plan_serves_step_after_step_from_one_place(
    grouped: bool, window: int | None
) -> None:
    layer, rows = LayerOptions(0.3, window), 4
    case = Case(4, [37, 5], [Spec(0, 10, 1), Spec(1, 30, 1), Spec(0, 0, 1)], seed=1)
    step = make_step(case, Heads(2, 3, 8))
    plan = create_backend("triton", step.pool).decode_plan(rows, grouped=grouped)
    assert plan is not None
    # What a capture does first: a step of nobody.
    spans, step.spans = step.spans, []
    before = [tensor.clone() for tensor in (step.pool.keys[LAYER], step.pool.values[LAYER])]
    nothing = attend_fixed(plan, step, rows, layer)
    assert not nothing.any()
    assert all(
        torch.equal(old, new)
        for old, new in zip(before, (step.pool.keys[LAYER], step.pool.values[LAYER]), strict=True)
    )
    buffers = {id(w.buffer): w.buffer.data_ptr() for w in plan._works.values()}  # type: ignore[attr-defined]
    for members in ([0, 1, 2], [0], [0, 1, 2]):
        step.spans = [spans[i] for i in members]
        fresh = make_step(case, Heads(2, 3, 8))
        step.query, step.key, step.value = (
            tensor[members] for tensor in (fresh.query, fresh.key, fresh.value)
        )
        output = attend_fixed(plan, step, rows, layer)
        wanted = dense_of(step, layer)
        torch.testing.assert_close(
            output[: len(members)].cpu().double(), wanted, atol=2e-5, rtol=2e-5
        )
        assert not output[len(members) :].any()
    assert buffers == {id(w.buffer): w.buffer.data_ptr() for w in plan._works.values()}  # type: ignore[attr-defined]


def test_a_plan_says_when_page_lists_do_not_fit() -> None:
    step = make_step(Case(4, [], [Spec(None, 30, 1)], seed=1), Heads(1, 1, 8))
    plan = create_backend("triton", step.pool).decode_plan(64, grouped=False)
    assert plan is not None
    assert plan.fits(step.spans * 2)
    assert not plan.fits(step.spans * 64), "sixty-four that share all pages list each of them"
    assert not plan.fits(step.spans * 65)


@pytest.mark.parametrize("page_size", [4, 16])
def test_the_check_leaves_the_pool_alone_and_knows_a_wrong_kernel(page_size: int) -> None:
    step = make_step(Case(page_size, [], [Spec(None, 3, 1)], seed=1), Heads(2, 1, 24))
    backend = create_backend("triton", step.pool)
    before = [tensor.clone() for tensor in step.pool.keys + step.pool.values]
    backend.check()
    for old, new in zip(before, step.pool.keys + step.pool.values, strict=True):
        assert torch.equal(old, new)
    make_work = triton_paged.make_work

    def without_the_last_key(*args: Any, **kwargs: Any) -> work.Work:
        made = make_work(*args, **kwargs)
        for launch in made.launches:
            launch.blocks[:, 6] -= 1
        return made

    def nan(work: Any, pool: Any, layer: int, query: Tensor, options: LayerOptions) -> Tensor:
        return torch.full_like(query, math.nan)

    for name, wrong in (("make_work", without_the_last_key), ("_attend", nan)):
        with (
            patch.object(triton_paged, name, wrong),
            pytest.raises(RuntimeError, match="relative error"),
        ):
            backend.check()


def _cosines(relative: Tensor) -> Tensor:
    return torch.stack([(relative * 0.1).cos(), (relative * 0.3).cos()], -1)


def test_what_the_kernel_cannot_do_goes_to_the_reference(caplog: pytest.LogCaptureFixture) -> None:
    step = make_step(MIXED, Heads(1, 2, 8))
    backend = create_backend("triton", step.pool)
    layer = LayerOptions(0.3, relative_bias=_cosines)
    with caplog.at_level("INFO"):
        found = [
            backend.plan(step.spans).attend(LAYER, step.query, step.key, step.value, layer)
            for _ in range(2)
        ]
    wanted = SDPABackend(step.pool).plan(step.spans)
    torch.testing.assert_close(
        found[0], wanted.attend(LAYER, step.query, step.key, step.value, layer)
    )
    assert len([r for r in caplog.records if "relative bias" in r.message]) == 1
    large = make_step(MIXED, Heads(1, 1, 288))
    assert create_backend("triton", large.pool).decode_plan(4, grouped=False) is None
    assert_matches_dense(large, LayerOptions(0.05), tolerance=2e-5)
