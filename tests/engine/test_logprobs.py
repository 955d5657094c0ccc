"""What a token is told with: the most likely alternatives, and the prompt's log-probabilities."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prefixd_server.engine import sampling
from prefixd_server.engine.sampling import prompt_logprobs
from prefixd_server.types import SamplingParams
from tests.engine.sampling_rig import Row, sample, seeded


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
