"""Random batches, and what transformers' own processors make of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as hf

from prefixd_server.types import SamplingParams
from tests.engine.sampling_rig import EOS, Row, seeded

BORDER = 1e-6
"""float32's rounding of a cumulative probability: nearer than this to a threshold, either side"""


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
