"""Randomness: draws follow the distribution, seeds are fixed for ever, weights sum exactly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from prefixd_server.engine.sampling import uniform
from prefixd_server.engine.sampling_filters import draw, weight_scale, weights
from prefixd_server.types import SamplingParams
from tests.engine.sampling_rig import Row, sample, seeded


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
