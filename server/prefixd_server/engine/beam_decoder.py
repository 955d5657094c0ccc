"""Moves beam searches on by one step: logits in, the hypotheses of the next step out."""

from __future__ import annotations

import torch
from torch import Tensor

from prefixd_server.engine.beam_group import BeamGroup
from prefixd_server.engine.beam_search import BeamSearch
from prefixd_server.engine.penalties import adjust_, needs_adjusting
from prefixd_server.engine.sequence import Sequence
from prefixd_server.kv.allocator import PageAllocator
from prefixd_server.types import Finish, FinishReason, Hypothesis, SamplingParams

__all__ = ["BeamDecoder", "NoDistribution"]


class NoDistribution(ValueError):
    """The logits hold NaN or +inf, or nothing is left of them once bans are applied."""


class BeamDecoder:
    def __init__(self, allocator: PageAllocator, eos_token_ids: frozenset[int]) -> None:
        self._allocator = allocator
        self._eos_token_ids = eos_token_ids

    def begin(self, sequence: Sequence) -> None:
        """Make the sequence of a request with ``beams`` one that will fork."""
        params = sequence.params
        assert params.beams is not None
        eos = frozenset() if params.ignore_eos else self._eos_token_ids
        search = BeamSearch(
            params.beams,
            max_new_tokens=params.max_new_tokens,
            ending_ids=eos | params.stop_token_ids,
        )
        sequence.beam_group = BeamGroup(sequence, search)

    @torch.inference_mode()
    def advance(self, sequence: Sequence, logits: Tensor) -> Finish | None:
        """Take the step that the branches' ``logits``, [1 or k, V], allow; the end, if it is one.

        Raises NoDistribution.
        """
        group = sequence.beam_group
        assert group is not None
        scores, logprobs = self._scores(sequence, logits.float())
        if group.outputs and not group.beams:
            # Preempted before: what it computed again was known, the last hypotheses go on.
            group.fork(self._allocator, group.outputs)
            return None
        search = group.search
        parents = search.advance(
            scores.expand(group.num_beams, -1), logprobs.expand(group.num_beams, -1)
        )
        if search.done:
            return self._finish(sequence.params, search)
        outputs = [[token.id for token in tokens] for tokens in search.running]
        if group.beams:
            group.follow(self._allocator, parents, outputs)
        else:
            group.fork(self._allocator, outputs)
        return None

    def _scores(self, sequence: Sequence, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What to search by, and the model's own log-probabilities; float32, both [1 or k, V]."""
        logprobs = scores = logits.log_softmax(-1)
        if any(needs_adjusting(branch) for branch in sequence.branches):
            scores = logprobs.clone()
            adjust_(scores, sequence.branches, self._eos_token_ids)
        if not bool(scores.amax().isfinite()):  # the maximum of a NaN and anything is NaN
            raise NoDistribution
        return scores, logprobs

    def _finish(self, params: SamplingParams, search: BeamSearch) -> Finish:
        found = tuple(
            Hypothesis(tokens, score, self._reason(params, tokens[-1].id))
            for tokens, score in search.best()
        )
        return Finish(found[0].reason, hypotheses=found)

    def _reason(self, params: SamplingParams, last: int) -> FinishReason:
        if not params.ignore_eos and last in self._eos_token_ids:
            return FinishReason.EOS
        if last in params.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH
