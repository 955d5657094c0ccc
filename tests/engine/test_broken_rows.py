"""Rows that have no distribution touch no other, and the logits stay as they were."""

from __future__ import annotations

import pytest
import torch

from prefixd_server.types import SamplingParams
from tests.engine.sampling_rig import Row, sample, sampler, seeded

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


def test_the_logits_are_left_as_they_were() -> None:
    logits = seeded(1500, len(EVERY_PATH))
    before = logits.clone()
    sample(logits, [Row(p, output_token_ids=[4]) for p in EVERY_PATH])
    assert torch.equal(logits, before)
