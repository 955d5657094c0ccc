"""The search against transformers' own, over random models; and what its pages come to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixd_server.engine.beam_search import BeamSearch
from prefixd_server.engine.penalties import adjust_
from prefixd_server.types import BeamParams, SamplingParams
from tests.engine.beam_oracle import PROMPT, hash_logits, reference_search


def search(
    seed: int, vocab: int, params: SamplingParams, eos: list[int]
) -> list[tuple[list[int], float]]:
    """Our search over the same model, and a check of what it says on the way."""
    assert params.beams is not None
    k = params.beams.num_beams
    state = BeamSearch(
        params.beams, max_new_tokens=params.max_new_tokens, ending_ids=frozenset(eos)
    )
    while not state.done:
        before = state.running
        outputs = [[token.id for token in tokens] for tokens in before]
        logits = torch.stack([hash_logits(seed, vocab, (*PROMPT, *ids)) for ids in outputs])
        logprobs = logits.log_softmax(-1)
        scores = logprobs.clone()
        rows = [
            SimpleNamespace(
                params=params,
                prompt_token_ids=PROMPT,
                output_token_ids=ids,
                banned_token_ids=(),
                forced_token_ids=(),
            )
            for ids in outputs
        ]
        adjust_(scores, rows, frozenset(eos))
        parents = state.advance(scores, logprobs)
        for tokens, parent in zip(state.running, parents, strict=True):
            assert tokens[:-1] == before[parent]
            assert tokens[-1].logprob == logprobs[parent, tokens[-1].id].item()
    assert state.num_generated <= params.max_new_tokens
    assert len(state.best()) == k
    return [([token.id for token in tokens], score) for tokens, score in state.best()]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_beams=st.integers(2, 6),
    num_eos=st.integers(0, 3),
    extra_vocab=st.sampled_from([0, 1, 5, 40]),
    max_new_tokens=st.integers(1, 9),
    length_penalty=st.sampled_from([-1.0, 0.0, 0.8, 1.0, 2.0]),
    early_stopping=st.sampled_from([True, False, "never"]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    min_new_tokens=st.integers(0, 3),
)
def test_tokens_order_and_scores_are_transformers(
    seed: int,
    num_beams: int,
    num_eos: int,
    extra_vocab: int,
    max_new_tokens: int,
    length_penalty: float,
    early_stopping: Any,
    repetition_penalty: float,
    min_new_tokens: int,
) -> None:
    # With fewer tokens than candidates a search must take hopeless ones, whose scores all tie.
    vocab = max(2, 1 + num_eos) * num_beams + num_eos + extra_vocab
    eos = list(range(3, 3 + num_eos))
    min_new_tokens = min(min_new_tokens, max_new_tokens)
    expected = reference_search(
        seed,
        vocab,
        num_beams=num_beams,
        eos=eos,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens or None,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        repetition_penalty=repetition_penalty,
    )
    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        repetition_penalty=repetition_penalty,
        beams=BeamParams(num_beams, num_beams, length_penalty, early_stopping),
    )
    found = search(seed, vocab, params, eos)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert [score for _, score in found] == [score for _, score in expected]


def test_the_n_best_are_the_first_of_all() -> None:
    every = search(5, 40, SamplingParams(max_new_tokens=6, beams=BeamParams(4, 4)), [3])
    assert [score for _, score in every] == sorted((s for _, s in every), reverse=True)
    state = BeamSearch(BeamParams(4, n=2), max_new_tokens=6, ending_ids=frozenset({3}))
    while not state.done:
        rows = [(*PROMPT, *(token.id for token in tokens)) for tokens in state.running]
        logprobs = torch.stack([hash_logits(5, 40, row) for row in rows]).log_softmax(-1)
        state.advance(logprobs, logprobs)
    best = [([token.id for token in tokens], score) for tokens, score in state.best()]
    assert best == every[:2]


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_a_search_ends_before_the_limit_when_nothing_can_improve(early_stopping: Any) -> None:
    """A model that ends at once: no search need run to the limit."""
    logits = torch.zeros(40)
    logits[3] = 20.0
    state = BeamSearch(
        BeamParams(2, 2, 0.0, early_stopping), max_new_tokens=500, ending_ids=frozenset({3})
    )
    while not state.done:
        logprobs = logits.log_softmax(-1).expand(2, -1)
        state.advance(logprobs, logprobs)
    assert state.num_generated < 10
    assert [token.id for token in state.best()[0][0]] == [3]
