"""Sampling against transformers' own processors, and against itself in other batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as hf

from prefixd_server.engine import sampling, sampling_filters
from prefixd_server.engine.penalties import adjust_
from prefixd_server.engine.sampling import Sampler, prompt_logprobs, uniform
from prefixd_server.engine.sampling_filters import draw, supports, weight_scale, weights
from prefixd_server.types import SamplingParams, Token

EOS = frozenset({1, 3})
BORDER = 1e-6
"""float32's rounding of a cumulative probability: nearer than this to a threshold, either side"""


@dataclass
class Row:
    params: SamplingParams = field(default_factory=SamplingParams)
    prompt_token_ids: Sequence[int] = (0,)
    output_token_ids: Sequence[int] = ()
    banned_token_ids: Sequence[int] = ()
    forced_token_ids: Sequence[int] = ()


def sampler(vocab: int) -> Sampler:
    return Sampler(vocab, EOS, "cpu")


def sample(logits: Tensor, rows: Sequence[Row]) -> list[Token]:
    tokens = sampler(logits.shape[1]).sample(logits, rows)
    assert None not in tokens
    return [token for token in tokens if token]


def seeded(vocab: int, batch: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(batch, vocab, generator=torch.Generator().manual_seed(seed)) * spread


# --- the oracle -----------------------------------------------------------------------------------


def adjusted_by_transformers(logits: Tensor, row: Row) -> Tensor:
    """[V] after the processors that also shape a greedy choice."""
    p = row.params
    context = torch.tensor([[*row.prompt_token_ids, *row.output_token_ids]])
    scores = logits.float()[None]
    if p.logit_bias:
        bias = {(token,): value for token, value in p.logit_bias}
        scores = hf.SequenceBiasLogitsProcessor(bias)(context, scores)
    if p.repetition_penalty != 1.0:
        scores = hf.RepetitionPenaltyLogitsProcessor(p.repetition_penalty)(context, scores)
    for token in set(row.output_token_ids):  # not in transformers: OpenAI's formula, word for word
        count = list(row.output_token_ids).count(token)
        scores[0, token] -= count * p.frequency_penalty + float(count > 0) * p.presence_penalty
    if p.min_new_tokens:
        endings = [t for t in sorted(EOS | p.stop_token_ids) if t < len(logits)]
        prompt = len(row.prompt_token_ids)
        shortest = hf.MinNewTokensLengthLogitsProcessor(prompt, p.min_new_tokens, endings)
        scores = shortest(context, scores)
    return scores[0]


def warped_by_transformers(scores: Tensor, p: SamplingParams) -> Tensor:
    """[V] after the warpers that `generate` would build for ``p``, in its order."""
    warpers = hf.LogitsProcessorList([hf.TemperatureLogitsWarper(p.temperature)])
    if p.top_k:
        warpers.append(hf.TopKLogitsWarper(p.top_k))
    if p.top_p < 1.0:
        warpers.append(hf.TopPLogitsWarper(p.top_p))
    if p.min_p > 0.0:
        warpers.append(hf.MinPLogitsWarper(p.min_p))
    if p.typical_p < 1.0:
        warpers.append(hf.TypicalLogitsWarper(p.typical_p))
    return warpers(torch.empty(1, 0, dtype=torch.long), scores[None])[0]


def nudged(p: SamplingParams) -> Iterator[SamplingParams]:
    """``p`` first, then with its thresholds moved by no more than float32 can tell."""
    for top, typical, low in itertools.product((0, -BORDER, BORDER), repeat=3):
        yield replace(
            p,
            top_p=p.top_p if p.top_p >= 1.0 else min(max(p.top_p + top, 0.0), 1.0),
            typical_p=p.typical_p if p.typical_p >= 1.0 else p.typical_p + typical,
            min_p=min(p.min_p * (1 + low), 1.0),
        )


def same_distribution(scores: Tensor, warped: Tensor, probabilities: Tensor) -> bool:
    """Equal, but for which of equal scores stayed: transformers leaves that to an unstable sort.

    ``scores`` are those before the warpers.
    """
    mine, theirs = probabilities.numpy(), warped.double().softmax(-1).numpy()
    mine, theirs = (p[np.lexsort((p, scores.numpy()))] for p in (mine, theirs))
    return np.allclose(mine, theirs, atol=1e-9, rtol=1e-5)


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


# --- strategies -----------------------------------------------------------------------------------


def hundredths(low: float, high: float) -> st.SearchStrategy[float]:
    """Not any float: 1e-300 sets scores apart that one way of rounding makes equal again."""
    return st.integers(round(low * 100), round(high * 100)).map(lambda n: n / 100)


def off_or(off: float, on: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.just(off), on)


def rows_for(vocab: int) -> st.SearchStrategy[Row]:
    token = st.integers(0, vocab - 1)
    params = st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.9]),
        top_k=off_or(0, st.integers(1, vocab + 5)),
        top_p=off_or(1.0, hundredths(0.05, 0.99)),
        min_p=off_or(0.0, hundredths(0.01, 1.0)),
        typical_p=off_or(1.0, hundredths(0.05, 0.99)),
        repetition_penalty=off_or(1.0, hundredths(0.5, 2.0)),
        presence_penalty=off_or(0.0, hundredths(-2.0, 2.0)),
        frequency_penalty=off_or(0.0, hundredths(-2.0, 2.0)),
        logit_bias=st.dictionaries(token, hundredths(-20, 20), max_size=3).map(
            lambda d: tuple(d.items())
        ),
        min_new_tokens=st.integers(0, 4),
        stop_token_ids=st.frozensets(st.integers(0, vocab + 3), max_size=2),
        ignore_eos=st.booleans(),
        top_n_tokens=st.sampled_from([0, 0, 1, 4]),
        seed=st.integers(0, 2**63 - 1),
    )
    ids = st.lists(token, max_size=8)
    return st.builds(
        Row,
        params,
        prompt_token_ids=st.lists(token, min_size=1, max_size=8),
        output_token_ids=ids,
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, list[Row]]:
    """Logits that are smooth, tied (a grid), peaked or bfloat16, for rows that mix everything."""
    vocab = draw(st.sampled_from([9, 300, 2000]))
    rows = draw(st.lists(rows_for(vocab), min_size=1, max_size=5))
    logits = seeded(vocab, len(rows), draw(st.integers(0, 2**32)), draw(st.sampled_from([0.5, 4])))
    kind = draw(st.sampled_from(["smooth", "grid", "bfloat16", "float16"]))
    if kind == "grid":
        logits = (logits * 2).round() / 2
    return logits if kind in ("smooth", "grid") else logits.to(getattr(torch, kind)), rows


# --- what is drawn from ---------------------------------------------------------------------------


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


@pytest.mark.parametrize("temperature", [1e-50, 1e-30, 1e-6])
def test_a_tiny_temperature_is_greedy_and_not_nan(temperature: float) -> None:
    logits = seeded(500, 4) * 1e4
    tokens = sample(
        logits, [Row(SamplingParams(temperature=temperature, seed=i)) for i in range(4)]
    )
    assert [token.id for token in tokens] == logits.argmax(-1).tolist()


# --- randomness -----------------------------------------------------------------------------------


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


CHI_SQUARE_19 = 43.82
"""99.9% of chi-square with 19 degrees of freedom; the seeds are fixed, so this cannot flake"""


@pytest.mark.parametrize("across", ["seeds", "steps"])
def test_draws_follow_the_distribution(across: str) -> None:
    n, vocab = 8192, 20
    logits = seeded(vocab, 1, spread=1.0)
    params = SamplingParams(temperature=0.8)
    if across == "seeds":
        rows = [Row(replace(params, seed=seed)) for seed in range(n)]
    else:
        rows = [Row(replace(params, seed=7), output_token_ids=range(step)) for step in range(n)]
    ids = [token.id for token in sample(logits.expand(n, -1), rows)]
    expected = (logits[0].double() / 0.8).softmax(-1).numpy() * n
    assert chi_square(np.bincount(ids, minlength=vocab), expected) < CHI_SQUARE_19


def test_filtered_draws_follow_the_filtered_distribution() -> None:
    n, vocab = 8192, 3000
    logits = seeded(vocab, 1)
    rows = [Row(SamplingParams(temperature=1.0, top_k=20, seed=seed)) for seed in range(n)]
    ids = [token.id for token in sample(logits.expand(n, -1), rows)]
    best = logits[0].topk(20)
    counts = np.bincount(ids, minlength=vocab)[best.indices.numpy()]
    assert counts.sum() == n
    assert chi_square(counts, best.values.double().softmax(-1).numpy() * n) < CHI_SQUARE_19


def test_uniforms_are_pinned() -> None:
    """A change here changes what every published seed gives."""
    assert uniform(0, 0) == 0.011546754286331562
    assert uniform(0, 1) == 0.5023796042735054
    assert uniform(2**63 - 1, 12345) == 0.07949942719699055


@pytest.mark.parametrize("vocab", [1, 2, 3, 1000, 49_152])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(vocab: int) -> None:
    """Zeros stand at both ends and everywhere between; the last u below 1 must not reach one."""
    z = seeded(vocab, 8).clamp(max=0)
    z[:, ::2] = -torch.inf
    z[:, vocab // 2] = 0
    scale = weight_scale(vocab)
    for u in (0.0, 2.0**-53, 0.5, 1 - 2.0**-53):
        column = draw(z, torch.full((8,), u, dtype=torch.float64), scale)
        assert (weights(z, scale).gather(1, column[:, None]) > 0).all(), u


@pytest.mark.parametrize("vocab", [2**18 - 1, 2**18, 262_208])
def test_weights_of_a_large_vocabulary_sum_exactly(vocab: int) -> None:
    total = weights(torch.zeros(1, vocab), weight_scale(vocab)).cumsum(-1, dtype=torch.float64)
    assert int(total[0, -1]) == vocab * int(weight_scale(vocab)) <= 2**53


# --- penalties, bans, alternatives ----------------------------------------------------------------


def test_min_new_tokens_bans_every_ending_until_it_is_reached() -> None:
    logits = torch.zeros(1, 10)
    logits[0, [1, 3, 6]] = 50.0
    logits[0, 8] = 10.0
    params = SamplingParams(min_new_tokens=2, stop_token_ids=frozenset({6, 99}))
    for ignore_eos in (False, True):
        now = replace(params, ignore_eos=ignore_eos)
        assert sample(logits, [Row(now, output_token_ids=[5])])[0].id == 8
        assert sample(logits, [Row(now, output_token_ids=[5, 5])])[0].id == 1


def test_an_eos_outside_the_vocabulary_is_no_error() -> None:
    rows = [Row(SamplingParams(min_new_tokens=1))]
    token = Sampler(10, frozenset({50_256}), "cpu").sample(seeded(10, 1), rows)[0]
    assert token is not None


def test_a_bias_outside_the_vocabulary_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="token ids 10 to 10 in a vocabulary of 10"):
        sample(seeded(10, 1), [Row(SamplingParams(logit_bias=((10, 1.0),)))])


def test_greedy_ties_go_to_the_first_id() -> None:
    rows = [Row(), Row(SamplingParams(logit_bias=((5, 0.0),)))]
    assert [token.id for token in sample(torch.zeros(2, 40), rows)] == [0, 0]


def test_top_tokens_are_the_models_own_most_likely_first() -> None:
    logits = seeded(5000, 3)
    params = SamplingParams(
        temperature=1.3, top_k=2, logit_bias=((0, 100.0),), repetition_penalty=1.5
    )
    rows = [Row(replace(params, top_n_tokens=n)) for n in (0, 5, 20)]
    tokens = sample(logits, rows)
    logp = logits.log_softmax(-1)
    assert tokens[0].top == ()
    for i, n in ((1, 5), (2, 20)):
        best = logp[i].topk(n)
        assert [id_ for id_, _ in tokens[i].top] == best.indices.tolist()
        assert [lp for _, lp in tokens[i].top] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert tokens[i].id == 0
        assert tokens[i].logprob == pytest.approx(float(logp[i, 0]), abs=1e-5)


def test_tied_alternatives_come_by_id_and_impossible_ones_not_at_all() -> None:
    logits = torch.full((2, 3000), -torch.inf)
    logits[0] = 0.0
    logits[1, [2000, 7]] = 0.0
    rows = [Row(SamplingParams(top_n_tokens=4)) for _ in range(2)]
    tops = [[id_ for id_, _ in token.top] for token in sample(logits, rows)]
    assert tops == [[0, 1, 2, 3], [7, 2000]]


@pytest.mark.parametrize("chunk_elements", [1, 1000, 10**9])
def test_prompt_logprobs(chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_CHUNK_ELEMENTS", chunk_elements)
    logits = seeded(300, 7).bfloat16()
    next_ids = torch.tensor([0, 299, 5, 5, 17, 100, 3])
    expected = logits.float().log_softmax(-1)[torch.arange(7), next_ids]
    assert prompt_logprobs(logits, next_ids) == pytest.approx(expected.tolist(), abs=1e-5)
    assert prompt_logprobs(logits[:0], next_ids[:0]) == []


# --- rows that have no distribution ---------------------------------------------------------------

EVERY_PATH = [
    SamplingParams(),
    SamplingParams(logit_bias=((2, 1.0),), repetition_penalty=1.2, frequency_penalty=0.5),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=1.0, seed=2, top_k=5),
    SamplingParams(temperature=1.0, seed=3, top_p=0.7),
    SamplingParams(temperature=1.0, seed=4, min_p=0.1),
    SamplingParams(temperature=1.0, seed=5, typical_p=0.8),
    SamplingParams(temperature=1.0, seed=6, top_k=200, top_p=0.9, min_p=0.01, typical_p=0.9),
    SamplingParams(top_n_tokens=3),
]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("params", EVERY_PATH)
def test_a_broken_row_is_none_and_touches_no_other(value: float, params: SamplingParams) -> None:
    logits = seeded(1500, len(EVERY_PATH) + 1)
    rows = [Row(p, output_token_ids=[4, 4]) for p in EVERY_PATH]
    expected = sample(logits[1:], rows)
    if value == -torch.inf:
        logits[0] = value
    else:
        logits[0, 77] = value
    first, *others = sampler(1500).sample(logits, [Row(params, output_token_ids=[4, 4]), *rows])
    assert first is None
    assert [token and token.id for token in others] == [token.id for token in expected]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_whose_every_token_is_banned_is_none(temperature: float) -> None:
    params = SamplingParams(
        temperature=temperature, min_new_tokens=1, stop_token_ids=frozenset(range(6))
    )
    tokens = sampler(6).sample(torch.zeros(2, 6), [Row(params), Row()])
    assert tokens[0] is None
    assert tokens[1] is not None


def test_no_rows_no_tokens() -> None:
    assert sampler(10).sample(torch.empty(0, 10), []) == []


def test_the_logits_are_left_as_they_were() -> None:
    logits = seeded(1500, len(EVERY_PATH))
    before = logits.clone()
    sample(logits, [Row(p, output_token_ids=[4]) for p in EVERY_PATH])
    assert torch.equal(logits, before)
