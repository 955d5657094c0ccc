"""Who owns which page of the KV pool. Integers only: this file never sees a tensor.

A page has as many references as it has owners. A prefix on the device owns its pages once, however
many requests attend to them (they hold a lease on the prefix, not on its pages); a request owns the
pages of its own tokens; beams or cached prompts share a page by :meth:`PageAllocator.share`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

__all__ = ["PageAllocator", "pages_for"]


def pages_for(num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size)


class PageAllocator:
    """A free list with reference counts. ``allocate`` gives all or nothing."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        assert num_pages > 0
        assert page_size > 0
        self.num_pages = num_pages
        self.page_size = page_size
        # A stack: the page freed last is the next one given, while it may still be in a CPU cache.
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """``count`` pages with one reference each; None, changing nothing, if fewer are free."""
        assert count >= 0
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Add an owner to each page."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is free"
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Take an owner from each page; a page without one is free."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is released twice"
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)

    def references(self, page: int) -> int:
        return self._references[page]

    def check(self, owners: Iterable[Iterable[int]] | None = None) -> None:
        """Assert that free and used pages partition the pool and, given all owners' page lists,
        that each page has exactly the references its owners account for."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is on the free list twice"
        for page, count in enumerate(self._references):
            assert (count == 0) == (page in free), f"page {page}: {count} references"
        if owners is not None:
            owned = Counter(page for pages in owners for page in pages)
            used = {page: count for page, count in enumerate(self._references) if count}
            assert owned == used, f"owned {dict(owned)}, counted {used}"
