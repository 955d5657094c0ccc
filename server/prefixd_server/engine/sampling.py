"""Logits to tokens, for a whole batch at once; every row has its own parameters.

A row that is plain greedy costs an argmax and its share of one logsumexp. Whatever else a row asks
for runs on the sub-batch of the rows that ask for it: ``penalties`` moves the logits,
``sampling_filters`` makes the distribution and draws from it.

Order: logit bias, repetition penalty, presence and frequency penalties, minimum length,
temperature, top-k, top-p, min-p, typical. Greedy rows stop before the temperature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from prefixd_server.engine.penalties import SamplingRow, adjust_, needs_adjusting
from prefixd_server.engine.sampling_filters import draw, supports, weight_scale
from prefixd_server.native import kernels
from prefixd_server.native.kernels import Peaks
from prefixd_server.types import Token

__all__ = ["Sampler", "SamplingRow", "prompt_logprobs", "uniform"]

_CHUNK_ELEMENTS = 2**24
"""of float32 logits that `prompt_logprobs` holds at once: 64 MiB"""

_WORK_ELEMENTS = (2**20, 2**26)
"""of logits shaped at once, on a CPU (they stay in its cache: three times faster) and elsewhere"""


class Sampler:
    def __init__(
        self, vocab_size: int, eos_token_ids: frozenset[int], device: torch.device | str
    ) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._device = torch.device(device)
        self._scale = weight_scale(vocab_size)
        self._kernels = kernels.load() if self._device.type == "cpu" else None

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[Token | None]:
        """One token for each row of ``logits`` ``[B, V]``, any float dtype; computed in float32.

        None for a row that has no distribution: its logits hold NaN or +inf, are all −inf, or
        nothing is left of them once its bans are applied. Other rows are not affected.
        """
        assert logits.shape == (len(rows), self._vocab_size), (
            f"logits {tuple(logits.shape)} for {len(rows)} rows of {self._vocab_size}"
        )
        if not rows:
            return []
        scores = logits.to(self._device, torch.float32)
        shaped = [i for i, row in enumerate(rows) if not row.params.greedy or needs_adjusting(row)]
        counts = [row.params.top_n_tokens for row in rows]
        if self._kernels is None or not scores.is_contiguous():
            largest, norm = scores.argmax(-1), scores.logsumexp(-1)
        else:
            peaks = self._kernels.peaks(scores)
            if not shaped and not any(counts):
                return _plain_greedy(peaks)
            largest, norm = torch.from_numpy(peaks.at), torch.from_numpy(peaks.log_sums)
        ids, valid = self._choose(scores, largest, norm.isfinite(), rows, shaped)
        logprobs = scores.gather(1, ids[:, None])[:, 0] - norm
        tops = _alternatives(scores, norm, counts)
        # One copy from the device; a double holds any of the three exactly.
        drawn = torch.stack([ids.double(), logprobs.double(), valid.double()], 1).tolist()
        return [
            Token(int(id_), logprob, top) if ok else None
            for (id_, logprob, ok), top in zip(drawn, tops, strict=True)
        ]

    def _choose(
        self,
        scores: Tensor,
        ids: Tensor,
        valid: Tensor,
        rows: Sequence[SamplingRow],
        shaped: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """ids ``[B]``, and which of them mean something, made of those of the largest and those
        that have a distribution; ``scores`` is left as it is. ``shaped``: rows that are not plain
        greedy."""
        chunk = max(1, _WORK_ELEMENTS[self._device.type != "cpu"] // self._vocab_size)
        for start in range(0, len(shaped), chunk):
            at = shaped[start : start + chunk]
            ids[at], possible = self._shape(scores[at], [rows[i] for i in at])
            valid[at] &= possible
        return ids, valid

    def _shape(self, work: Tensor, rows: Sequence[SamplingRow]) -> tuple[Tensor, Tensor]:
        """As `_choose`, for rows that are not plain greedy; consumes ``work``, a copy."""
        adjusted = [i for i, row in enumerate(rows) if needs_adjusting(row)]
        if len(adjusted) == len(rows):
            adjust_(work, rows, self._eos_token_ids)
        elif adjusted:
            sub = work[adjusted]
            adjust_(sub, [rows[i] for i in adjusted], self._eos_token_ids)
            work[adjusted] = sub
        possible = work.amax(-1).isfinite()
        drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
        if not drawn:
            return work.argmax(-1), possible
        if len(drawn) == len(rows):
            return self._draw(work, rows), possible
        ids = work.argmax(-1)
        ids[drawn] = self._draw(work[drawn], [rows[i] for i in drawn])
        return ids, possible

    def _draw(self, work: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        """ids ``[R]``; consumes ``work`` ``[R, V]``."""
        ids = torch.empty(len(rows), dtype=torch.long, device=work.device)
        u = np.array([uniform(row.params.seed, len(row.output_token_ids)) for row in rows])
        for support in supports(work, [row.params for row in rows], self._scale):
            mine = torch.from_numpy(u[support.rows]).to(work.device)
            column = draw(support.z, mine, self._scale)
            if support.ids is not None:
                column = support.ids.gather(1, column[:, None])[:, 0]
            ids[support.rows] = column
        return ids


def _plain_greedy(peaks: Peaks) -> list[Token | None]:
    """Without torch's operators: after a step the caches hold none of their code, and ten calls
    take a hundredth of the step."""
    logprobs = peaks.largest - peaks.log_sums
    return [
        None if math.isnan(logprob) else Token(id_, logprob)
        for id_, logprob in zip(peaks.at.tolist(), logprobs.tolist(), strict=True)
    ]


def uniform(seed: int, num_output_tokens: int) -> float:
    """The number in [0, 1) that draws a sequence's next token: all the randomness there is.

    Philox 4x64-10 (Salmon et al., SC11) with the seed as its key and the count of tokens so far as
    its counter, top 53 bits of the first word. It has no state, so neither the batch, nor the row,
    nor a preemption can shift it.
    """
    word = np.random.Philox(key=seed, counter=num_output_tokens).random_raw()
    return float((int(word) >> 11) * 2.0**-53)


@torch.inference_mode()
def prompt_logprobs(logits: Tensor, next_ids: Tensor) -> list[float]:
    """log p of ``next_ids`` ``[N]`` under ``logits`` ``[N, V]``, any float dtype, in float32.

    The float32 copy is made a chunk of rows at a time. NaN for a row that has no distribution.
    """
    chunk = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    next_ids = next_ids.to(logits.device)
    found: list[float] = []
    for start in range(0, len(logits), chunk):
        scores = logits[start : start + chunk].float()
        chosen = scores.gather(1, next_ids[start : start + chunk, None])[:, 0]
        found += (chosen - scores.logsumexp(-1)).tolist()
    return found


def _alternatives(
    scores: Tensor, norm: Tensor, counts: Sequence[int]
) -> list[tuple[tuple[int, float], ...]]:
    """Each row's ``counts`` best (id, logprob), ties by id; fewer where fewer are possible."""
    found: list[tuple[tuple[int, float], ...]] = [()] * len(counts)
    users = [i for i, n in enumerate(counts) if n > 0]
    if not users:
        return found
    values, ids = _ordered_top(scores[users], max(counts))
    logprobs = values - norm[users, None]
    for i, row_ids, row_logprobs in zip(users, ids.tolist(), logprobs.tolist(), strict=True):
        best = zip(row_ids[: counts[i]], row_logprobs, strict=False)
        found[i] = tuple((id_, logprob) for id_, logprob in best if logprob > -np.inf)
    return found


def _ordered_top(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """``topk(n)`` whose ties go to the lower id, whatever n is; topk promises no order.

    A few more than n are fetched, so that the ties at its end are usually all there; a stable sort
    decides where they are not.
    """
    vocab = scores.shape[1]
    n, width = min(n, vocab), min(2 * n + 32, vocab)
    ids = scores.topk(width).indices.sort(-1).values
    values, order = scores.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, order)
    if width < vocab and (open_ := (values[:, n - 1] == values[:, -1]).nonzero()[:, 0]).numel():
        full_values, full_ids = scores[open_].sort(dim=-1, descending=True, stable=True)
        values[open_], ids[open_] = full_values[:, :width], full_ids[:, :width]
    return values[:, :n], ids[:, :n]
