"""The distribution that is drawn from: temperature, top-k, top-p, min-p, typical; and the draw.

The semantics are those of transformers' warpers, in their order, with ``min_tokens_to_keep`` 1.
Where tokens tie at top-p's border transformers leaves the choice to its sort; here the lower id
stays.

**A row's draw does not depend on the rows beside it**, to the last bit, though how it is computed
does (a narrow candidate list, or the whole vocabulary). So probabilities are integers: the weight
of a token is ``round(exp(z) * scale)``, z being its score less the row's maximum and ``scale`` the
power of two (``weight_scale``) for which the sum of V weights still fits a double's 53 bits. Such
sums are exact, so they do not depend on order, padding or device. What it costs: a token less
likely than the likeliest by ``2 * scale`` (2^38 for V = 49,152) is never drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prefixd_server.types import SamplingParams

__all__ = ["Support", "draw", "supports", "weight_scale", "weights"]

_WIDTHS = (128, 1024)
"""candidates to try before the whole vocabulary: ``topk`` of 128 is 40 times faster than a sort"""


class Support(NamedTuple):
    """The filtered distributions of some rows, over W candidates in ascending order of id."""

    rows: list[int]
    """[R] positions in the batch"""
    ids: Tensor | None
    """[R, W] token ids; None: W is the vocabulary"""
    z: Tensor
    """[R, W] float32: score over temperature, the row's maximum at 0; −inf where filtered out"""


def weight_scale(vocab_size: int) -> float:
    return 2.0 ** (53 - vocab_size.bit_length())


def weights(z: Tensor, scale: float) -> Tensor:
    """Integers, in float32, that are proportional to the probabilities of ``z``."""
    return z.exp().mul_(scale).round_()


def draw(z: Tensor, uniforms: Tensor, scale: float) -> Tensor:
    """The column ``[R]`` where the inverse CDF of each row of ``z`` ``[R, W]`` takes its uniform.

    ``uniforms`` ``[R]``, float64, in [0, 1). A column of weight 0 is never taken: the CDF is made
    of integers, so it is flat there exactly, and the target stays below its last value.
    """
    cdf = weights(z, scale).cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1:]
    target = torch.minimum(uniforms[:, None] * total, total - 1)
    # NaN rows land anywhere; the caller drops them.
    return torch.searchsorted(cdf, target, right=True)[:, 0].clamp_(max=z.shape[1] - 1)


def supports(scores: Tensor, params: Sequence[SamplingParams], scale: float) -> Iterator[Support]:
    """Split the rows of ``scores`` ``[R, V]`` (consumed) into groups that share a candidate width.

    A narrow group holds the rows whose top-k and top-p were shown to keep only candidates; the
    others go on to the next width, and at last to the whole vocabulary, which needs no showing.
    """
    z = _temper_(scores, params)
    vocab = z.shape[1]
    whole = [i for i, p in enumerate(params) if not _uses_top_k(p, vocab) and p.top_p >= 1.0]
    narrow = sorted(set(range(len(params))).difference(whole))
    mass = _masses(z, params, narrow, scale)
    for width in (w for w in _WIDTHS if w < vocab):
        tried = [i for i in narrow if not _uses_top_k(params[i], vocab) or params[i].top_k < width]
        if tried:
            support = _narrow(z, params, tried, width, mass, scale)
            narrow = sorted(set(narrow).difference(support.rows))
            if support.rows:
                yield _finish(support, params)
    if rest := sorted(narrow + whole):
        kept = _take(z, rest)
        mine = [params[i] for i in rest]
        _cut_top_k_(kept, mine)
        _cut_top_p_(kept, mine, None, scale)
        yield _finish(Support(rest, None, kept), params)


def _uses_top_k(p: SamplingParams, vocab: int) -> bool:
    return 0 < p.top_k < vocab


def _temper_(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Shifting first keeps a tiny temperature from overflowing; z is at most 0, and 0 somewhere."""
    temperature = scores.new_tensor([p.temperature for p in params])[:, None]
    # 1e-50 is 0 in float32, and 0 / 0 is not a greedy choice.
    temperature.clamp_(min=torch.finfo(torch.float32).tiny)
    return scores.sub_(scores.amax(-1, keepdim=True)).div_(temperature)


def _masses(z: Tensor, params: Sequence[SamplingParams], rows: list[int], scale: float) -> Tensor:
    """[R, 1] the whole row's weight where top-p follows no top-k; 0 where nobody asks."""
    asked = [i for i in rows if not _uses_top_k(params[i], z.shape[1])]
    mass = z.new_zeros((len(params), 1), dtype=torch.float64)
    if asked:
        mass[asked] = weights(_take(z, asked), scale).sum(-1, keepdim=True, dtype=torch.float64)
    return mass


def _narrow(
    z: Tensor,
    params: Sequence[SamplingParams],
    rows: list[int],
    width: int,
    mass: Tensor,
    scale: float,
) -> Support:
    """Those of ``rows`` whose support provably lies in the ``width`` best candidates."""
    ids = _take(z, rows).topk(width).indices.sort(-1).values
    candidates = _take(z, rows).gather(1, ids)
    mine = [params[i] for i in rows]
    worst = candidates.amin(-1)
    _cut_top_k_(candidates, mine)
    whole_top_k = _beats(candidates, worst)
    _cut_top_p_(candidates, mine, mass[rows], scale)
    whole_top_p = _beats(candidates, worst)
    # With ties missing from its top-k, a row's top-p would cut at a wrong mass.
    has_top_k = torch.tensor([_uses_top_k(p, z.shape[1]) for p in mine], device=z.device)
    proven = torch.where(has_top_k, whole_top_k, whole_top_p).nonzero()[:, 0]
    return Support([rows[i] for i in proven.tolist()], ids[proven], candidates[proven])


def _beats(z: Tensor, worst: Tensor) -> Tensor:
    """[R] whether all that is kept beats the worst candidate, and so all that is no candidate."""
    return z.masked_fill(z == -torch.inf, torch.inf).amin(-1) > worst


def _cut_top_k_(z: Tensor, params: Sequence[SamplingParams]) -> None:
    def beyond(z: Tensor, rows: list[int]) -> Tensor:
        k = torch.tensor([[params[i].top_k] for i in rows], device=z.device)
        return z < z.topk(int(k.max())).values.gather(1, k - 1)

    _remove_(z, [i for i, p in enumerate(params) if _uses_top_k(p, z.shape[1])], beyond)


def _cut_top_p_(
    z: Tensor, params: Sequence[SamplingParams], mass: Tensor | None, scale: float
) -> None:
    """``mass`` [R, 1] is that of `_masses` where ``z`` holds candidates only."""

    def beyond(z: Tensor, rows: list[int]) -> Tensor:
        best, order = z.sort(dim=-1, descending=True, stable=True)
        best_weights = weights(best, scale)
        mass_to = best_weights.cumsum(-1, dtype=torch.float64)
        total = mass_to[:, -1:]
        if mass is not None:
            total = torch.maximum(total, mass[rows])
        p = torch.tensor([[params[i].top_p] for i in rows], dtype=torch.float64, device=z.device)
        removed = mass_to - best_weights >= p * total
        removed[:, 0] = False
        return removed.scatter(1, order, removed)

    _remove_(z, [i for i, p in enumerate(params) if p.top_p < 1.0], beyond)


def _finish(support: Support, params: Sequence[SamplingParams]) -> Support:
    """Min-p and typical, on what top-k and top-p kept."""
    z = support.z
    mine = [params[i] for i in support.rows]

    def below_min_p(z: Tensor, rows: list[int]) -> Tensor:
        return z < z.new_tensor([[math.log(mine[i].min_p)] for i in rows])

    def untypical(z: Tensor, rows: list[int]) -> Tensor:
        return _untypical(z, z.new_tensor([[mine[i].typical_p] for i in rows], dtype=torch.float64))

    _remove_(z, [i for i, p in enumerate(mine) if p.min_p > 0.0], below_min_p)
    _remove_(z, [i for i, p in enumerate(mine) if p.typical_p < 1.0], untypical)
    return support


def _untypical(z: Tensor, mass: Tensor) -> Tensor:
    """Beyond the ``mass`` whose surprise is nearest to the entropy (arXiv 2202.00666)."""
    logp = z.double().log_softmax(-1)
    p = logp.exp()
    entropy = -(logp * p).nansum(-1, keepdim=True)
    strangeness = (-logp - entropy).abs()
    ascending, order = strangeness.sort(-1)
    last = (p.gather(1, order).cumsum(-1) < mass).sum(-1, keepdim=True)
    return strangeness > ascending.gather(1, last.clamp_(max=z.shape[1] - 1))


def _remove_(z: Tensor, rows: list[int], removed: Callable[[Tensor, list[int]], Tensor]) -> None:
    """Run a filter on the rows that use it, and write −inf where it says."""
    if rows:
        sub = _take(z, rows)
        sub.masked_fill_(removed(sub, rows), -torch.inf)
        if sub is not z:
            z[rows] = sub


def _take(z: Tensor, rows: list[int]) -> Tensor:
    """``z[rows]``, or ``z`` itself where that is all of it (``rows`` ascend)."""
    return z if len(rows) == len(z) else z[rows]
