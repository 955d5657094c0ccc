"""The hypotheses of one beam request, as the scheduler sees them: k sequences in lockstep.

    prefill   the request's own sequence computes what all hypotheses have in common: the prompt
    fork      it becomes k sequences that share its pages
    decode    all k run in a step, or none does; then each is followed by a child of any of them,
              which shares its parent's pages until it writes (``kv/tables.py``)
    collapse  preempted: all pages go back. The request's own sequence computes the prompt, and what
              the hypotheses begin with together, anew; then they are forked and compute the rest

The sequence keeps the lease, and an encoder-decoder's cross-attention pages, for all of them.
``Scheduler.release`` gives them back with the pages of whatever stage the group is in.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from prefixd_server.kv.allocator import PageAllocator, pages_for
from prefixd_server.kv.tables import replace_tables

if TYPE_CHECKING:
    from prefixd_server.engine.beam_search import BeamSearch
    from prefixd_server.engine.sequence import Sequence

__all__ = ["BeamGroup", "most_pages"]


class BeamGroup:
    def __init__(self, root: Sequence, search: BeamSearch) -> None:
        self.root = root
        self.search = search
        self.beams: list[Sequence] = []
        """the hypotheses; empty until forked, and after a preemption"""
        self.outputs: list[list[int]] = []
        """what each hypothesis has generated; empty before the first fork"""
        self.reserve: list[int] = []
        """pages that admission took for the time after the fork"""

    @property
    def num_beams(self) -> int:
        return self.search.params.num_beams

    def fork(self, allocator: PageAllocator, outputs: list[list[int]]) -> None:
        """The root's tokens are computed: from here on the hypotheses run in its place."""
        root = self.root
        assert not self.beams
        assert root.num_uncomputed == 0
        shared = root.pages
        root.pages = []
        self._replace(allocator, [shared], [root] * len(outputs), [shared] * len(outputs), outputs)

    def follow(self, allocator: PageAllocator, parents: Seq[int], outputs: list[list[int]]) -> None:
        """Replace the beams by children: ``outputs[i]`` continues beam ``parents[i]``."""
        old = [beam.pages for beam in self.beams]
        sources = [self.beams[parent] for parent in parents]
        self._replace(allocator, old, sources, [old[parent] for parent in parents], outputs)

    def collapse(self) -> None:
        """All pages have been given back: the root will compute the common beginning anew."""
        self.beams, self.reserve = [], []
        if self.outputs:
            # Each hypothesis must have a token left to compute: its logits are wanted.
            common = min(_common_length(self.outputs), len(self.outputs[0]) - 1)
            self.root.output_token_ids = self.outputs[0][:common]

    def pages_known(self, page_size: int) -> int:
        """How many pages all tokens so far take, the common ones once."""
        known = len(self.root.prompt_token_ids) + (len(self.outputs[0]) if self.outputs else 0)
        if not self.outputs:
            return pages_for(known, page_size)
        return most_pages(self.root.num_tokens, known, self.num_beams, page_size)

    def _replace(
        self,
        allocator: PageAllocator,
        old: list[list[int]],
        sources: Seq[Sequence],
        tables: Seq[list[int]],
        outputs: list[list[int]],
    ) -> None:
        new = [list(table) for table in tables]
        replace_tables(allocator, old, new)
        self.outputs = outputs
        self.beams = [_child(*of) for of in zip(sources, new, outputs, strict=True)]


def most_pages(num_shared: int, num_tokens: int, num_beams: int, page_size: int) -> int:
    """Pages of ``num_beams`` sequences of ``num_tokens`` that have the first ``num_shared`` in
    common: the full pages of those once, all else for each."""
    full = num_shared // page_size
    return full + num_beams * (pages_for(num_tokens, page_size) - full)


def _child(source: Sequence, pages: list[int], output: list[int]) -> Sequence:
    """Borrows everything but its pages and tokens (lease, cross pages) from the request's own."""
    child = copy.copy(source)
    child.beam_group = None
    child.pages = pages
    child.output_token_ids = output
    return child


def _common_length(outputs: Seq[Seq[int]]) -> int:
    for i, tokens in enumerate(zip(*outputs, strict=True)):
        if len(set(tokens)) > 1:
            return i
    return len(outputs[0])
