"""Sequences that begin alike share the pages of what they have in common.

Keys and values of a token depend on the prefix, on the position of the first token and on all
tokens up to it. They are found again by exactly that, and by the tenant: two tenants share nothing,
so how fast an answer comes tells nobody what others have asked.

    take    at admission: the full pages that are known, from the first on, are shared. The last
            token is always computed, for its logits are wanted
    offer   after a step with finite logits: pages that it filled can be found from now on. Only
            what led to such logits is, so a prompt in chunks is offered when its last has run
    drop    the step broke or the logits were not finite: nothing of the sequence is found again

A sequence that generates offers its output too, for the conversation's next turn begins with it;
a beam search offers its prompt. Preempted, a sequence finds its own pages, if they are still there.
"""

from __future__ import annotations

import hashlib

from prefixd_server.engine.sequence import Sequence
from prefixd_server.kv.allocator import PageAllocator
from prefixd_server.kv.page_cache import PageCache, page_key

__all__ = ["PromptCache"]


class PromptCache:
    def __init__(self, allocator: PageAllocator, *, enabled: bool) -> None:
        self.pages = PageCache(allocator)
        self.num_queried_tokens = 0
        """of the sequences that were admitted and might take some; each counts once"""
        self.num_hit_tokens = 0
        """those that need not be computed"""
        self._page_size = allocator.page_size
        self._enabled = enabled

    def take(self, sequence: Sequence) -> list[int]:
        """Pages of the sequence's first tokens, shared with it; maybe none."""
        if not self._may_take(sequence):
            return []
        most = min(_num_cacheable(sequence), sequence.num_tokens - 1) // self._page_size
        return self.pages.take(self._keys(sequence, most))

    def admitted(self, sequence: Sequence, num_pages: int) -> None:
        """It runs, with ``num_pages`` that :meth:`take` gave it at the beginning of its pages."""
        sequence.num_offered = num_pages
        sequence.num_computed = num_pages * self._page_size
        if self._may_take(sequence) and sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = sequence.num_computed
            self.num_queried_tokens += sequence.num_tokens
            self.num_hit_tokens += sequence.num_computed

    def offer(self, sequence: Sequence) -> None:
        """The tokens computed so far led to finite logits."""
        full = min(_num_cacheable(sequence), sequence.num_computed) // self._page_size
        if not self._enabled or full <= sequence.num_offered:
            return
        keys = self._keys(sequence, full)
        # Hypotheses have the prompt's full pages in common.
        pages = sequence.branches[0].pages
        for i in range(sequence.num_offered, full):
            self.pages.put(keys[i], pages[i])
        sequence.num_offered = full

    def drop(self, sequence: Sequence) -> None:
        """Whether the sequence still holds its pages or not; hypotheses stand for their search."""
        self.pages.drop(sequence.page_keys)

    def check(self) -> None:
        self.pages.check()

    def _may_take(self, sequence: Sequence) -> bool:
        # Something is wanted of every token of the prompt: its log-probability, its KV as computed.
        every = sequence.params.prompt_logprobs or sequence.request.capture_kv
        return self._enabled and not every

    def _keys(self, sequence: Sequence, count: int) -> list[bytes]:
        """The names of its first ``count`` pages."""
        keys, size = sequence.page_keys, self._page_size
        for i in range(len(keys), count):
            previous = keys[i - 1] if i else _root(sequence)
            keys.append(page_key(previous, sequence.tokens(i * size, (i + 1) * size)))
        return keys[:count]


def _num_cacheable(sequence: Sequence) -> int:
    """How many tokens a later sequence may want: of a beam search, what comes after the prompt is
    a hypothesis's own, and may change."""
    return len(sequence.prompt_token_ids) if sequence.beam_group else sequence.num_tokens


def _root(sequence: Sequence) -> bytes:
    """What the first token's keys and values depend on, beside the model."""
    prefix = sequence.prefix.sha256 if sequence.prefix else None
    of = (sequence.request.tenant, prefix, sequence.position_offset)
    return hashlib.sha256(repr(of).encode()).digest()
