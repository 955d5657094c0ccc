"""What is drawn from, against transformers' own processors, and which token it gives."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prefixd_server.engine import sampling_filters
from prefixd_server.engine.penalties import adjust_
from prefixd_server.engine.sampling import uniform
from prefixd_server.engine.sampling_filters import supports, weight_scale, weights
from prefixd_server.types import SamplingParams
from tests.engine.sampling_oracle import (
    adjusted_by_transformers,
    batches,
    nudged,
    same_distribution,
    warped_by_transformers,
)
from tests.engine.sampling_rig import EOS, Row, sample, sampler, seeded


def distributions(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """[B, V] float64: what the code under test would draw from, spread over the vocabulary."""
    vocab = logits.shape[1]
    scores = logits.float().clone()
    adjust_(scores, rows, EOS)
    scale = weight_scale(vocab)
    dense = torch.zeros(len(rows), vocab, dtype=torch.float64)
    for support in supports(scores, [row.params for row in rows], scale):
        ids = torch.arange(vocab).expand(len(support.rows), -1)
        ids = ids if support.ids is None else support.ids
        assert (ids.diff(dim=-1) > 0).all(), "candidates are in vocabulary order"
        part = torch.zeros(len(support.rows), vocab, dtype=torch.float64)
        dense[support.rows] += part.scatter(1, ids, weights(support.z, scale).double())
    return dense / dense.sum(-1, keepdim=True)


def heated(rows: Sequence[Row]) -> list[Row]:
    """The greedy ones at temperature 1: every row has a distribution to look at."""
    return [
        replace(row, params=replace(row.params, temperature=row.params.temperature or 1.0))
        for row in rows
    ]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(batches())
def test_filtered_distributions_are_those_of_transformers(batch: tuple[Tensor, list[Row]]) -> None:
    logits, rows = batch
    assert_as_transformers(logits, heated(rows))


def assert_as_transformers(logits: Tensor, rows: Sequence[Row]) -> None:
    for row_logits, row, mine in zip(logits, rows, distributions(logits, rows), strict=True):
        scores = adjusted_by_transformers(row_logits, row)
        ways = itertools.product(nudged(row.params), (torch.float32, torch.float64))
        candidates = (warped_by_transformers(scores.to(dtype), p) for p, dtype in ways)
        assert any(same_distribution(scores, warped, mine) for warped in candidates), row.params


def test_what_chance_seldom_combines_is_as_in_transformers() -> None:
    """Bias before the repetition penalty; a top-k of ties beyond any candidate list; top-p of 0."""
    grid = (seeded(2000, 3) / 3).round()
    warm = SamplingParams(temperature=1.0)
    rows = [
        Row(replace(warm, logit_bias=((9, 4.0), (5, -4.0)), repetition_penalty=1.8), [9, 5]),
        Row(replace(warm, top_k=626, top_p=0.5)),
        Row(replace(warm, top_p=0.0)),
    ]
    assert_as_transformers(grid, rows)


@settings(max_examples=120, deadline=None)
@given(batches())
def test_ids_and_logprobs(batch: tuple[Tensor, list[Row]]) -> None:
    """Greedy: transformers' argmax. Drawn: the inverse CDF at the row's uniform, never a zero."""
    logits, rows = batch
    logp = logits.float().log_softmax(-1)
    mine = distributions(logits, heated(rows))
    for i, (row, token) in enumerate(zip(rows, sample(logits, rows), strict=True)):
        assert token.logprob == pytest.approx(float(logp[i, token.id]), abs=1e-5)
        if row.params.greedy:
            assert token.id == int(adjusted_by_transformers(logits[i], row).argmax())
        else:
            assert mine[i, token.id] > 0
            u = uniform(row.params.seed, len(row.output_token_ids))
            below = float(mine[i, : token.id].sum())
            assert below - 1e-12 <= u <= below + float(mine[i, token.id]) + 1e-12


@settings(max_examples=60, deadline=None)
@given(batches(), st.randoms(use_true_random=False))
def test_a_row_draws_the_same_alone_and_anywhere_in_a_batch(
    batch: tuple[Tensor, list[Row]], random: Random
) -> None:
    logits, rows = batch
    order = list(range(len(rows)))
    random.shuffle(order)
    alone = [sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    mixed = sample(logits[order], [rows[i] for i in order])
    assert [alone[i].id for i in order] == [token.id for token in mixed]
    for i, token in zip(order, mixed, strict=True):
        assert alone[i].logprob == pytest.approx(token.logprob, abs=1e-5)
        assert [id_ for id_, _ in alone[i].top] == [id_ for id_, _ in token.top]


@settings(max_examples=60, deadline=None)
@given(batches())
def test_candidate_lists_change_nothing(batch: tuple[Tensor, list[Row]]) -> None:
    """Narrow or whole vocabulary, the distribution is the same to the last bit."""
    logits, rows = batch[0], heated(batch[1])
    narrow = distributions(logits, rows)
    with mock.patch.object(sampling_filters, "_WIDTHS", ()):
        assert torch.equal(distributions(logits, rows), narrow)


@pytest.mark.parametrize(
    ("params", "widths"),
    [
        (SamplingParams(temperature=1.0), [None]),
        (SamplingParams(temperature=1.0, top_k=50), [128]),
        (SamplingParams(temperature=1.0, top_k=500), [1024]),
        (SamplingParams(temperature=1.0, top_k=1500), [None]),
        (SamplingParams(temperature=0.1, top_p=0.9), [128]),
        (SamplingParams(temperature=1.3, top_p=0.9), [1024]),
        (SamplingParams(temperature=50.0, top_p=0.9), [None]),
    ],
)
def test_the_whole_vocabulary_is_sorted_only_where_it_must_be(
    params: SamplingParams, widths: list[int | None]
) -> None:
    groups = supports(seeded(4000, 1), [params], weight_scale(4000))
    assert [None if g.ids is None else g.ids.shape[1] for g in groups] == widths


def test_equal_logits_leave_top_k_whole_and_give_top_p_the_lower_ids() -> None:
    """transformers' top-k keeps all that tie with the k-th; its top-p keeps just enough of them."""
    rows = [
        Row(SamplingParams(temperature=1.0, top_k=2)),
        Row(SamplingParams(temperature=1.0, top_p=0.25)),
    ]
    kept = distributions(torch.zeros(2, 2048), rows) > 0
    assert kept[0].all()
    assert kept[1].nonzero()[:, 0].tolist() == list(range(512))


def test_greedy_ties_go_to_the_first_id() -> None:
    rows = [Row(), Row(SamplingParams(logit_bias=((5, 0.0),)))]
    assert [token.id for token in sample(torch.zeros(2, 40), rows)] == [0, 0]


@pytest.mark.parametrize("temperature", [1e-50, 1e-30, 1e-6])
def test_a_tiny_temperature_is_greedy_and_not_nan(temperature: float) -> None:
    logits = seeded(500, 4) * 1e4
    tokens = sample(
        logits, [Row(SamplingParams(temperature=temperature, seed=i)) for i in range(4)]
    )
    assert [token.id for token in tokens] == logits.argmax(-1).tolist()


def test_no_rows_no_tokens() -> None:
    assert sampler(10).sample(torch.empty(0, 10), []) == []
