"""Which hypotheses a beam search keeps: ``GenerationMixin._beam_search`` of transformers 5.

One object is one request's search. It knows log-probabilities and tokens, no model and no pages.
It does the same float32 arithmetic in the same order as transformers, for one row of its batch, so
that tokens and scores agree to the last bit where the log-probabilities do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prefixd_server.types import BeamParams, Token

__all__ = ["BeamSearch"]

_HOPELESS = -1.0e9
"""what transformers adds to the score of what must not be chosen: finite, so that it still sorts"""

Tokens = tuple[Token, ...]


class _Candidates(NamedTuple):
    """The best continuations over all beams, best first; K of each."""

    scores: Tensor
    """[K] float32, on the host: accumulated"""
    parents: list[int]
    tokens: list[Tokens]
    """with their parents' tokens before them"""
    ended: Tensor
    """[K] bool"""


class BeamSearch:
    """``max_new_tokens`` ends every hypothesis, ``ending_ids`` are the tokens that end one."""

    def __init__(
        self, params: BeamParams, *, max_new_tokens: int, ending_ids: frozenset[int]
    ) -> None:
        self.params = params
        self.max_new_tokens = max_new_tokens
        self.ending_ids = ending_ids
        k = params.num_beams
        # Enough to go on with k beams should every other candidate end.
        self._num_candidates = max(2, 1 + len(ending_ids)) * k
        self.num_generated = 0
        self.done = False
        self.running: list[Tokens] = [()] * k
        # All beams are the prompt at first: only one of them may have continuations.
        self._running_scores = torch.full((k,), _HOPELESS)
        self._running_scores[0] = 0.0
        self._finished: list[Tokens] = [()] * k
        self._finished_scores = torch.full((k,), _HOPELESS)
        self._is_finished = torch.zeros(k, dtype=torch.bool)
        self._can_improve = True

    def advance(self, scores: Tensor, logprobs: Tensor) -> list[int]:
        """Take one step; returns the parent of each beam that runs on, by its old place.

        ``scores`` [k, V], float32: the model's log-probabilities for each running beam's next token
        after the logits processors, which transformers too applies to log-probabilities.
        ``logprobs`` [k, V]: before them, for the tokens' own record. ``running`` holds the new
        beams' tokens. Nothing may follow once ``done``.
        """
        assert not self.done
        found = self._candidates(scores, logprobs)
        parents = self._run_on(found)
        self._finish(found)
        self.num_generated += 1
        self._can_improve = self._can_improve and self._may_improve()
        full = self.params.early_stopping is True and bool(self._is_finished.all())
        self.done = not self._can_improve or full or bool(found.ended.all())
        return parents

    def best(self) -> list[tuple[Tokens, float]]:
        """The ``n`` best finished hypotheses with their scores, best first."""
        every = zip(
            self._finished, self._finished_scores.tolist(), self._is_finished.tolist(), strict=True
        )
        return [(tokens, score) for tokens, score, ok in every if ok][: self.params.n]

    def _candidates(self, scores: Tensor, logprobs: Tensor) -> _Candidates:
        vocab = scores.shape[1]
        total = (scores + self._running_scores.to(scores.device)[:, None]).view(-1)
        values, index = total.topk(min(self._num_candidates, len(total)))
        own = logprobs.reshape(-1)[index]
        # One transfer; float64 holds an index and a float32 exactly.
        best, places, logprob = torch.stack([values.double(), index.double(), own.double()]).cpu()
        found = [divmod(int(place), vocab) for place in places.tolist()]
        parents = [parent for parent, _ in found]
        tokens = [
            (*self.running[parent], Token(token, logprob_))
            for (parent, token), logprob_ in zip(found, logprob.tolist(), strict=True)
        ]
        is_last = self.num_generated + 1 >= self.max_new_tokens
        ended = torch.tensor([is_last or token in self.ending_ids for _, token in found])
        return _Candidates(best.float(), parents, tokens, ended)

    def _run_on(self, found: _Candidates) -> list[int]:
        scores = found.scores + found.ended.float() * _HOPELESS
        self._running_scores, order = scores.topk(self.params.num_beams)
        self.running = [found.tokens[i] for i in order.tolist()]
        return [found.parents[i] for i in order.tolist()]

    def _finish(self, found: _Candidates) -> None:
        """Put the candidates that have ended among the k best finished ones."""
        k, length = self.params.num_beams, self.num_generated + 1
        # The candidates after the first k only stand by for the running beams.
        ended = found.ended & (torch.arange(len(found.ended)) < k)
        scores = found.scores / length**self.params.length_penalty
        if self.params.early_stopping is True and bool(self._is_finished.all()):
            scores = scores + _HOPELESS
        if not self._can_improve:
            scores = scores + _HOPELESS
        scores = scores + (~ended).float() * _HOPELESS
        merged = torch.cat((self._finished_scores, scores))
        is_finished = torch.cat((self._is_finished, ended))
        tokens = [*self._finished, *found.tokens]
        self._finished_scores, order = merged.topk(k)
        self._is_finished = is_finished[order]
        self._finished = [tokens[i] for i in order.tolist()]

    def _may_improve(self) -> bool:
        """Whether a running beam may still beat the worst finished one, at a guess.

        The guess is that it ends now; with ``early_stopping`` "never" and a penalty that favours
        length, that it loses nothing until ``max_new_tokens``, which is no guess but a bound.
        """
        penalty, length = self.params.length_penalty, self.num_generated
        if self.params.early_stopping == "never" and penalty > 0.0:
            length = self.max_new_tokens
        best = self._running_scores[:1] / length**penalty
        worst = torch.where(self._is_finished, self._finished_scores.min(), _HOPELESS)
        return bool((best > worst).any())
