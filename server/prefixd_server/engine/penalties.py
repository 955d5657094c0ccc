"""What moves logits before the temperature: bias, penalties, the minimum length, forced tokens.

The order is transformers' (``GenerationMixin._get_logits_processor``): logit bias where its
``SequenceBiasLogitsProcessor`` stands, the repetition penalty, then OpenAI's presence and frequency
penalties, which transformers lacks and vLLM puts here, then the mask of the minimum length, and
last what an encoder-decoder's generation config bans and forces.

Each touches only the entries it changes, as (row, token id) pairs, never the whole ``[R, V]``; the
exception is the count of output tokens, which is a scatter-add.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from prefixd_server.types import SamplingParams

__all__ = ["SamplingRow", "adjust_", "needs_adjusting"]


class SamplingRow(Protocol):
    """What sampling reads of a sequence. Arrays of ids convert faster than lists and tuples do."""

    @property
    def params(self) -> SamplingParams: ...

    @property
    def prompt_token_ids(self) -> Sequence[int]: ...

    @property
    def output_token_ids(self) -> Sequence[int]:
        """generated so far, with what was generated before a preemption"""
        ...

    @property
    def banned_token_ids(self) -> Sequence[int]: ...

    @property
    def forced_token_ids(self) -> Sequence[int]:
        """the next token is one of these, if there are any"""
        ...


def needs_adjusting(row: SamplingRow) -> bool:
    p = row.params
    return (
        p.repetition_penalty != 1.0
        or p.presence_penalty != 0.0
        or p.frequency_penalty != 0.0
        or bool(p.logit_bias)
        or _is_short(row)
        or bool(row.banned_token_ids)
        or bool(row.forced_token_ids)
    )


def adjust_(scores: Tensor, rows: Sequence[SamplingRow], eos_token_ids: frozenset[int]) -> None:
    """Change ``scores`` ``[R, V]``, float32, in place as each row's parameters ask."""
    _add_bias_(scores, rows)
    _penalise_repetition_(scores, rows)
    _penalise_presence_(scores, rows)
    _forbid_ending_(scores, rows, eos_token_ids)
    _ban_and_force_(scores, rows)


def _add_bias_(scores: Tensor, rows: Sequence[SamplingRow]) -> None:
    at, ids = _pairs(scores, ((i, [t for t, _ in row.params.logit_bias]) for i, row in _each(rows)))
    if len(ids):
        bias = scores.new_tensor([b for row in rows for _, b in row.params.logit_bias])
        scores.index_put_((at, ids), bias, accumulate=True)


def _penalise_repetition_(scores: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Divide what is above zero and multiply what is below (after CTRL, arXiv 1909.05858)."""
    users = [(i, row) for i, row in _each(rows) if row.params.repetition_penalty != 1.0]
    prompts = ((i, row.prompt_token_ids) for i, row in users)
    outputs = ((i, row.output_token_ids) for i, row in users)
    at, ids = _pairs(scores, (*prompts, *outputs))
    if len(ids):
        penalty = scores.new_tensor([row.params.repetition_penalty for row in rows])[at]
        seen = scores[at, ids]
        # A token that comes twice is written twice, with the same value.
        scores[at, ids] = torch.where(seen < 0, seen * penalty, seen / penalty)


def _penalise_presence_(scores: Tensor, rows: Sequence[SamplingRow]) -> None:
    """``logit -= frequency_penalty * count + presence_penalty * (count > 0)``, over the output."""
    users = [
        (i, row)
        for i, row in _each(rows)
        if row.params.presence_penalty != 0.0 or row.params.frequency_penalty != 0.0
    ]
    at, ids = _pairs(scores, ((i, row.output_token_ids) for i, row in users))
    if len(ids):
        counts = torch.zeros_like(scores)
        counts.index_put_((at, ids), scores.new_ones(()), accumulate=True)
        frequency = scores.new_tensor([row.params.frequency_penalty for row in rows])[at]
        presence = scores.new_tensor([row.params.presence_penalty for row in rows])[at]
        scores[at, ids] = scores[at, ids] - (frequency * counts[at, ids] + presence)


def _forbid_ending_(scores: Tensor, rows: Sequence[SamplingRow], eos: frozenset[int]) -> None:
    """An id beyond the vocabulary (a tiny model with a large one's EOS) can never come: skipped."""
    vocab = scores.shape[1]
    endings = (
        (i, [t for t in eos | row.params.stop_token_ids if t < vocab])
        for i, row in _each(rows)
        if _is_short(row)
    )
    at, ids = _pairs(scores, endings)
    if len(ids):
        scores[at, ids] = -torch.inf


def _ban_and_force_(scores: Tensor, rows: Sequence[SamplingRow]) -> None:
    at, ids = _pairs(scores, ((i, row.banned_token_ids) for i, row in _each(rows)))
    if len(ids):
        scores[at, ids] = -torch.inf
    forced = [(i, row.forced_token_ids) for i, row in _each(rows) if row.forced_token_ids]
    if forced:
        scores[[i for i, _ in forced]] = -torch.inf
        scores[_pairs(scores, forced)] = 0.0


def _is_short(row: SamplingRow) -> bool:
    return len(row.output_token_ids) < row.params.min_new_tokens


def _each(rows: Sequence[SamplingRow]) -> list[tuple[int, SamplingRow]]:
    return list(enumerate(rows))


def _pairs(
    scores: Tensor, ids_of_rows: Iterable[tuple[int, Sequence[int]]]
) -> tuple[Tensor, Tensor]:
    """(row, token id) of every id, as two index tensors ``[N]`` on the device of ``scores``."""
    rows, parts = [0], [np.empty(0, np.int64)]
    for row, ids in ids_of_rows:
        rows.append(row)
        parts.append(np.asarray(ids, np.int64))
    ids_flat = np.concatenate(parts)
    vocab = scores.shape[1]
    assert not len(ids_flat) or 0 <= ids_flat.min() <= ids_flat.max() < vocab, (
        f"token ids {ids_flat.min()} to {ids_flat.max()} in a vocabulary of {vocab}"
    )
    at = np.repeat(rows, [len(part) for part in parts])
    return (
        torch.from_numpy(at).to(scores.device),
        torch.from_numpy(ids_flat).to(scores.device),
    )
