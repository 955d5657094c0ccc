"""One running sequence: what was asked, what was generated, what it holds.

A sequence holds up to four things, and :meth:`Scheduler.release` gives all of them back:

    pin          the identity of its prefix version, from admission to the end (residency counts)
    lease        the prefix's pages on the device, while it is scheduled
    pages        the pages of its own tokens, while it is scheduled
    cross_pages  of an encoder-decoder: the pages of cross-attention's KV, while it is scheduled

Preemption gives back lease and pages, and the tokens are computed again later.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from prefixd_server.prefix.entry import Lease
from prefixd_server.types import EngineRequest, PrefixVersion, SamplingParams

if TYPE_CHECKING:
    from prefixd_server.engine.beam_group import BeamGroup

__all__ = ["Sequence", "Status"]


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    def __init__(
        self,
        request: EngineRequest,
        prompt_token_ids: tuple[int, ...],
        prefix: PrefixVersion | None,
        *,
        encoder_token_ids: tuple[int, ...] = (),
        forced_first: tuple[int, ...] = (),
        forced_last: tuple[int, ...] = (),
        banned_token_ids: tuple[int, ...] = (),
    ) -> None:
        self.request = request
        self.request_id = request.request_id
        self.params: SamplingParams = request.sampling
        self.encoder_token_ids = encoder_token_ids
        """of an encoder-decoder: the client's text; the prompt is then the decoder's start"""
        self.forced_first = forced_first
        self.forced_last = forced_last
        self.banned_token_ids = banned_token_ids
        self.prompt_token_ids = prompt_token_ids
        self.prefix = prefix
        self.prefix_len = prefix.sites.decoder if prefix else 0
        """virtual tokens that the sequence's own tokens attend to"""
        self.position_offset = prefix.decoder_offset if prefix else 0
        """the position id of the first prompt token"""
        self.output_token_ids: list[int] = []
        self.prompt_logprobs: list[float] = []
        self.started = False
        """the client has been told of the version and the prompt"""
        self.status = Status.WAITING
        self.num_computed = 0
        """own tokens whose KV is in ``pages``; less than ``num_tokens`` between steps"""
        self.page_keys: list[bytes] = []
        """what the first full pages hold, as the prompt cache names it"""
        self.num_offered = 0
        """how many of ``pages`` came out of the prompt cache or were offered to it"""
        self.num_cached_tokens: int | None = None
        """tokens that the prompt cache had at the first admission; None before"""
        self.pages: list[int] = []
        self.cross_pages: list[int] = []
        self.lease: Lease | None = None
        self.beam_group: BeamGroup | None = None
        """of a beam search: the hypotheses, which run in this one's place once its prompt has"""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def branches(self) -> Seq[Sequence]:
        """What runs in a step, in lockstep: itself, or the hypotheses that it has forked into."""
        return (self.beam_group and self.beam_group.beams) or (self,)

    @property
    def num_seats(self) -> int:
        """How many of the ``max_num_seqs`` it takes, from its prefill on."""
        return self.beam_group.num_beams if self.beam_group else 1

    @property
    def num_unencoded(self) -> int:
        """Tokens of the encoder that run with the next step: all in the first, then none."""
        return 0 if self.num_computed else len(self.encoder_token_ids)

    @property
    def forced_token_ids(self) -> tuple[int, ...]:
        """The next token is one of these, if there are any (as transformers' processors force)."""
        if len(self.output_token_ids) == self.params.max_new_tokens - 1 and self.forced_last:
            return self.forced_last
        return () if self.output_token_ids else self.forced_first

    @property
    def order(self) -> tuple[int, float, str]:
        """Who goes first, and who is preempted last."""
        return (self.request.priority, self.request.arrival, self.request.request_id)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Own tokens ``start`` … ``stop - 1``, prompt then output."""
        split = len(self.prompt_token_ids)
        prompt = self.prompt_token_ids[start:stop] if start < split else ()
        return [*prompt, *self.output_token_ids[max(0, start - split) : max(0, stop - split)]]
