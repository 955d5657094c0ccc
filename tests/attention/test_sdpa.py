"""The reference backend against dense attention in float64, written out token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prefixd_server.attention import LayerOptions, SequenceSpan, create_backend
from prefixd_server.kv.allocator import pages_for
from prefixd_server.kv.pool import KVPool
from tests.support.threads import one_thread

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

NUM_LAYERS = 2
LAYER = 1


class Heads(NamedTuple):
    kv: int
    group: int
    dim: int


class Spec(NamedTuple):
    prefix: int | None
    """which of the step's prefixes; two sequences may name the same"""
    context_len: int
    query_len: int


class Case(NamedTuple):
    page_size: int
    prefix_lens: list[int]
    specs: list[Spec]
    seed: int


class Step:
    """A pool filled with noise, pages handed out in random order, and one step's new tokens."""

    def __init__(
        self,
        case: Case,
        heads: Heads,
        dtype: torch.dtype = torch.float32,
        *,
        backend: str = "sdpa",
        device: str = "cpu",
    ) -> None:
        self.backend = backend
        self.generator = torch.Generator().manual_seed(case.seed)
        size = case.page_size
        own_lens = [spec.context_len + spec.query_len for spec in case.specs]
        counts = [pages_for(n, size) for n in case.prefix_lens + own_lens]
        num_pages = sum(counts) + 2
        self.pool = KVPool(
            num_layers=NUM_LAYERS,
            num_kv_heads=heads.kv,
            head_dim=heads.dim,
            num_pages=num_pages,
            page_size=size,
            dtype=dtype,
            device=torch.device(device),
        )
        for tensor in self.pool.keys + self.pool.values:
            tensor.copy_(self._normal(*tensor.shape))
        order = torch.randperm(num_pages, generator=self.generator).tolist()
        pages = [[order.pop() for _ in range(count)] for count in counts]
        prefixes = list(zip(case.prefix_lens, pages, strict=False))
        self.spans = []
        for spec, own in zip(case.specs, pages[len(prefixes) :], strict=True):
            length, prefix_pages = (0, []) if spec.prefix is None else prefixes[spec.prefix]
            self.spans.append(
                SequenceSpan(spec.query_len, spec.context_len, own, prefix_pages, length)
            )
        tokens = sum(span.query_len for span in self.spans)
        self.query = self._normal(tokens, heads.kv * heads.group, heads.dim).to(device, dtype)
        self.key = self._normal(tokens, heads.kv, heads.dim).to(device, dtype)
        self.value = self._normal(tokens, heads.kv, heads.dim).to(device, dtype)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def attend(self, options: LayerOptions) -> Tensor:
        plan = create_backend(self.backend, self.pool).plan(self.spans)
        return plan.attend(LAYER, self.query, self.key, self.value, options)


def slot(pages: Sequence[int], token: int, page_size: int) -> int:
    return pages[token // page_size] * page_size + token % page_size


def expected_pool(step: Step, old: Tensor, new: Tensor) -> Tensor:
    """``old`` [slots, H_kv, D] with the step's new rows [T, H_kv, D] where they belong."""
    pool, row = old.clone(), 0
    for span in step.spans:
        for token in range(span.context_len, span.context_len + span.query_len):
            pool[slot(span.pages, token, step.pool.page_size)] = new[row]
            row += 1
    return pool


def dense(step: Step, keys: Tensor, values: Tensor, options: LayerOptions) -> Tensor:
    """[T, H, D] in float64: one query and one head at a time, over the keys it may see."""
    rows = []
    size, group = step.pool.page_size, step.query.shape[1] // keys.shape[1]
    queries = iter(step.query.double())
    for span in step.spans:
        slots = [slot(span.prefix_pages, i, size) for i in range(span.prefix_len)]
        slots += [slot(span.pages, i, size) for i in range(span.context_len + span.query_len)]
        for index in range(len(slots) - span.query_len, len(slots)):
            first = 0
            if options.sliding_window is not None:
                first = max(0, index + 1 - options.sliding_window)
            seen = slots[first : index + 1]
            heads = []
            for head, q in enumerate(next(queries)):
                scores = keys[seen, head // group].double() @ q * options.scaling
                if options.softcap is not None:
                    scores = options.softcap * torch.tanh(scores / options.softcap)
                heads.append(torch.softmax(scores, 0) @ values[seen, head // group].double())
            rows.append(torch.stack(heads))
    return torch.stack(rows)


def assert_matches_dense(step: Step, options: LayerOptions, tolerance: float) -> None:
    old_keys = [tensor.clone() for tensor in step.pool.keys]
    old_values = [tensor.clone() for tensor in step.pool.values]
    output = step.attend(options)
    for pools, olds, new in (
        (step.pool.keys, old_keys, step.key),
        (step.pool.values, old_values, step.value),
    ):
        assert torch.equal(pools[LAYER], expected_pool(step, olds[LAYER], new))
        assert torch.equal(pools[1 - LAYER], olds[1 - LAYER]), "another layer changed"
    assert output.shape == step.query.shape
    assert output.dtype == step.query.dtype
    wanted = dense(step, step.pool.keys[LAYER], step.pool.values[LAYER], options)
    torch.testing.assert_close(output.double(), wanted, atol=tolerance, rtol=tolerance)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    prefix_lens = draw(st.lists(st.integers(1, 40), max_size=3))
    which = st.sampled_from([None, *range(len(prefix_lens))])
    decodes = st.builds(Spec, which, st.integers(0, 50), st.just(1))
    chunks = st.builds(Spec, which, st.integers(0, 50), st.integers(1, 20))
    specs = draw(st.lists(decodes | chunks, min_size=1, max_size=6))
    return Case(draw(st.sampled_from([1, 4, 16])), prefix_lens, specs, draw(st.integers(0, 999)))


heads = st.builds(
    Heads, kv=st.sampled_from([1, 2]), group=st.sampled_from([1, 2, 4]), dim=st.just(8)
)
options = st.builds(
    LayerOptions,
    scaling=st.sampled_from([8**-0.5, 0.3]),
    sliding_window=st.none() | st.integers(1, 60),
    softcap=st.sampled_from([None, None, 2.0]),
)


@settings(max_examples=120, deadline=None)
@given(case=cases(), heads=heads, options=options)
def test_ragged_steps_match_dense_attention(
    case: Case, heads: Heads, options: LayerOptions
) -> None:
    assert_matches_dense(Step(case, heads), options, tolerance=2e-5)


@settings(max_examples=15, deadline=None)
@given(case=cases(), options=options)
def test_bfloat16_matches_within_its_precision(case: Case, options: LayerOptions) -> None:
    step = Step(case, Heads(kv=2, group=2, dim=8), torch.bfloat16)
    assert_matches_dense(step, options, tolerance=4e-2)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 7])
def test_one_sequence_with_nan_spoils_no_other(softcap: float | None, window: int | None) -> None:
    """Memory that belongs to nobody, or to a broken sequence, holds anything; it must not leak."""
    # Decodes of 17 to 31 keys are padded to one length together.
    specs = [Spec(0, 10, 1), Spec(0, 17, 1), Spec(None, 30, 1), Spec(None, 20, 1)]
    step = Step(Case(4, [7], specs, seed=8), Heads(kv=1, group=2, dim=8))
    owned = [span.pages for span in step.spans[:3]] + [step.spans[0].prefix_pages]
    healthy = {page * 4 + i for pages in owned for page in pages for i in range(4)}
    others = [s for s in range(step.pool.num_pages * 4) if s not in healthy]
    assert 0 in others, "page 0 is the likeliest to be read as padding"
    for tensor in (step.pool.keys[LAYER], step.pool.values[LAYER]):
        tensor[others] = math.nan
    options = LayerOptions(8**-0.5, window, softcap)
    output = step.attend(options)
    wanted = dense(step, step.pool.keys[LAYER], step.pool.values[LAYER], options)
    torch.testing.assert_close(output[:3].double(), wanted[:3], atol=2e-5, rtol=2e-5)
    assert bool(output[3].isnan().all())


def test_a_shared_prefix_is_read_not_copied() -> None:
    specs = [Spec(0, 3, 1), Spec(0, 9, 2), Spec(0, 0, 5)]
    step = Step(Case(16, [33], specs, seed=0), Heads(kv=2, group=1, dim=8))
    prefix = step.spans[0].prefix_pages
    assert all(span.prefix_pages is prefix for span in step.spans)
    before = step.pool.read(prefix, 33)
    assert_matches_dense(step, LayerOptions(8**-0.5), tolerance=2e-5)
    for old, new in zip(before, step.pool.read(prefix, 33), strict=True):
        assert torch.equal(old, new)


def test_an_unknown_backend_is_refused_by_name() -> None:
    step = Step(Case(4, [], [Spec(None, 0, 1)], seed=0), Heads(1, 1, 8))
    with pytest.raises(ValueError, match=r"'flash'.*sdpa"):
        create_backend("flash", step.pool)
