"""One running sequence: what was asked, what was generated, what it holds.

A sequence holds up to three things, and :meth:`Scheduler.release` gives all of them back:

    pin     the identity of its prefix version, from admission to the end (residency counts them)
    lease   the prefix's pages on the device, while it is scheduled
    pages   the pages of its own tokens, while it is scheduled

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
    ) -> None:
        self.request = request
        self.prompt_token_ids = prompt_token_ids
        self.prefix = prefix
        self.output_token_ids: list[int] = []
        self.prompt_logprobs: list[float] = []
        self.started = False
        """the client has been told of the version and the prompt"""
        self.status = Status.WAITING
        self.num_computed = 0
        """own tokens whose KV is in ``pages``; less than ``num_tokens`` between steps"""
        self.pages: list[int] = []
        self.lease: Lease | None = None
        self.beam_group: BeamGroup | None = None
        """of a beam search: the hypotheses, which run in this one's place once its prompt has"""

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def params(self) -> SamplingParams:
        return self.request.sampling

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
    def prefix_len(self) -> int:
        return self.prefix.num_virtual_tokens if self.prefix else 0

    @property
    def position_offset(self) -> int:
        """The position id of the first prompt token."""
        return self.prefix.query_offset if self.prefix else 0

    @property
    def order(self) -> tuple[int, float, str]:
        """Who goes first, and who is preempted last."""
        return (self.request.priority, self.request.arrival, self.request.request_id)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Own tokens ``start`` … ``stop - 1``, prompt then output."""
        split = len(self.prompt_token_ids)
        prompt = self.prompt_token_ids[start:stop] if start < split else ()
        return [*prompt, *self.output_token_ids[max(0, start - split) : max(0, stop - split)]]
