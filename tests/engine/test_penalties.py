"""Endings that are banned and token ids that do not exist."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prefixd_server.engine.sampling import Sampler
from prefixd_server.types import SamplingParams
from tests.engine.sampling_rig import Row, sample, seeded


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
