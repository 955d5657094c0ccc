"""The page allocator against a model: a list of owners, each with its pages."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prefixd_server.kv.allocator import PageAllocator, pages_for

picks = st.integers(0, 1 << 16)


class AllocatorMachine(RuleBasedStateMachine):
    """An owner is a list of pages; a page is shared by every owner whose list names it."""

    def __init__(self) -> None:
        super().__init__()
        self.owners: list[list[int]] = []

    @initialize(num_pages=st.integers(1, 12), page_size=st.sampled_from([1, 4, 16]))
    def start(self, num_pages: int, page_size: int) -> None:
        self.allocator = PageAllocator(num_pages, page_size)

    @rule(count=st.integers(0, 14))
    def allocate(self, count: int) -> None:
        free = self.allocator.num_free
        pages = self.allocator.allocate(count)
        if count > free:
            assert pages is None
            assert self.allocator.num_free == free
            return
        assert pages is not None
        assert len(set(pages)) == count
        assert not {page for owner in self.owners for page in owner} & set(pages)
        self.owners.append(pages)

    @precondition(lambda self: self.owners)
    @rule(owner=picks, start=st.integers(0, 3))
    def share(self, owner: int, start: int) -> None:
        pages = self._owner(owner)[start:]
        self.allocator.share(pages)
        self.owners.append(list(pages))

    @precondition(lambda self: self.owners)
    @rule(owner=picks)
    def release(self, owner: int) -> None:
        pages = self._owner(owner)
        self.owners.remove(pages)
        self.allocator.release(pages)

    @precondition(lambda self: self.allocator.num_free)
    @rule(page=picks)
    def a_free_page_cannot_be_touched(self, page: int) -> None:
        owned = {page for owner in self.owners for page in owner}
        free = [p for p in range(self.allocator.num_pages) if p not in owned]
        with pytest.raises(AssertionError, match="released twice"):
            self.allocator.release([free[page % len(free)]])
        with pytest.raises(AssertionError, match="is free"):
            self.allocator.share([free[page % len(free)]])

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "allocator"):
            return
        self.allocator.check(self.owners)
        owned = [page for owner in self.owners for page in owner]
        assert self.allocator.num_used == len(set(owned))
        assert self.allocator.num_free == self.allocator.num_pages - len(set(owned))
        for page in range(self.allocator.num_pages):
            assert self.allocator.references(page) == owned.count(page)

    def _owner(self, pick: int) -> list[int]:
        return self.owners[pick % len(self.owners)]


AllocatorMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None
)
TestAllocator = AllocatorMachine.TestCase


def test_check_finds_a_leaked_page() -> None:
    allocator = PageAllocator(4, 1)
    pages = allocator.allocate(2)
    assert pages is not None
    with pytest.raises(AssertionError, match="owned"):
        allocator.check([pages[:1]])


def test_check_finds_a_page_with_two_owners_and_one_reference() -> None:
    allocator = PageAllocator(4, 1)
    pages = allocator.allocate(2)
    assert pages is not None
    with pytest.raises(AssertionError, match="owned"):
        allocator.check([pages, pages[:1]])


@pytest.mark.parametrize(
    ("num_tokens", "page_size", "expected"),
    [(0, 16, 0), (1, 16, 1), (16, 16, 1), (17, 16, 2), (33, 16, 3), (5, 1, 5)],
)
def test_pages_for_rounds_up(num_tokens: int, page_size: int, expected: int) -> None:
    assert pages_for(num_tokens, page_size) == expected
