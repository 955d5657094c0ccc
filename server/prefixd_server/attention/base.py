"""The seam between the model's own code and the paged KV cache.

The engine describes a step as :class:`SequenceSpan` s, one a sequence, in the order in which their
tokens are packed into ``input_ids [1, T]``. A backend turns them into its own metadata once a step
(:meth:`AttentionBackend.plan`), and is then called once a layer through transformers'
``AttentionInterface`` with the metadata passed explicitly.

What a token sees: every token of its prefix, then its own sequence up to itself. Prefix and own
tokens are two page lists, since a prefix of any length P ends inside a page that belongs to it
alone. Sliding windows count by index in that joint sequence, so a prefix ages out like any token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from prefixd_server.kv.pool import KVPool

__all__ = [
    "AttentionBackend",
    "CrossSpan",
    "DecodePlan",
    "LayerOptions",
    "RelativeBias",
    "SequenceSpan",
    "Span",
    "StepPlan",
]

RelativeBias = Callable[[Tensor], Tensor]
"""relative positions (key's minus query's) [...], int64 -> what to add to the scores, [..., H]"""


class SequenceSpan(NamedTuple):
    """One sequence's part of a step: ``query_len`` new tokens after ``context_len`` cached ones."""

    query_len: int
    context_len: int
    """own tokens whose KV is in ``pages`` already"""
    pages: Sequence[int]
    """own pages; hold at least context_len + query_len tokens"""
    prefix_pages: Sequence[int] = ()
    prefix_len: int = 0
    position_offset: int = 0
    """the position of own token 0, for a relative bias; keys stand at their index in the joint
    sequence, and the query at its position (so with offset 0 they count past it, as AdapterHub's
    T5 does)"""

    @property
    def num_keys(self) -> int:
        """Own tokens that the last query sees."""
        return self.context_len + self.query_len

    @property
    def first_new(self) -> int:
        """The first own token whose KV comes with this step."""
        return self.context_len


class CrossSpan(NamedTuple):
    """One sequence's cross-attention in a step: ``query_len`` decoder tokens, each of which sees
    the prefix and all ``num_keys`` tokens of the encoder."""

    query_len: int
    num_keys: int
    pages: Sequence[int]
    is_new: bool
    """the keys of the encoder's tokens come with this step; otherwise they are in ``pages``"""
    prefix_pages: Sequence[int] = ()
    prefix_len: int = 0

    @property
    def first_new(self) -> int:
        return 0 if self.is_new else self.num_keys


Span = SequenceSpan | CrossSpan


@dataclass(frozen=True, slots=True)
class LayerOptions:
    """What the model's own code says about one attention call."""

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    relative_bias: RelativeBias | None = None


class StepPlan(ABC):
    """A backend's metadata for one step. Passed through ``model(..., attention_plan=plan)``."""

    @abstractmethod
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: LayerOptions
    ) -> Tensor:
        """Store the new key and value, [T, H_kv, D], and return attention's output, [T, H, D].

        query is [T, H, D]; T is the packed tokens of the step. In cross-attention the new keys are
        those of the encoder's tokens of all spans that are new, packed, and maybe none.
        """


class DecodePlan(StepPlan):
    """A plan for any step of single queries, up to so many, whose metadata stays in fixed buffers:
    what a CUDA graph can be captured with. T is always the plan's number of rows; those beyond the
    step's sequences store nothing and come out as zeros."""

    @abstractmethod
    def fits(self, spans: Sequence[Span]) -> bool:
        """Whether the buffers hold this step's page lists."""

    @abstractmethod
    def fill(self, spans: Sequence[Span]) -> None:
        """Before each run: queue the copies of the step's metadata on the current stream."""


class AttentionBackend(ABC):
    def __init__(self, pool: KVPool) -> None:
        self.pool = pool

    @abstractmethod
    def plan(self, spans: Sequence[Span]) -> StepPlan: ...

    def check(self) -> None:  # noqa: B027
        """Raises where the backend cannot run on this machine."""

    def decode_plan(self, rows: int, *, grouped: bool) -> DecodePlan | None:
        """None: this backend's launches depend on the step, so no graph can hold them.

        ``grouped``: sequences of one prefix read it together, as ``work.grouping_pays`` tells.
        """
        return None
