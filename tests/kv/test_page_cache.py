"""The page cache against a model that remembers what was written to every page, and when."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from hashlib import sha256

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prefixd_server.kv.allocator import PageAllocator
from prefixd_server.kv.page_cache import PageCache, page_key

picks = st.integers(0, 1 << 16)
histories = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(tuple)
"""A page a token: short ones of two tokens meet often."""

History = tuple[int, ...]


def keys_of(history: History) -> list[bytes]:
    keys = [b"root"]
    for token in history:
        keys.append(page_key(keys[-1], [token]))
    return keys[1:]


class Owner:
    def __init__(self, history: History, pages: list[int]) -> None:
        self.history = history
        self.pages = pages


class PageCacheMachine(RuleBasedStateMachine):
    """Owners compute histories, a page a token. ``found`` is what they can find, ``idle`` who of
    it has no owner, in the order in which the last one left."""

    def __init__(self) -> None:
        super().__init__()
        self.owners: list[Owner] = []
        self.memory: dict[int, History] = {}
        self.found: dict[History, int] = {}
        self.idle: list[int] = []
        self.num_evictions = 0

    @initialize(num_pages=st.integers(1, 9))
    def start(self, num_pages: int) -> None:
        self.allocator = PageAllocator(num_pages, 1)
        self.cache = PageCache(self.allocator)

    @rule(history=histories)
    def begin(self, history: History) -> None:
        """Take what is known of a history, then pages for the rest, or change nothing."""
        known = 0
        while known < len(history) and history[: known + 1] in self.found:
            known += 1
        taken = self.cache.take(keys_of(history))
        assert taken == [self.found[history[: i + 1]] for i in range(known)]
        for i, page in enumerate(taken):
            assert self.memory[page] == history[: i + 1], "not what it was found by"
        new = self.allocator.allocate(len(history) - known)
        if new is None:
            self.allocator.release(reversed(taken))
            self._note_idle(reversed(taken))
            return
        self.idle = [page for page in self.idle if page not in taken]
        self.owners.append(Owner(history, taken + new))
        self._note_given_away(new)
        for i, page in enumerate(new, known):
            self.memory[page] = history[: i + 1]

    @precondition(lambda self: self.owners)
    @rule(owner=picks, count=st.integers(0, 4))
    def put(self, owner: int, count: int) -> None:
        mine = self._owner(owner)
        for i, key in enumerate(keys_of(mine.history)[:count]):
            self.cache.put(key, mine.pages[i])
            self.found.setdefault(mine.history[: i + 1], mine.pages[i])

    @precondition(lambda self: self.owners)
    @rule(owner=picks)
    def leave(self, owner: int) -> None:
        mine = self._owner(owner)
        self.owners.remove(mine)
        self.allocator.release(reversed(mine.pages))
        self._note_idle(reversed(mine.pages))

    @rule(history=histories)
    def drop(self, history: History) -> None:
        self.cache.drop(keys_of(history))
        for i in range(len(history)):
            page = self.found.pop(history[: i + 1], None)
            self.idle = [other for other in self.idle if other != page]

    @rule(count=st.integers(1, 9))
    def others_need_pages(self, count: int) -> None:
        free = self.allocator.num_free
        pages = self.allocator.allocate(count)
        assert (pages is None) == (count > free)
        if pages is not None:
            self._note_given_away(pages)
            for page in pages:
                self.memory[page] = ()
            self.allocator.release(pages)

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "cache"):
            return
        owned = {page for owner in self.owners for page in owner.pages}
        self.allocator.check([owner.pages for owner in self.owners])
        self.cache.check()
        assert self.allocator.num_used == len(owned)
        assert len(self.cache) == len(self.found)
        assert self.cache.num_evictions == self.num_evictions
        assert set(self.idle) == set(self.found.values()) - owned
        for owner in self.owners:
            for i, page in enumerate(owner.pages):
                assert self.memory[page] == owner.history[: i + 1], "overwritten while owned"

    def _note_idle(self, pages: Iterable[int]) -> None:
        owned = {page for owner in self.owners for page in owner.pages}
        for page in pages:
            if page in self.found.values() and page not in owned:
                self.idle = [*(other for other in self.idle if other != page), page]

    def _note_given_away(self, pages: list[int]) -> None:
        """Blank pages go first, then the ones that have been idle longest."""
        gone = [page for page in self.idle if page in pages]
        assert gone == self.idle[: len(gone)]
        if gone:
            owned = {page for owner in self.owners for page in owner.pages}
            assert {*range(self.allocator.num_pages)} == owned | {*pages} | {*self.idle}
        self.idle = self.idle[len(gone) :]
        self.found = {history: page for history, page in self.found.items() if page not in gone}
        self.num_evictions += len(gone)

    def _owner(self, pick: int) -> Owner:
        return self.owners[pick % len(self.owners)]


PageCacheMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None
)
TestPageCache = PageCacheMachine.TestCase


def test_a_key_is_the_chained_digest() -> None:
    first = sha256(b"root" + array("q", [1, 2]).tobytes()).digest()
    assert page_key(b"root", [1, 2]) == first
    assert page_key(first, [3]) == sha256(first + array("q", [3]).tobytes()).digest()
    assert page_key(page_key(b"root", [1]), [2]) != first


def test_pages_that_were_released_last_are_given_away_last() -> None:
    allocator = PageAllocator(3, 1)
    cache = PageCache(allocator)
    pages = allocator.allocate(3)
    assert pages is not None
    keys = keys_of((1, 2, 3))
    for key, page in zip(keys, pages, strict=True):
        cache.put(key, page)
    allocator.release(reversed(pages))
    assert (allocator.num_free, len(cache)) == (3, 3)
    assert allocator.allocate(1) == [pages[2]], "a chain's end goes before its beginning"
    assert cache.take(keys) == pages[:2]
    assert allocator.allocate(1) is None


def test_only_an_owned_page_can_be_put() -> None:
    allocator = PageAllocator(2, 1)
    with pytest.raises(AssertionError, match="is free"):
        PageCache(allocator).put(b"key", 0)
