"""Who owns which page of the KV pool. Integers only: this file never sees a tensor.

A page has as many references as it has owners. A prefix on the device owns its pages once, however
many requests attend to them (they hold a lease on the prefix, not on its pages); a request owns the
pages of its own tokens; beams or cached prompts share a page by :meth:`PageAllocator.share`.

A page without an owner is free. A cache may have marked it as worth finding again
(:meth:`PageAllocator.keep`): it counts as free all the same, can be shared again, and is given away
when no blank page is left, the one that was released longest ago first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence

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
        self._blank = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._kept: set[int] = set()
        # The kept ones without an owner, in the order in which they lost the last.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self.forget: Callable[[int], None] = lambda page: None
        """told of a kept page that is given away"""

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def allocate(self, count: int) -> list[int] | None:
        """``count`` pages with one reference each; None, changing nothing, if fewer are free."""
        assert count >= 0
        if count > self.num_free:
            return None
        pages = [self._blank.pop() if self._blank else self._take_idle() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def _take_idle(self) -> int:
        page, _ = self._idle.popitem(last=False)
        self._kept.remove(page)
        self.forget(page)
        return page

    def share(self, pages: Sequence[int]) -> None:
        """Add an owner to each page; a kept one may have none yet."""
        for page in pages:
            if page in self._idle:
                del self._idle[page]
            else:
                assert self._references[page] > 0, f"page {page} is free"
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Take an owner from each page; a page without one is free."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is released twice"
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._kept:
                    self._idle[page] = None
                else:
                    self._blank.append(page)

    def keep(self, page: int) -> None:
        """What the page holds is worth finding again, once it has no owner."""
        assert self._references[page] > 0, f"page {page} is free"
        self._kept.add(page)

    def discard(self, page: int) -> None:
        """What a kept page holds is of no use any more."""
        self._kept.remove(page)
        if page in self._idle:
            del self._idle[page]
            self._blank.append(page)

    def references(self, page: int) -> int:
        return self._references[page]

    def check_kept(self, pages: Iterable[int]) -> None:
        """Assert that these pages are marked and no others."""
        assert self._kept == set(pages)

    def check(self, owners: Iterable[Iterable[int]] | None = None) -> None:
        """Assert that free and used pages partition the pool and, given all owners' page lists,
        that each page has exactly the references its owners account for."""
        free = {*self._blank, *self._idle}
        assert len(free) == self.num_free, "a page is free twice"
        assert self._kept.issuperset(self._idle)
        assert self._kept.isdisjoint(self._blank)
        for page, count in enumerate(self._references):
            assert (count == 0) == (page in free), f"page {page}: {count} references"
        if owners is not None:
            owned = Counter(page for pages in owners for page in pages)
            used = {page: count for page, count in enumerate(self._references) if count}
            assert owned == used, f"owned {dict(owned)}, counted {used}"
